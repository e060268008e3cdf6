"""Examples of a task, read by number, the items they make, and the steps that run as they are read.

info.json lists a task's steps after the cache, as [{"step": "append_eos", "features": {"targets": 1}}]: the
features that get an EOS, with its id. It holds TENSORFLOW where a step has no numpy equivalent.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np

from meshway.framework.data.objective import FeatureInfo, Items, Objective, Sizes
from meshway.framework.data.rows.packing import Example
from meshway.framework.errors import UserError

TWINS = ("append_eos", "append_eos_after_trim")  # steps of seqio.preprocessors that have a numpy equivalent here
TENSORFLOW = "tensorflow"


@dataclasses.dataclass(frozen=True)
class AppendEos:
    """seqio.preprocessors.append_eos, or with `trims` append_eos_after_trim: along a feature's last axis.

    Attributes:
      eos: feature -> the id.
      ranks: feature -> number of dimensions.
      trims: whether a feature is first truncated to its length less one, if a length is given.
    """

    eos: Mapping[str, int]
    ranks: Mapping[str, int]
    trims: bool

    def apply(self, example: Example, lengths: Mapping[str, int]) -> Example:
        """Returns an example with EOS appended."""
        result = dict(example)
        for name, eos in self.eos.items():
            if name in result:
                value = result[name][..., : self._room(name, lengths)]
                ended = np.empty((*value.shape[:-1], value.shape[-1] + 1), value.dtype)
                ended[..., :-1], ended[..., -1] = value, eos
                result[name] = ended
        return result

    def sizes(self, sizes: Sizes, lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Returns the sizes [examples] after `apply`, by feature, from those before."""
        result = dict(sizes)
        for name in self.eos:
            if name in result and self.ranks[name] == 1:
                room = self._room(name, lengths)
                kept = result[name]
                if room is not None:
                    kept = np.minimum(kept, room) if room >= 0 else np.maximum(kept + room, 0)
                result[name] = kept + 1
        return result

    def _room(self, name: str, lengths: Mapping[str, int]) -> int | None:
        return lengths[name] - 1 if self.trims and lengths.get(name) is not None else None


def numpy_steps(
    entries: Sequence[Mapping[str, Any]] | str, features: Mapping[str, FeatureInfo]
) -> list[AppendEos] | None:
    """Returns the steps of info.json's `online`, for the cached `features`; None if they need TensorFlow."""
    if isinstance(entries, str):
        return None
    ranks = {name: len(info.shape) for name, info in features.items()}
    return [AppendEos(entry["features"], ranks, entry["step"] == "append_eos_after_trim") for entry in entries]


class Examples(Protocol):
    """A task's examples: their number, the size of each, and access by number.

    Those of a corpus have `sizes_at` too, (numbers or a slice) -> the sizes of these examples alone: see the function.
    """

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        """Feature of rank 1 or more -> its length in each example, integers [examples]."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Returns the examples with these numbers, in this order."""
        ...


def sizes_at(examples: Examples, which: np.ndarray | slice) -> dict[str, np.ndarray]:
    """Returns feature -> the length in the examples with numbers `which` [n], or of a slice, integers [n]."""
    if hasattr(examples, "sizes_at"):
        return examples.sizes_at(which)
    return {name: column[which] for name, column in examples.sizes.items()}


_TOGETHER = 1 << 18  # examples whose sizes are looked at together, by each of a few threads
_BLOCK = 64  # examples; divides _TOGETHER
_EACH = 1 << 20  # examples of a task that is small enough to keep where each one's items begin


class ItemNumbers:
    """The items of a task by number: they are numbered in the order of their examples.

    What is kept grows by an eighth of a byte an example: where items begin is kept of every 64th example.

    Args:
      examples: the task's.
      objective: says how many items each makes.

    Attributes:
      total: how many items there are.

    Raises:
      UserError: an example is too long and the policy says 'error'.
    """

    def __init__(self, examples: Examples, objective: Objective) -> None:
        self._examples, self._objective = examples, objective
        self._block = 1 if len(examples) <= _EACH else _BLOCK
        self._ends: np.ndarray | None = None  # items of all blocks up to each; None if each example makes one
        self.total = len(examples)
        if not objective.row_lengths:
            return
        starts = range(0, len(examples), _TOGETHER)
        if len(starts) == 1:
            counted = [self._count(0)]
        else:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # numpy frees the interpreter
                counted = list(threads.map(self._count, starts))
        if any(one is not None for one in counted):
            whole = [self._ones(at) if one is None else one for at, one in zip(starts, counted, strict=True)]
            self._ends = np.cumsum(np.concatenate(whole), dtype=np.int64)
            self.total = int(self._ends[-1])

    def at(self, positions: np.ndarray, epochs: np.ndarray) -> Items:
        """Returns the items with numbers `positions` [n], below `total`, in `epochs` [n]."""
        if self._ends is None:
            return Items(positions, np.zeros(len(positions), np.int64), epochs)
        blocks = np.searchsorted(self._ends, positions, side="right")
        left = positions - np.where(blocks > 0, self._ends[blocks - 1], 0)
        if self._block == 1:
            return Items(blocks, left, epochs)
        found, place = np.unique(blocks, return_inverse=True)
        members = found[:, None] * self._block + np.arange(self._block)
        inside = members < len(self._examples)
        sizes = sizes_at(self._examples, np.minimum(members, len(self._examples) - 1).ravel())
        ends = np.cumsum(np.asarray(self._objective.parts(sizes)).reshape(members.shape) * inside, axis=1)[place]
        within = (ends <= left[:, None]).sum(axis=1)
        before = np.where(within > 0, np.take_along_axis(ends, np.maximum(within - 1, 0)[:, None], axis=1)[:, 0], 0)
        return Items(blocks * self._block + within, left - before, epochs)

    def _count(self, start: int) -> np.ndarray | None:
        """Returns how many items each block from example `start` on makes; None if each example makes one."""
        stop = min(start + _TOGETHER, len(self._examples))
        try:
            parts = np.asarray(self._objective.parts(sizes_at(self._examples, slice(start, stop))))
        except UserError:
            self._objective.parts(self._examples.sizes)  # says the same of all examples
            raise
        if (parts == 1).all():
            return None
        return np.add.reduceat(parts, np.arange(0, len(parts), self._block), dtype=np.int64)

    def _ones(self, start: int) -> np.ndarray:
        count = min(_TOGETHER, len(self._examples) - start)
        return np.minimum(self._block, count - np.arange(0, count, self._block))


def check_ids(
    name: str, examples: Sequence[Example], numbers: Sequence[int] | np.ndarray, sizes: Mapping[str, int]
) -> None:
    """Checks the token ids of a task's examples before they become rows: embeddings do not detect a wrong id.

    Args:
      name: the task.
      examples: some of its examples.
      numbers: their numbers in the task.
      sizes: feature -> how many ids its vocabulary has.

    Raises:
      UserError: an id is outside the vocabulary; names the first such example.
    """
    if outside := [feature for feature, size in sizes.items() if not _inside(examples, feature, size)]:
        for number, example in zip(numbers, examples, strict=True):
            if problem := wrong_id(example, {outside[0]: sizes[outside[0]]}):
                raise UserError(f"task {name!r}, example {number}: {problem}")


Read = TypeVar("Read", bound=Example | Exception)  # an example, or why it could not be read
_CHECKED = 256  # examples whose ids are looked at together: one by one takes as long as to write them


def with_problems(examples: Iterable[Read], sizes: Mapping[str, int]) -> Iterator[tuple[Read, str]]:
    """Yields each example with a message about its first id outside its vocabulary, "" if there is none.

    Where reading fails, those that were read before are yielded first.
    """
    left = iter(examples)
    failure: Exception | None = None
    while failure is None:
        some: list[Read] = []
        try:
            some.extend(itertools.islice(left, _CHECKED))
        except Exception as error:
            failure = error
        if not some:
            break
        read = [example for example in some if not isinstance(example, Exception)]
        fine = all(_inside(read, feature, size) for feature, size in sizes.items())
        for example in some:
            yield example, "" if fine or isinstance(example, Exception) else wrong_id(example, sizes)
    if failure is not None:
        raise failure


def _inside(examples: Sequence[Example], feature: str, size: int) -> bool:
    arrays = [np.ravel(example[feature]) for example in examples if feature in example]
    joined = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
    return not joined.size or bool(joined.min() >= 0 and joined.max() < size)


def wrong_id(example: Example, sizes: Mapping[str, int]) -> str:
    """Returns a message about the first id of an example that is outside its vocabulary; "" if there is none."""
    for feature, size in sizes.items():
        ids = np.asarray(example.get(feature, ()))
        if len(wrong := ids[(ids < 0) | (ids >= size)]):
            return (
                f"feature {feature!r} holds the token id {wrong[0]}, but its vocabulary has {size:,} ids, 0 to "
                f"{size - 1:,}"
            )
    return ""


class InMemory:
    """Examples held in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    @functools.cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        first = self._examples[0] if self._examples else {}
        names = [name for name, value in first.items() if np.ndim(value) and np.asarray(value).dtype.kind not in "OSU"]
        count = len(self._examples)
        return {name: np.fromiter((len(e[name]) for e in self._examples), np.int64, count) for name in names}

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return [self._examples[int(index)] for index in indices]


def whole_sizes(examples: Examples) -> Mapping[str, np.ndarray]:
    """Returns what the sizes of examples would be if no step of ours trimmed them."""
    sizes: Mapping[str, np.ndarray] = getattr(examples, "whole", examples.sizes)
    return sizes


class First:
    """The first `count` of other examples."""

    def __init__(self, examples: Examples, count: int) -> None:
        self._examples = examples
        self._count = min(count, len(examples))

    def __len__(self) -> int:
        return self._count

    @property
    def sizes(self) -> dict[str, np.ndarray]:
        return {name: column[: self._count] for name, column in self._examples.sizes.items()}

    def sizes_at(self, which: np.ndarray | slice) -> dict[str, np.ndarray]:
        within = slice(*which.indices(self._count)) if isinstance(which, slice) else which
        return sizes_at(self._examples, within)

    @property
    def whole(self) -> dict[str, np.ndarray]:
        """What `sizes` would be if no step trimmed."""
        return {name: column[: self._count] for name, column in whole_sizes(self._examples).items()}

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        return self._examples.read(indices)


class Lazy:
    """Examples that are read into memory when they are first needed.

    Args:
      read: reads them.
      read_whole: reads them with all of their tokens, where `read` trims; None where it trims nothing.
    """

    def __init__(self, read: Callable[[], Sequence[Example]], read_whole: Callable[[], Sequence[Example]] | None):
        self._read, self._read_whole = read, read_whole

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        return self._loaded.sizes

    @functools.cached_property
    def whole(self) -> Mapping[str, np.ndarray]:
        """What `sizes` would be if `read` did not trim."""
        whole = None if self._read_whole is None else InMemory(self._read_whole())
        return self.sizes if whole is None or len(whole) != len(self) else whole.sizes

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return self._loaded.read(indices)

    @functools.cached_property
    def _loaded(self) -> InMemory:
        return InMemory(self._read())


class Stepped:
    """Other examples with some steps applied as they are read.

    Args:
      examples: the examples.
      steps: what to apply, in order.
      lengths: feature -> tokens to which a step with `trims` truncates.
    """

    def __init__(self, examples: Examples, steps: Sequence[AppendEos], lengths: Mapping[str, int]) -> None:
        self.examples = examples
        self._steps = list(steps)
        self._lengths = dict(lengths)

    def __len__(self) -> int:
        return len(self.examples)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "sizes"}

    @property
    def span(self) -> tuple[str, int, int] | None:
        """Which of a split's examples these are, where they are of one."""
        return getattr(self.examples, "span", None)

    @functools.cached_property
    def sizes(self) -> Mapping[str, np.ndarray]:
        return functools.reduce(lambda sizes, step: step.sizes(sizes, self._lengths), self._steps, self.examples.sizes)

    def sizes_at(self, which: np.ndarray | slice) -> Mapping[str, np.ndarray]:
        """Returns the sizes of some examples after the steps."""
        found = sizes_at(self.examples, which)
        return functools.reduce(lambda sizes, step: step.sizes(sizes, self._lengths), self._steps, found)

    @property
    def whole(self) -> Mapping[str, np.ndarray]:
        """What `sizes` would be if no step trimmed."""
        return functools.reduce(lambda sizes, step: step.sizes(sizes, {}), self._steps, self.examples.sizes)

    @property
    def lost(self) -> np.ndarray:
        """How many tokens of each example the steps trimmed, int64 [examples]."""
        whole = self.whole
        return sum((whole[name] - kept for name, kept in self.sizes.items()), np.zeros(len(self), np.int64))

    def first(self, count: int) -> "Stepped":
        """Returns the first `count` of them."""
        return Stepped(First(self.examples, count), self._steps, self._lengths)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        examples = self.examples.read(indices)
        for step in self._steps:
            examples = [step.apply(example, self._lengths) for example in examples]
        return examples
