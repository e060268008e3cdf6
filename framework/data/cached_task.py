"""A task and its cache: its splits, slices of them, and how many examples they have."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data import seqio_caches, seqio_sources
from meshway.framework.data.cache.format import CachedSplit, read_json
from meshway.framework.data.rows.examples import Examples, sizes_at
from meshway.framework.errors import UserError


@dataclasses.dataclass(frozen=True)
class CachedTask:
    """A task with its cache.

    Attributes:
      name: its name.
      rate: its share of the mixture, relative to the others'.
      directory: where it is cached.
      task: the seqio Task; None on a machine without seqio.
      is_cached: whether all of it is cached; False is possible only in a dry run, which caches nothing.
    """

    name: str
    rate: float
    directory: Path
    task: Any
    is_cached: bool = True

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """info.json."""
        return read_json(self.directory / "info.json")

    @functools.cached_property
    def splits(self) -> list[str]:
        """The splits that are cached, or will be."""
        if not self.is_cached:
            return seqio_caches.splits(self.task, self.directory)
        return sorted(path.parent.name for path in self.directory.glob("*/index.json"))

    def num_examples(self, split: str) -> int | None:
        """Returns how many examples a split or a slice of it has; if not cached, of how many its source reports, None
        if it does not."""
        count: int | None
        whole = bare_split(split)
        if self.is_cached:
            count = counts(self.directory)[whole]
        else:
            imported = seqio_caches.origin(self.task, self.directory)
            count = imported.count(whole) if imported else seqio_sources.source_count(self.task, whole)
        return count if count is None else len(slice_of(split, count))

    def read(self, split: str) -> tuple[CachedSplit, Examples]:
        """Returns the cache of a split, and the examples of the split or of a slice of it."""
        cached = CachedSplit(self.directory, bare_split(split))
        chosen = slice_of(split, len(cached))
        return cached, cached if len(chosen) == len(cached) else Sliced(cached, chosen)


def counts(directory: Path) -> dict[str, int]:
    """Returns how many examples each split of a cached task has."""
    indices = {path.parent.name: read_json(path) for path in directory.glob("*/index.json")}
    return {split: sum(shard["examples"] for shard in index["shards"]) for split, index in indices.items()}


_SLICE = re.compile(r"(?P<name>.*?)\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\]")


def bare_split(split: str) -> str:
    """Returns the split of a slice such as 'train[:90%]'; other names as they are.

    Raises:
      UserError: there are brackets, and what is in them is no slice.
    """
    if "[" not in split:
        return split
    if not (found := _SLICE.fullmatch(split)):
        raise UserError(
            f"split {split!r} is no slice: write {split.partition('[')[0]}[FROM:TO], each an example's number or a "
            "percentage, below 0 from the end, as in 'train[:90%]' or 'train[-1000:]'"
        )
    return found["name"]


def slice_of(split: str, count: int) -> range:
    """Returns which of a split's `count` examples a slice has, by the rules of TensorFlow Datasets: percentages are
    rounded to the nearest example. A name without brackets has all.

    Raises:
      UserError: it is no slice, or reaches beyond the examples.
    """
    bare_split(split)
    found = _SLICE.fullmatch(split)
    if not found:
        return range(count)

    def place(text: str | None, default: int) -> int:
        if text is None:
            return default
        number = round(count * int(text[:-1]) / 100) if text.endswith("%") else int(text)
        return number + count if number < 0 else number

    chosen = range(place(found["start"], 0), place(found["stop"], count))
    if not 0 <= chosen.start <= chosen.stop <= count:
        raise UserError(f"split {split!r}: {found['name']!r} has {count:,} examples, fewer than this slice asks for")
    return chosen


class Sliced:
    """A run of other examples."""

    def __init__(self, examples: Examples, numbers: range) -> None:
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def identity(self) -> str:
        """What tells these examples from others, where it is a cached split that they are of."""
        whole: Any = self._examples
        return f"{whole.identity}[{self._numbers.start}:{self._numbers.stop}]"

    @property
    def span(self) -> tuple[str, int, int]:
        """(the split, number of the first example, number after the last), where it is a cached split."""
        whole: Any = self._examples
        return whole.split, self._numbers.start, self._numbers.stop

    @property
    def directory(self) -> Path:
        """Where the cached split is."""
        whole: Any = self._examples
        return whole.directory

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        return {name: x[self._numbers.start : self._numbers.stop] for name, x in self._examples.sizes.items()}

    def sizes_at(self, which: np.ndarray | slice) -> Mapping[str, np.ndarray]:
        """Returns the sizes of some of them."""
        chosen = self._numbers[which] if isinstance(which, slice) else np.asarray(which) + self._numbers.start
        return sizes_at(self._examples, slice(chosen.start, chosen.stop) if isinstance(chosen, range) else chosen)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        return self._examples.read(np.asarray(indices, np.int64) + self._numbers.start)
