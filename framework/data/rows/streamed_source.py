"""The endless rows of a task that can only be read in order, from its beginning, pass after pass.

Its examples become rows a buffer at a time. A buffer holds examples of one pass alone, so that whatever order its rows
take, each pass is over before the next begins: no example comes a second time before all have come once.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from meshway.framework.data.objective import Objective
from meshway.framework.data.rows.examples import Examples, InMemory, check_ids
from meshway.framework.data.rows.online_source import InEpoch
from meshway.framework.data.rows.order import key_of
from meshway.framework.data.rows.packing import Arrays
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.errors import UserError

BUFFER = 1024  # examples packed together, at most
_FRUITLESS = 100  # buffers in a row that may give no row


class StreamedSource:
    """The rows of one task, to be taken one after the other.

    Args:
      name: the task's name.
      passes: its examples without end, None after the last of each pass.
      objective: what becomes of them.
      pack: whether rows hold several items.
      seed: of the order in a buffer and of the objective's randomness.
      vocabulary_sizes: as `RowSource` has them; an example is named by its place in its pass, as it was read.
      part: what of the task this process reads, for messages.

    Attributes:
      name: the task's name.
      examples: those of the buffer whose rows come next.
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
    ) -> None:
        self.name = name
        self.examples: Examples = InMemory([])
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
        """Returns nothing: where a stream stands cannot be kept."""
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
            self._buffers += 1
            fruitless += len(examples)
            if not self._objective.row_lengths or self._objective.parts(self.examples.sizes).any():
                objective, seed = InEpoch(self._objective, number), key_of(self._seed, self._buffers)
                return RowSource(self.name, self.examples, objective, self._pack, True, seed)
        raise UserError(f"task {self.name!r}: {fruitless:,} examples in a row were all left out by the objective")

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
