"""The endless rows of one cached task: any row by its number, from sizes alone until it is read.

A round is one pass over the task's items, each of which is in it once. When rows are packed, the items are divided
once, at random, into pools of `POOL_ITEMS`, and each pool is packed on its own; a round visits the pools in a fresh
order, and each pool's rows in a fresh order. So the same items share a row in every round, which does not matter, as
segments do not attend to each other, and every round has the same number of rows: with the rows of all pools counted
(row_counts.py), row n is found without packing the rows before it. The last row of a pool is partly empty, which
matters only for a task of few rows. Unpacked, a row is an item, and a round is a fresh permutation of all items.

Nothing here grows with the task but the counts of rows, 8 bytes for 16,384 items, and what `ItemNumbers` keeps.
"""

import functools
import hashlib
import multiprocessing
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.data.objective import Items, Objective
from meshway.framework.data.rows import row_counts
from meshway.framework.data.rows.examples import Examples, ItemNumbers, check_ids, sizes_at
from meshway.framework.data.rows.mixing import key_of, permute, seeds
from meshway.framework.data.rows.packing import PACKING, Arrays, Placement, best_fit, count_rows
from meshway.framework.errors import UserError

POOL_ITEMS = 16384
_SAMPLED_POOLS = 16  # from which the mean number of items per row is computed
_WALK = 2  # pools planned on the way to a row before those of the whole round are counted
_PLANS = 4  # held in memory
_PROBED = 1024  # examples whose sizes under the objective tell it from others


class Place(NamedTuple):
    """Where a row is: row `row` of the `ordinal`-th pool visited in round `round`."""

    round: int
    ordinal: int
    row: int


class RowSource:
    """The rows of one task.

    Args:
      name: the task's name.
      examples: its examples.
      objective: turns examples into items.
      pack: whether rows hold several items.
      shuffle: whether order is random; if not, items come in the task's order.
      seed: of order and of the objective's randomness.
      vocabulary_sizes: feature of token ids -> size of its vocabulary; an example with an id outside it is an error
        when it is read.
      table: where the rows of its pools are kept; None: in memory only.

    Attributes:
      items_per_epoch: how many items one pass over the task has.

    Raises:
      UserError: there is nothing to read.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        objective: Objective,
        pack: bool,
        shuffle: bool = True,
        seed: int = 0,
        vocabulary_sizes: Mapping[str, int] | None = None,
        table: row_counts.RowTable | None = None,
    ) -> None:
        if not len(examples):
            raise UserError(f"task {name!r} has no examples to read")
        self.name = name
        self.examples = examples
        self.objective = objective
        self._pack = pack and bool(objective.row_lengths)
        self._shuffle = shuffle
        self._vocabulary_sizes = dict(vocabulary_sizes or {})
        self._key = key_of(seed, name)
        self._items = ItemNumbers(examples, objective)
        self.items_per_epoch = self._items.total
        if not self.items_per_epoch:
            raise UserError(f"task {name!r} has no examples to read: none of {len(examples):,} is kept")
        self._cycle = objective.cycle if self._pack else 1  # rounds after which plans repeat
        self._num_pools = max(1, round(self.items_per_epoch / POOL_ITEMS))
        self._rows = np.full((self._cycle, self._num_pools), -1, np.int64)  # of each pool, -1 until it is planned
        self._table = table if self._pack else None
        self._asked: set[int] = set()  # phases that were looked for in the table
        self._trusts_table = self._counts_ahead = True
        self._plan = functools.lru_cache(maxsize=_PLANS)(self._plan_pool)
        self._order = functools.lru_cache(maxsize=_PLANS)(self._pool_order)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("_plan", "_order")}
        return state | {"_counts_ahead": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._plan = functools.lru_cache(maxsize=_PLANS)(self._plan_pool)
        self._order = functools.lru_cache(maxsize=_PLANS)(self._pool_order)

    @property
    def items_per_row(self) -> float:
        """How many items a row holds: the mean over the first pools, a pure function of the task and lengths."""
        if not self._pack:
            return 1.0
        pools = range(min(self._num_pools, _SAMPLED_POOLS))
        if self._num_pools <= _SAMPLED_POOLS:
            self.count_round(0)
        items = int(self._pool_items[: len(pools)].sum())
        return items / max(1, sum(self._rows_of(0, pool) for pool in pools))

    def rows_in_round(self, number: int) -> int:
        """Returns how many rows a round has; counts those of all its pools the first time."""
        if not self._pack:
            return self.items_per_epoch
        self.count_round(number)
        return int(self._rows[number % self._cycle].sum())

    def locate(self, number: int) -> Place:
        """Returns where row `number` of the endless stream is (packed rows only)."""
        round_number = walked = 0
        while True:
            if (self._rows >= 0).all():  # every plan is known: whole cycles are skipped at once
                whole = int(self._rows.sum())
                round_number += number // whole * self._cycle
                number %= whole
            phase, order = round_number % self._cycle, self._order(round_number)
            self._look_up(phase)
            while True:  # plans pools in the order they are visited, as far as this row
                rows = self._rows[phase, order]
                unknown = np.flatnonzero(rows < 0)
                ends = np.cumsum(rows[: unknown[0]] if len(unknown) else rows)
                ordinal = int(np.searchsorted(ends, number, side="right"))
                if ordinal < len(ends):
                    return Place(round_number, ordinal, number - int(ends[ordinal - 1] if ordinal else 0))
                if not len(unknown):
                    break
                if walked < _WALK:  # row after row, one pool is next
                    walked += 1
                    pool = int(order[unknown[0]])
                    self._rows[phase, pool] = self._plan(phase, pool).num_rows
                else:
                    self.count_round(round_number)
            number -= int(ends[-1])
            round_number += 1

    def prepare(self, number: int) -> None:
        """Makes row `number` quick to find, here and in processes that this source is sent to."""
        if self._pack:
            self.locate(number)
            self._count_ahead()

    def count_round(self, number: int) -> None:
        """Counts the rows of all pools of a round, and keeps them in the table, unless they are known."""
        phase = number % self._cycle
        self._look_up(phase)
        unknown = np.flatnonzero(self._rows[phase] < 0)
        if not self._pack or not len(unknown):
            return
        if self._num_pools <= _PLANS:
            for pool in unknown.tolist():
                self._rows[phase, pool] = self._plan(phase, pool).num_rows  # which is read next
            return
        if self._table is None:
            self._rows[phase, unknown] = row_counts.count(self, phase, unknown, 0)
            return
        with self._table.claimed(self._identity, phase):
            if (rows := self._kept_rows(phase)) is None:  # else another process has counted meanwhile
                processes = min(os.cpu_count() or 1, len(unknown) // row_counts.FEWEST)
                rows = self._rows[phase].copy()
                rows[unknown] = row_counts.count(self, phase, unknown, processes)
                self._table.save(self._identity, phase, rows)
            self._rows[phase] = rows

    def count_rounds(self) -> list[int]:
        """Returns the rows of each round until plans repeat, and keeps those of its pools in the table."""
        return [self.rows_in_round(number) for number in range(self._cycle)]

    def count(self, phase: int, pool: int) -> int:
        """Returns how many rows a pool makes in rounds of a phase."""
        return count_rows(self._measured(phase, self._pool_members(pool))[1], self.objective.row_lengths)

    def take(self, numbers: np.ndarray) -> tuple[Arrays, int]:
        """Reads rows by their numbers, ascending.

        Args:
          numbers: row numbers of the endless stream, int64 [rows], at least one.

        Returns:
          (batch features [rows, ...], how many items they hold).
        """
        items, placement = self._find(numbers)
        self._count_ahead()  # now: what has just been counted is not waited for
        order = np.argsort(items.index, kind="stable")  # neighbours in a shard are read together
        found = self.examples.read(items.index[order])
        check_ids(self.name, found, items.index[order], self._vocabulary_sizes)
        examples: list[Any] = [None] * len(order)
        for place, example in zip(order.tolist(), found, strict=True):
            examples[place] = example
        item_seeds = seeds(key_of(self._key, "items"), items.epoch, items.index, items.part)
        columns = zip(examples, *(column.tolist() for column in (*items, item_seeds)), strict=True)
        converted = [self.objective.convert(*column) for column in columns]
        return self.objective.lay(converted, placement), len(converted)

    def examples_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the example number of each item in the rows, int64 [items]; unpacked, an item is a row."""
        return self._find(numbers)[0].index

    def state(self, number: int) -> dict[str, int]:
        """Returns a key of the layout of rows, on which the meaning of a row's number depends."""
        lengths = sorted(self.objective.row_lengths.items())
        parts = [part for name, length in lengths for part in (name, length)]
        return {"plan": key_of(self._pack, self.items_per_epoch, *parts) % 2**31}

    def restore(self, number: int, state: Mapping[str, int]) -> None:
        """Checks that rows are laid out as when the position was saved; any row can be taken at any time.

        Raises:
          UserError: rows are laid out differently.
        """
        if number and state.get("plan", self.state(number)["plan"]) != self.state(number)["plan"]:
            raise UserError(
                f"task {self.name!r}: the saved data position counts rows that were laid out differently. Resume with "
                "the TASK_FEATURE_LENGTHS, PACK, objective and cached examples of the run, or start a new run from its "
                "parameters (train.train.initial)"
            )

    def _find(self, numbers: np.ndarray) -> tuple[Items, Placement]:
        """Returns the items of rows and their placement, row i being the i-th of `numbers`."""
        if not self._pack:
            epochs = numbers // self.items_per_epoch
            position = numbers % self.items_per_epoch
            if self._shuffle:
                for epoch in np.unique(epochs).tolist():
                    at = epochs == epoch
                    position[at] = permute(position[at], self.items_per_epoch, key_of(self._key, "epoch", epoch))
            count = len(numbers)
            zeros = dict.fromkeys(self.objective.row_lengths, np.zeros(count, np.int64))
            placement = Placement(np.arange(count), np.ones(count, np.int32), zeros, count)
            return self._items.at(position, epochs), placement
        positions: list[np.ndarray] = []
        epochs_of: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        segments: list[np.ndarray] = []
        offsets: list[dict[str, np.ndarray]] = []
        at = 0
        while at < len(numbers):
            place, pool, plan = self._find_plan(int(numbers[at]))
            stop = at + int(np.searchsorted(numbers[at:], numbers[at] + plan.num_rows - place.row))
            wanted = numbers[at:stop] - numbers[at] + place.row
            if self._shuffle:
                wanted = permute(wanted, plan.num_rows, key_of(self._key, "rows", place.round, pool))
            members = [plan.members[plan.starts[row] : plan.starts[row + 1]] for row in wanted.tolist()]
            rows.append(np.repeat(np.arange(at, stop), [len(member) for member in members]))
            chosen = np.concatenate(members)
            positions.append(plan.items[chosen])
            epochs_of.append(np.full(len(chosen), place.round))
            segments.append(plan.placement.segments[chosen])
            offsets.append({name: column[chosen] for name, column in plan.placement.offsets.items()})
            at = stop
        joined = {name: np.concatenate([part[name] for part in offsets]) for name in offsets[0]}
        placement = Placement(np.concatenate(rows), np.concatenate(segments), joined, len(numbers))
        return self._items.at(np.concatenate(positions), np.concatenate(epochs_of)), placement

    def _find_plan(self, number: int) -> tuple[Place, int, "_Plan"]:
        """Returns (place of a row, its pool, the pool's plan), which has as many rows as were counted."""
        while True:
            place = self.locate(number)
            phase, pool = place.round % self._cycle, int(self._order(place.round)[place.ordinal])
            plan = self._plan(phase, pool)
            if plan.num_rows == self._rows[phase, pool]:
                return place, pool, plan
            if self._table is None or not self._trusts_table:
                raise UserError(
                    f"task {self.name!r}: {type(self.objective).__name__}.measure gives other sizes of the same items "
                    "than before, but must depend on its arguments alone"
                )
            row_counts.say(f"the kept rows of {self.name!r} are wrong, those of pool {pool}: they are counted again")
            self._rows[:] = -1
            self._trusts_table = False

    def _look_up(self, phase: int) -> None:
        """Takes the rows of a phase from the table, the first time."""
        if phase not in self._asked:
            self._asked.add(phase)
            if (rows := self._kept_rows(phase)) is not None:
                self._rows[phase] = rows

    def _kept_rows(self, phase: int) -> np.ndarray | None:
        if self._table is None or not self._trusts_table:
            return None
        return self._table.load(self._identity, phase, self._pool_items)

    def _count_ahead(self) -> None:
        """Has another process count the rows of all rounds meanwhile, the first time: a later restart needs them."""
        wanted, self._counts_ahead = self._counts_ahead, False
        is_large = self._table is not None and self._num_pools >= row_counts.PARALLEL
        if wanted and is_large and multiprocessing.parent_process() is None:
            row_counts.ahead(self._count_in_background)

    def _count_in_background(self) -> None:
        assert self._table is not None
        for phase in range(self._cycle):
            if (self._rows[phase] >= 0).all():
                continue
            if (rows := self._kept_rows(phase)) is None:
                try:
                    lock = self._table.claim(self._identity, phase)
                except OSError:  # there is no folder to keep them in
                    return
                if lock is None:  # another process counts them
                    continue
                try:
                    rows = row_counts.count(self, phase, np.arange(self._num_pools), 1, quiet=True)
                    if (rows >= 0).all():
                        self._table.save(self._identity, phase, rows)
                finally:
                    self._table.release(self._identity, phase, lock)
            if (rows >= 0).all():
                self._rows[phase] = rows

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        """All that the rows of pools depend on beside the examples; the objective by its text and by what it does."""
        index = np.unique(np.linspace(0, len(self.examples) - 1, _PROBED).astype(np.int64))
        sizes = sizes_at(self.examples, index)
        parts = np.asarray(self.objective.parts(sizes))
        digest = hashlib.sha256(parts.astype(np.int64).tobytes())
        kept = parts > 0
        for phase in range(self._cycle):
            items = Items(index[kept], parts[kept] - 1, np.full(int(kept.sum()), phase))
            measured = self.objective.measure({name: column[kept] for name, column in sizes.items()}, items)
            for name, column in sorted(measured.items()):
                digest.update(name.encode() + np.asarray(column, np.int64).tobytes())
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(self.objective))
        return {
            "packing": PACKING,
            "key": self._key,
            "shuffle": self._shuffle,
            "lengths": dict(self.objective.row_lengths),
            "items": self.items_per_epoch,
            "pools": self._num_pools,
            "cycle": self._cycle,
            "objective": hashlib.sha256(text.encode()).hexdigest(),
            "sample": digest.hexdigest(),
        }

    @property
    def _pool_items(self) -> np.ndarray:
        """How many items each pool has, int64 [pools]."""
        return np.diff(np.arange(self._num_pools + 1, dtype=np.int64) * self.items_per_epoch // self._num_pools)

    def _pool_members(self, pool: int) -> np.ndarray:
        """Returns the numbers of a pool's items."""
        items = np.arange(*self._pool_span(pool))
        return permute(items, self.items_per_epoch, key_of(self._key, "dealt")) if self._shuffle else items

    def _measured(self, phase: int, items: np.ndarray) -> tuple[Items, dict[str, np.ndarray]]:
        found = self._items.at(items, np.full(len(items), phase))
        return found, self.objective.measure(sizes_at(self.examples, found.index), found)

    def _pool_span(self, pool: int) -> tuple[int, int]:
        return pool * self.items_per_epoch // self._num_pools, (pool + 1) * self.items_per_epoch // self._num_pools

    def _pool_order(self, round_number: int) -> np.ndarray:
        pools = np.arange(self._num_pools)
        return permute(pools, self._num_pools, key_of(self._key, "pools", round_number)) if self._shuffle else pools

    def _rows_of(self, phase: int, pool: int) -> int:
        self._look_up(phase)
        if self._rows[phase, pool] < 0:
            self._rows[phase, pool] = self.count(phase, pool)
        return int(self._rows[phase, pool])

    def _plan_pool(self, phase: int, pool: int) -> "_Plan":
        """Packs one pool; the plan is the same in every round of that phase."""
        items = self._pool_members(pool)
        placement = best_fit(self._measured(phase, items)[1], self.objective.row_lengths)
        members = np.argsort(placement.rows, kind="stable")
        starts = np.searchsorted(placement.rows[members], np.arange(placement.num_rows + 1))
        return _Plan(items, placement, members, starts, placement.num_rows)


class _Plan(NamedTuple):
    """A packed pool: row r holds items[members[starts[r]:starts[r + 1]]]."""

    items: np.ndarray
    placement: Placement
    members: np.ndarray
    starts: np.ndarray
    num_rows: int
