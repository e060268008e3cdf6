"""The contracts of feature converters: from a task's examples, by their sizes first, to rows of a model's batch.

Packing is planned from sizes alone, before any example is read: every process plans the same rows and reads
only the examples of its own rows. So an objective must know how many tokens an example will take.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from meshway.framework.data.rows.packing import Arrays, Example, Placement

Sizes = Mapping[str, np.ndarray]  # feature -> int64 [items]: tokens, that is, length of the first dimension
Spec = dict[str, tuple[tuple[int, ...], np.dtype]]  # batch feature -> (global shape, dtype)


@dataclasses.dataclass(frozen=True)
class VocabularyInfo:
    """What an objective needs to know about a feature's vocabulary.

    Attributes:
      size: number of ids, extra ids included.
      eos_id: the id that ends a sequence, None if there is none.
      extra_ids: how many ids are sentinels.
      sentinels: those ids, <extra_id_0> first, where they are not the highest, from size - 1 down; else ().
    """

    size: int
    eos_id: int | None
    extra_ids: int = 0
    sentinels: tuple[int, ...] = ()

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """The ids of <extra_id_0>, <extra_id_1>, ..."""
        return self.sentinels or tuple(range(self.size - 1, self.size - 1 - self.extra_ids, -1))


@dataclasses.dataclass(frozen=True)
class FeatureInfo:
    """One feature of a task's examples.

    Attributes:
      dtype: numpy's name, as 'int32'; 'bytes' for strings.
      shape: of one example, None where it differs between examples; token ids are (None,).
      vocabulary: of token ids; None for anything else.
    """

    dtype: str
    shape: tuple[int | None, ...]
    vocabulary: VocabularyInfo | None = None


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What an objective is bound to: a task's name and the features its examples really have.

    Attributes:
      name: the task.
      features: those that are not empty in every example.
      start: ids that a decoder reads before the first token; the default is T5's, for tasks that no data source opened.
      bos: `start` where a text may contain these ids itself, see `Framing.bos`; else ().
      empty: names of the features that are empty in every example.
    """

    name: str
    features: Mapping[str, FeatureInfo]
    start: tuple[int, ...] = (0,)
    empty: frozenset[str] = frozenset()
    bos: tuple[int, ...] = ()

    def lacks(self, name: str, kind: str) -> str:
        """Returns the error message for a missing feature that converter `kind` reads."""
        if name in self.empty:
            return f"task {self.name!r}: {name!r}, which {kind} reads, is empty in every example"
        return f"task {self.name!r} has no feature {name!r}, which {kind} reads; it has {sorted(self.features)}"


@dataclasses.dataclass(frozen=True)
class Items:
    """The units that are packed: part `part` of example `index` in epoch `epoch`; int64 [items] each."""

    index: np.ndarray
    part: np.ndarray
    epoch: np.ndarray

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yields the columns in declaration order."""
        yield from (self.index, self.part, self.epoch)


class Objective(Protocol):
    """A converter bound to one task and to lengths.

    Attributes:
      row_lengths: row feature -> tokens that a row holds; {} for rows of one item each, never packed.
      trims: feature -> tokens to which its end is truncated: an EOS appended online must fit in these.
      cycle: number of epochs after which the sizes of the same items repeat; 1 unless they depend on the epoch.
    """

    @property
    def row_lengths(self) -> Mapping[str, int]: ...

    @property
    def trims(self) -> Mapping[str, int]: ...

    @property
    def cycle(self) -> int: ...

    def parts(self, sizes: Sizes) -> np.ndarray:
        """Returns how many items each example makes [examples]: 1, more where it is split, 0 where it is skipped.

        Args:
          sizes: task feature -> tokens of each example [examples].

        Raises:
          UserError: an example is too long and the policy says 'error'.
        """
        ...

    def lost(self, sizes: Sizes) -> np.ndarray:
        """Returns how many tokens of each example are in no item [examples]: truncated, or skipped with the example."""
        ...

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        """Returns row feature -> tokens of each item [items], none above `row_lengths`.

        Args:
          sizes: task feature -> tokens of each item's example [items].
          items: which items.
        """
        ...

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        """Returns one item's row features, of the lengths that `measure` returned; pure.

        Args:
          example: the task's features.
          index: the example's number in its task.
          part: which item of the example.
          epoch: which pass over the task.
          seed: of this item in this epoch, below 2**64: the only source of randomness.
        """
        ...

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        """Returns the batch features [placement.num_rows, ...] of converted items."""
        ...

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        """Returns the arrays that prediction reads, row i for (task) example i; UserError if there are none."""
        ...


class Converter(Protocol):
    """What a recipe names: an objective before it is bound to a task. A user's class needs these members, no base
    class.

    Attributes:
      pack: whether training rows hold several items.
      can_predict: whether the objective's `prompts` works.
      task_features: the features of a task it reads, as TASK_FEATURE_LENGTHS must list them.
    """

    pack: bool
    can_predict: bool
    task_features: tuple[str, ...]

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns the batch features, for task feature `lengths` in tokens."""
        ...

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> Objective:
        """Returns the objective of one task.

        Raises:
          UserError: the task's features, the lengths and this converter do not fit; the message names which and why.
        """
        ...
