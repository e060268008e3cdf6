"""The batches of a run over one or several row sources: batch i is a pure function of (recipe, seed, i)."""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from meshway.framework.data.objective import Spec
from meshway.framework.data.rows.examples import Examples
from meshway.framework.data.rows.mixing import Interleaving, Rates, key_of, periods
from meshway.framework.data.rows.packing import Arrays
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch


class Source(Protocol):
    """Endless rows by number: a `RowSource` or an `OnlineSource`.

    Attributes:
      name: the task.
      examples: what it reads.
    """

    name: str
    examples: Examples

    @property
    def items_per_row(self) -> float: ...

    def prepare(self, number: int) -> None: ...

    def take(self, numbers: np.ndarray) -> tuple[Arrays, int]: ...

    def state(self, number: int) -> dict[str, int]: ...

    def restore(self, number: int, state: Mapping[str, int]) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Period:
    """Batches drawn at the same rates: from batch `batch` and row `row` on, after `taken` rows of each source."""

    batch: int
    row: int
    taken: np.ndarray
    interleaving: Interleaving

    def taken_before(self, row: int) -> np.ndarray:
        """Returns how many of the rows before `row` are of each source, int64 [sources].

        Rows are assigned by their number in the whole run, so that a period begun again by a restart assigns the same.
        """
        return self.taken + self.interleaving.counts(row) - self.interleaving.counts(self.row)


class RowStream:
    """The `Dataset` of a run. `position` is the number of the batch that comes next.

    Args:
      name: the task or mixture, for messages.
      sources: where rows come from.
      rates: mixing rate of each source, in examples, by name.
      changes: new rates from given steps on.
      spec: the batch features.
      batch_size: rows of a global batch.
      rows: this process's rows of each global batch.
      seed: of the run; only kept, so that a resumed run can compare.
      limit: rows after which the stream ends, the last batch being completed with rows of zeros; None for no end.

    Attributes:
      sources: where rows come from.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        rates: Mapping[str, float],
        changes: Sequence[Rates],
        spec: Spec,
        batch_size: int,
        rows: slice,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self._name = name
        self.sources = list(sources)
        self._spec = spec
        self._batch_size = batch_size
        self._rows = range(batch_size)[rows]
        self._seed = seed
        self._limit = limit
        self._rates = periods([source.name for source in sources], rates, changes)
        self.position = 0
        self._periods = self._schedule(0, 0, np.zeros(len(sources), np.int64))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def seek(self, batch: int) -> None:
        """Makes `batch` the number of the next batch, reading nothing."""
        self.position = batch

    def prepare(self) -> None:
        """Makes the next batch quick to find, here and in processes that this stream is sent to."""
        for source, count in zip(self.sources, self.drawn(self.position).values(), strict=True):
            source.prepare(count)

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Returns this process's rows of batch `number`; raises StopIteration past the limit."""
        first = self._row_of(number)
        mine = first + np.array(self._rows, np.int64)
        if self._limit is not None:
            if first >= self._limit:
                raise StopIteration
            mine = mine[mine < self._limit]
        result = {name: np.zeros((len(self._rows), *shape[1:]), dtype) for name, (shape, dtype) in self._spec.items()}
        for source, (places, numbers) in zip(self.sources, self._assign(number, mine), strict=True):
            if not len(places):
                continue
            arrays, _ = source.take(numbers)
            if set(arrays) != set(result):
                raise UserError(f"the converter's rows have {sorted(arrays)}, its spec {sorted(result)}")
            for name, array in arrays.items():
                result[name][places] = array
        return result

    def drawn(self, batch: int) -> dict[str, int]:
        """Returns how many rows of each source the batches before number `batch` hold, over all processes."""
        return dict(zip((s.name for s in self.sources), self._taken(batch, self._row_of(batch)).tolist(), strict=True))

    def origins(self, batch: int) -> np.ndarray:
        """Returns which of `sources` each row of batch number `batch` comes from, int64 [batch_size]."""
        return self._period(batch).interleaving.sources(self._row_of(batch), self._batch_size)

    @property
    def rates(self) -> list[tuple[int, np.ndarray]]:
        """(first batch, rate of each of `sources`) of each period of the recipe, in order."""
        return list(self._rates)

    def state(self) -> dict[str, int]:
        """Returns the position: batches and rows drawn, the seed, and of each source the rows drawn and of what."""
        result = {"batch": self.position, "rows": self._row_of(self.position), "seed": self._seed}
        for name, count in self.drawn(self.position).items():
            result[f"{name}.rows"] = count
        for source in self.sources:
            extra = _span(source) | source.state(result[f"{source.name}.rows"])
            result |= {f"{source.name}.{key}": value for key, value in extra.items()}
        return result

    def restore(self, state: Mapping[str, int]) -> None:
        """Continues from a position, on any process count, mesh and batch size.

        Each source continues after the rows taken from it. If the recipe's rates would not have led to those counts
        (they were edited since), its rates hold from here on.

        Raises:
          UserError: the position is of other data, or of another seed.
        """
        missing = [key for key in ("batch", "rows", "seed") if key not in state]
        known = {f"{source.name}.rows" for source in self.sources}
        saved = {key for key in state if key.endswith(".rows")}
        if missing or not saved & known:
            raise UserError(
                f"the saved data position does not fit {self._name!r}: it has {sorted(state)}, not "
                f"{sorted(known)}; was the checkpoint made with another MIXTURE_OR_TASK_NAME?"
            )
        if state["seed"] != self._seed:
            raise UserError(
                f"the saved data position is of SEED={state['seed']}, this run's is {self._seed}: the order would be "
                "another; resume with the same SEED, or start a new run from the checkpoint's parameters"
            )
        self.position = int(state["batch"])
        taken = np.array([int(state.get(f"{source.name}.rows", 0)) for source in self.sources], np.int64)
        row = int(state["rows"])
        if self._row_of(self.position) != row or (self._taken(self.position, row) != taken).any() or saved - known:
            self._periods = self._schedule(self.position, row, taken)
        for source, count in zip(self.sources, taken.tolist(), strict=True):
            prefix = f"{source.name}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if count:
                _check_span(source, own)
            source.restore(count, {key: value for key, value in own.items() if key != "rows"})

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._spec)

    def _schedule(self, batch: int, row: int, taken: np.ndarray) -> list[_Period]:
        """Returns the periods from a position on."""
        result: list[_Period] = []
        starts = [step for step, _ in self._rates]
        for start, rates in self._rates[bisect.bisect_right(starts, batch) - 1 :]:
            start = max(start, batch)
            if result:
                last = result[-1]
                row = last.row + (start - last.batch) * self._batch_size
                taken = last.taken_before(row)
            # Rates count examples, a period assigns rows: fewer of a source whose rows hold more examples.
            weights = (
                list(rates)
                if len(self.sources) == 1
                else [rate and rate / source.items_per_row for rate, source in zip(rates, self.sources, strict=True)]
            )
            result.append(_Period(start, row, taken, Interleaving(np.array(weights))))
        return result

    def _period(self, batch: int) -> _Period:
        return self._periods[bisect.bisect_right([period.batch for period in self._periods], batch) - 1]

    def _row_of(self, batch: int) -> int:
        period = self._period(batch)
        return period.row + (batch - period.batch) * self._batch_size

    def _taken(self, batch: int, row: int) -> np.ndarray:
        return self._period(batch).taken_before(row)

    def _assign(self, batch: int, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each source (indices in `rows` of its rows, their numbers in the source)."""
        if not len(rows):
            return [(rows, rows)] * len(self.sources)
        taken = self._taken(batch, int(rows[0]))
        chosen = self._period(batch).interleaving.sources(int(rows[0]), len(rows))
        places = [np.flatnonzero(chosen == number) for number in range(len(self.sources))]
        return [(place, count + np.arange(len(place))) for place, count in zip(places, taken, strict=True)]


def _span(source: Source) -> dict[str, int]:
    """Returns which examples of which split a source reads, as a position holds it; {} where they are of none."""
    span = getattr(source.examples, "span", None)
    return {} if span is None else {"split": key_of(span[0]) % 2**31, "from": span[1], "to": span[2]}


def _check_span(source: Source, saved: Mapping[str, int]) -> None:
    """Raises UserError where a position counts rows of other examples of the task; older ones do not say."""
    mine = _span(source)
    if all(saved.get(key, value) == value for key, value in mine.items()):
        return
    name, start, stop = source.examples.span  # type: ignore[attr-defined]
    of = "another split" if saved["split"] != mine["split"] else f"examples {saved['from']:,} to {saved['to'] - 1:,}"
    raise UserError(
        f"task {source.name!r}: the saved data position is of {of}, and this run reads examples {start:,} to "
        f"{stop - 1:,} of split {name!r}: resume with the train_split and the cache of the run, or start a new run "
        "from its parameters (train.train.initial)"
    )
