"""The endless rows of a task some of whose steps must run in TensorFlow each time it is read.

Such steps may make any number of examples of any length, so nothing is known before they have run. They run on
pools of `POOL_EXAMPLES` cached examples in a fresh order each epoch, seeded by (seed, epoch, pool), and each pool is
packed on its own. Every process runs every pool, and a position names the pool that it lies in.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.data.objective import Items, Objective
from meshway.framework.data.rows.examples import Examples, InMemory
from meshway.framework.data.rows.order import key_of, permute
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
      steps: (examples, seed) -> what the steps make of them; the same each time it is called.
      objective: what becomes of those.
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
        """Returns where the pool of the row before `number` lies: the same on every process."""
        if number:
            self._walk_to(number - 1)
        return self._anchor._asdict() if number else _Anchor(0, 0, 0)._asdict()

    def restore(self, number: int, state: Mapping[str, int]) -> None:
        """Goes to row `number`; only the pool in `state` is run, and those after it up to `number`."""
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
        """Returns the rows of a pool, read once; None if the steps leave nothing."""
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
