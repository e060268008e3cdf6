"""Rows of tasks whose steps run as they are read, and of tasks that are streamed uncached.

Such steps may make any number of examples of any length, so sizes are known only after they have run. They run on
pools of `POOL_EXAMPLES` cached examples in a fresh order each epoch, seeded by (seed, epoch, pool), and each pool is
packed on its own. Every process runs every pool, and a saved position names its pool.

Examples of a streamed task become rows a buffer at a time. A buffer holds examples of only one pass, so each pass is
over before the next begins: no example comes a second time before all have come once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.data.objective import Items, Objective
from meshway.framework.data.rows.examples import Examples, InMemory, check_ids
from meshway.framework.data.rows.mixing import key_of, permute
from meshway.framework.data.rows.packing import Arrays
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.errors import UserError

POOL_EXAMPLES = 4096


class _Anchor(NamedTuple):
    """Row `first` of the stream is the first row of pool `pool` of epoch `epoch`."""

    first: int
    epoch: int
    pool: int


class OnlineSource:
    """The rows of one task.

    Args:
      name: the task's name.
      examples: its cached examples.
      steps: (examples, seed) -> the examples after the steps; deterministic.
      objective: turns those examples into items.
      pack: whether rows hold several items.
      shuffle: whether order is random.
      seed: of order and of all randomness.
      vocabulary_sizes: as `RowSource` has them; an example is named by its number among those that its pool makes.

    Raises:
      UserError: there is nothing to read.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        steps: Callable[[list[Any], int], list[Any]],
        objective: Objective,
        pack: bool,
        shuffle: bool = True,
        seed: int = 0,
        vocabulary_sizes: Mapping[str, int] | None = None,
    ) -> None:
        if not len(examples):
            raise UserError(f"task {name!r} has no examples to read")
        self.name = name
        self.examples = examples
        self._steps = steps
        self._objective = objective
        self._pack = pack
        self._shuffle = shuffle
        self._seed = seed
        self._vocabulary_sizes = vocabulary_sizes
        self._key = key_of(seed, name, "online")
        self._num_pools = max(1, round(len(examples) / POOL_EXAMPLES))
        self._anchor = _Anchor(0, 0, 0)
        self._rows = functools.lru_cache(maxsize=2)(self._run_pool)

    @property
    def items_per_row(self) -> float:
        """How many items a row of the first pool holds."""
        pool = self._rows(0, 0)
        return pool.items_per_epoch / pool.rows_in_round(0) if pool else 1.0

    def prepare(self, number: int) -> None:
        """Does nothing: what leads to a row is run as it is taken."""

    def take(self, numbers: np.ndarray) -> tuple[Arrays, int]:
        """Reads rows by their numbers, ascending; as `RowSource.take`."""
        parts: list[Arrays] = []
        items = at = 0
        while at < len(numbers):
            self._walk_to(int(numbers[at]))
            pool = self._rows(self._anchor.epoch, self._anchor.pool)
            assert pool is not None  # _walk_to stops at pools with rows only
            stop = at + int(np.searchsorted(numbers[at:], self._anchor.first + pool.rows_in_round(0)))
            arrays, count = pool.take(numbers[at:stop] - self._anchor.first)
            parts.append(arrays)
            items += count
            at = stop
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, items

    def state(self, number: int) -> dict[str, int]:
        """Returns the pool of the row before `number`, and where it begins: the same on every process."""
        if number:
            self._walk_to(number - 1)
        return self._anchor._asdict() if number else _Anchor(0, 0, 0)._asdict()

    def restore(self, number: int, state: Mapping[str, int]) -> None:
        """Makes `number` the next row; only the pool in `state` is run, and those after it up to `number`."""
        missing = set(_Anchor._fields) - set(state)
        if missing:
            raise UserError(f"the saved data position of task {self.name!r} lacks {sorted(missing)}")
        self._anchor = _Anchor(*(int(state[field]) for field in _Anchor._fields))

    def _walk_to(self, number: int) -> None:
        """Moves the anchor to the pool that holds row `number`."""
        if number < self._anchor.first:
            self._anchor = _Anchor(0, 0, 0)
        fruitless = 0
        while True:
            first, epoch, pool = self._anchor
            rows = self._rows(epoch, pool)
            count = rows.rows_in_round(0) if rows else 0
            if number < first + count:
                return
            fruitless = 0 if count else fruitless + 1
            if fruitless > self._num_pools:
                raise UserError(f"task {self.name!r}: its preprocessors make no example of any it has")
            after = (epoch, pool + 1) if pool + 1 < self._num_pools else (epoch + 1, 0)
            self._anchor = _Anchor(first + count, *after)

    def _run_pool(self, epoch: int, pool: int) -> RowSource | None:
        """Returns the rows of a pool, read once; None if no example is left after the steps."""
        count = len(self.examples)
        positions = np.arange(pool * count // self._num_pools, (pool + 1) * count // self._num_pools)
        if self._shuffle:
            positions = permute(positions, count, key_of(self._key, "epoch", epoch))
        made = self._steps(self.examples.read(positions), key_of(self._key, "steps", epoch, pool) % 2**31)
        if not made:
            return None
        objective = InEpoch(self._objective, epoch)
        seed = key_of(self._seed, epoch, pool)
        try:
            arguments = (objective, self._pack, self._shuffle, seed, self._vocabulary_sizes)
            return RowSource(self.name, InMemory(made), *arguments)
        except UserError:
            if objective.parts(InMemory(made).sizes).sum():
                raise
            return None


class InEpoch:
    """An objective whose items all belong to one epoch."""

    cycle = 1

    def __init__(self, objective: Objective, epoch: int) -> None:
        self._objective = objective
        self._epoch = epoch
        self.row_lengths, self.trims = objective.row_lengths, objective.trims
        self.parts, self.lost = objective.parts, objective.lost
        self.lay, self.prompts = objective.lay, objective.prompts

    def measure(self, sizes: Mapping[str, np.ndarray], items: Items) -> dict[str, np.ndarray]:
        return self._objective.measure(sizes, dataclasses.replace(items, epoch=np.full_like(items.epoch, self._epoch)))

    def convert(self, example: Any, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        return self._objective.convert(example, index, part, self._epoch, seed)


BUFFER = 1024  # examples packed together, at most
_FRUITLESS = 100  # buffers in a row that may give no row


class StreamedSource:
    """The rows of one task, to be taken one after the other.

    Args:
      name: the task's name.
      passes: its examples without end, None after the last of each pass.
      objective: turns the examples into items.
      pack: whether rows hold several items.
      seed: of the order in a buffer and of the objective's randomness.
      vocabulary_sizes: as `RowSource` has them; an example is named by its place in its pass, as it was read.
      part: which part of the task this process reads, for messages.
      bind: (names of features) -> the objective of a task in which these hold nothing. It is asked once the first
        buffer is read, of those that are empty in all of it.

    Attributes:
      name: the task's name.
      examples: those of the buffer whose rows come next.

    Raises:
      UserError: as rows are taken: there is nothing to read; or a feature holds something that was empty in the first
        buffer.
    """

    def __init__(
        self,
        name: str,
        passes: Iterator[Any | None],
        objective: Objective,
        pack: bool,
        seed: int = 0,
        vocabulary_sizes: Mapping[str, int] | None = None,
        part: str = "",
        bind: Callable[[frozenset[str]], Objective] | None = None,
    ) -> None:
        self.name = name
        self.examples: Examples = InMemory([])
        self._bind, self._empty = bind, frozenset[str]()
        self._passes, self._objective, self._pack = passes, objective, pack
        self._seed, self._vocabulary_sizes, self._part = seed, dict(vocabulary_sizes or {}), part
        self._pass = self._read = self._buffers = 0  # passes that are over, examples read of this one, buffers read
        self._rows: RowSource | None = None
        self._first = 0  # number of the buffer's first row

    @property
    def items_per_row(self) -> float:
        """How many items a row of the first buffer holds; to be asked for before rows are taken."""
        rows = self._rows_of(0)
        return rows.items_per_epoch / rows.rows_in_round(0)

    def prepare(self, number: int) -> None:
        """Does nothing: rows are taken one after the other."""

    def take(self, numbers: np.ndarray) -> tuple[Arrays, int]:
        """Reads rows by their numbers, ascending, none below those taken before; as `RowSource.take`."""
        parts: list[Arrays] = []
        items = at = 0
        while at < len(numbers):
            rows = self._rows_of(int(numbers[at]))
            stop = at + int(np.searchsorted(numbers[at:], self._first + rows.rows_in_round(0)))
            arrays, count = rows.take(numbers[at:stop] - self._first)
            parts.append(arrays)
            items += count
            at = stop
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, items

    def state(self, number: int) -> dict[str, int]:
        """Returns {}: the position of a stream cannot be saved."""
        return {}

    def restore(self, number: int, state: Mapping[str, int]) -> None:
        """Does nothing; rows before `number` are to be taken again."""

    def _rows_of(self, number: int) -> RowSource:
        """Returns the rows of the buffer that holds row `number`."""
        while self._rows is None or number >= self._first + self._rows.rows_in_round(0):
            self._first += self._rows.rows_in_round(0) if self._rows else 0
            self._rows = self._next_rows()
        return self._rows

    def _next_rows(self) -> RowSource:
        fruitless = 0
        for _ in range(_FRUITLESS):
            number, first, examples = self._buffer()
            check_ids(self.name, examples, range(first, first + len(examples)), self._vocabulary_sizes)
            self.examples = InMemory(examples)
            self._look_for_empty(self.examples)
            self._buffers += 1
            fruitless += len(examples)
            if not self._objective.row_lengths or self._objective.parts(self.examples.sizes).any():
                objective, seed = InEpoch(self._objective, number), key_of(self._seed, self._buffers)
                return RowSource(self.name, self.examples, objective, self._pack, True, seed)
        raise UserError(f"task {self.name!r}: {fruitless:,} examples in a row were all left out by the objective")

    def _look_for_empty(self, examples: InMemory) -> None:
        """Binds the objective anew if features are empty in all of the first buffer, and sees that they stay so."""
        empty = frozenset(name for name, sizes in examples.sizes.items() if not sizes.any())
        if not self._buffers and empty and self._bind is not None:
            self._objective, self._empty = self._bind(empty), empty
        if filled := sorted(self._empty - empty):
            raise UserError(
                f"task {self.name!r}: {', '.join(map(repr, filled))} was empty in the first examples and is not in "
                "later ones: cache the task, which looks at all of them first, or shuffle what is streamed"
            )

    def _buffer(self) -> tuple[int, int, list[Any]]:
        """Returns (the pass, the place in it of the first example, the next examples of it)."""
        number, first = self._pass, self._read
        examples: list[Any] = []
        while len(examples) < BUFFER:
            example = next(self._passes)
            if example is not None:
                examples.append(example)
                self._read += 1
                continue
            if not self._read:
                raise UserError(f"task {self.name!r} has no examples to read{self._part}")
            self._pass, self._read = self._pass + 1, 0
            if examples:
                break
            number, first = self._pass, 0
        return number, first, examples
