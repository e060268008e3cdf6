"""Examples by number, besides those of a cache: held in memory, the first few, with steps applied."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from meshway.framework.data.rows.online_steps import AppendEos
from meshway.framework.data.rows.packing import Example
from meshway.framework.errors import UserError


class Examples(Protocol):
    """A task's examples: how many, how long each is, and any of them."""

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        """Feature of rank 1 or more -> tokens of each example, integers [examples]."""
        ...

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        """Returns the examples with these numbers, in this order."""
        ...


def check_ids(
    name: str, examples: Sequence[Example], numbers: Sequence[int] | np.ndarray, sizes: Mapping[str, int]
) -> None:
    """Checks the token ids of a task's examples before they become rows: another id reads some other row of a table.

    Args:
      name: the task.
      examples: some of it.
      numbers: theirs in the task.
      sizes: feature -> how many ids its vocabulary has.

    Raises:
      UserError: naming the first example with an id that the vocabulary has not.
    """
    for feature, size in sizes.items():
        arrays = [np.asarray(example[feature]) for example in examples if feature in example]
        joined = np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
        if not joined.size or (joined.min() >= 0 and joined.max() < size):
            continue
        for number, example in zip(numbers, examples, strict=True):
            if problem := wrong_id(example, {feature: size}):
                raise UserError(f"task {name!r}, example {number}: {problem}")


def wrong_id(example: Example, sizes: Mapping[str, int]) -> str:
    """Returns what is wrong with the first id of an example that its vocabulary has not; "" where there is none."""
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

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        return self._examples.read(indices)


class Stepped:
    """Other examples with some steps applied as they are read.

    Args:
      examples: the examples.
      steps: what to apply, in order.
      lengths: feature -> tokens to which a step that trims may trim.
    """

    def __init__(self, examples: Examples, steps: Sequence[AppendEos], lengths: Mapping[str, int]) -> None:
        self.examples = examples
        self._steps = list(steps)
        self._lengths = dict(lengths)

    def __len__(self) -> int:
        return len(self.examples)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "sizes"}

    @functools.cached_property
    def sizes(self) -> Mapping[str, np.ndarray]:
        return functools.reduce(lambda sizes, step: step.sizes(sizes, self._lengths), self._steps, self.examples.sizes)

    @property
    def whole(self) -> Mapping[str, np.ndarray]:
        """What `sizes` would be if no step trimmed."""
        return functools.reduce(lambda sizes, step: step.sizes(sizes, {}), self._steps, self.examples.sizes)

    @property
    def lost(self) -> np.ndarray:
        """How many tokens of each example the steps trimmed, int64 [examples]."""
        whole = self.whole
        return sum((whole[name] - kept for name, kept in self.sizes.items()), np.zeros(len(self), np.int64))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        examples = self.examples.read(indices)
        for step in self._steps:
            examples = [step.apply(example, self._lengths) for example in examples]
        return examples
