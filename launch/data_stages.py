"""The stages of `meshway bench data` on meshway's side, each timed a slice at a time, so that they can be interleaved.

Where seqio does the same work, its stage is in `bench_seqio.py`.
"""

import abc
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from meshway.framework.data.objective import Items, Objective
from meshway.framework.data.prefetch import Prefetcher, prefetch
from meshway.framework.data.rows.examples import Examples, InMemory
from meshway.framework.data.rows.packing import best_fit
from meshway.framework.data.rows.row_source import POOL_ITEMS
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import Dataset
from meshway.framework.interfaces import Batch

_READ_AT_ONCE = 256  # examples; about what the rows of a batch hold
_TOKENS = ("encoder_input_tokens", "decoder_target_tokens")


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one slice did.

    Attributes:
      seconds: how long it took.
      counts: how much was done in it: examples, tokens, batches, megabytes.
      density: row feature -> share of a packed row's tokens that are an item's.
    """

    seconds: float
    counts: Mapping[str, float]
    density: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Stage(abc.ABC):
    """Work that can be timed again and again.

    Attributes:
      name: what the table calls it.
      share: of the time, relative to the other stages'.
    """

    name: str
    share = 1.0

    @abc.abstractmethod
    def once(self, seconds: float) -> Sample:
        """Works for about so many seconds, or for one unit of work where that takes longer."""


def repeated(work: Callable[[], Mapping[str, float]], seconds: float) -> Sample:
    """Repeats `work`, which returns what it did, until so many seconds have passed."""
    counts: dict[str, float] = {}
    begin = time.perf_counter()
    while True:
        for name, count in work().items():
            counts[name] = counts.get(name, 0) + count
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return Sample(passed, counts)


class Reading(Stage):
    """Reads random examples of cached tasks, as the loader does: about a batch's at once, in the order of shards."""

    name = "read"

    def __init__(self, tasks: Sequence[Examples]) -> None:
        self._tasks = [task for task in tasks if len(task)]
        self._random = np.random.default_rng(0)

    def once(self, seconds: float) -> Sample:
        return repeated(self._read, seconds)

    def _read(self) -> dict[str, float]:
        examples = self._tasks[int(self._random.integers(len(self._tasks)))]
        indices = np.sort(self._random.integers(len(examples), size=_READ_AT_ONCE))
        found = examples.read(indices)
        tokens = sum(int(column[indices].sum()) for column in examples.sizes.values())
        return {"examples": len(found), "tokens": tokens}


class Planning(Stage):
    """Packs one pool of a task's items, from their sizes alone."""

    share = 0.5

    def __init__(self, name: str, objective: Objective, examples: Examples) -> None:
        self.name = name
        self._objective = objective
        self._items = some_items(objective, examples.sizes, POOL_ITEMS)
        self._sizes = {name: np.asarray(column)[self._items.index] for name, column in examples.sizes.items()}

    def once(self, seconds: float) -> Sample:
        measured = self._objective.measure(self._sizes, self._items)
        rows = best_fit(measured, self._objective.row_lengths).num_rows
        tokens = {name: int(column.sum()) for name, column in measured.items()}

        def plan() -> dict[str, float]:
            best_fit(self._objective.measure(self._sizes, self._items), self._objective.row_lengths)
            return {"examples": len(self._items.index), "tokens": sum(tokens.values())}

        sample = repeated(plan, seconds)
        return dataclasses.replace(sample, density=densities(tokens, self._objective.row_lengths, rows))


class Packing(Stage):
    """Packs examples held in memory: plans their rows, converts each, lays them out as a model reads them.

    Args:
      name: what the table calls it.
      objective: the task's.
      examples: what to pack, all at once.
    """

    def __init__(self, name: str, objective: Objective, examples: InMemory) -> None:
        self.name = name
        self._objective = objective
        self._examples = examples
        self._items = some_items(objective, examples.sizes, None)
        self._density: dict[str, float] = {}

    @property
    def converted(self) -> list[dict[str, np.ndarray]]:
        """The items it packs: row features, as long as rows allow."""
        examples = self._examples.read(self._items.index)
        columns = zip(examples, *(column.tolist() for column in self._items), strict=True)
        return [self._objective.convert(e, i, part, epoch, i) for e, i, part, epoch in columns]

    def once(self, seconds: float) -> Sample:
        sample = repeated(self._pack, seconds)
        return dataclasses.replace(sample, density=self._density)

    def _pack(self) -> dict[str, float]:
        sizes = {name: column[self._items.index] for name, column in self._examples.sizes.items()}
        measured = self._objective.measure(sizes, self._items)
        placement = best_fit(measured, self._objective.row_lengths)
        converted = self.converted
        self._objective.lay(converted, placement)
        tokens = {name: int(column.sum()) for name, column in measured.items()}
        self._density = densities(tokens, self._objective.row_lengths, placement.num_rows)
        return {"examples": len(converted), "tokens": sum(tokens.values())}


class Loading(Stage):
    """The loader as training reads it: batches made ahead by a thread, or by processes behind it.

    Args:
      name: what the table calls it.
      open_stream: () -> the training stream.
      workers: how many processes it has.
    """

    share = 1.5

    def __init__(self, name: str, open_stream: Callable[[], Dataset], workers: int) -> None:
        self.name = name
        self._open = open_stream
        self._ready = 4 + 4 * workers  # at most so many batches were made while other stages ran
        self._batches: Prefetcher | None = None

    def once(self, seconds: float) -> Sample:
        if self._batches is None:
            self._batches = prefetch(self._open())
        for _ in range(self._ready):
            next(self._batches)
        return timed_batches((batch for batch, _ in self._batches), seconds)

    def close(self) -> None:
        """Stops the thread; the processes stop with the stream."""
        if self._batches is not None:
            self._batches.close()
        self._batches = None


class Seeking(Stage):
    """From nothing to a batch far down the stream: opens it, plans, seeks, reads."""

    name = "seek"
    share = 0.5

    def __init__(self, open_stream: Callable[[], RowStream], batch: int) -> None:
        self._open = open_stream
        self._batch = batch

    def once(self, seconds: float) -> Sample:
        begin = time.perf_counter()
        stream = self._open()
        stream.seek(self._batch)
        next(stream)
        return Sample(time.perf_counter() - begin, {})


def timed_batches(batches: Iterator[Batch], seconds: float) -> Sample:
    """Takes batches for so many seconds, at least one, and counts what they hold."""

    def take() -> dict[str, float]:
        return {"batches": 1, **batch_counts(next(batches))}

    return repeated(take, seconds)


def batch_counts(batch: Batch) -> dict[str, float]:
    """Returns the examples and tokens in a batch of either side's rows.

    Tokens are told by segment ids, where there are none by being other than 0; rows without tokens hold one
    example each.
    """
    segments = [array for name, array in batch.items() if name.endswith("_segment_ids")]
    if segments:
        examples = np.max([array.max(axis=1) for array in segments], axis=0).sum()
    else:
        examples = len(next(iter(batch.values())))
    counted = segments or [batch[name] for name in _TOKENS if name in batch]
    return {"examples": int(examples), "tokens": sum(int(np.count_nonzero(array)) for array in counted)}


def some_items(objective: Objective, sizes: Mapping[str, np.ndarray], limit: int | None) -> Items:
    """Returns at most `limit` items of a task's first epoch, in a random order where not all are taken."""
    parts = objective.parts(sizes)
    index = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(index)) - np.repeat(np.cumsum(parts) - parts, parts)
    if limit is not None:
        chosen = np.random.default_rng(0).permutation(len(index))[:limit]
        index, part = index[chosen], part[chosen]
    return Items(index, part, np.zeros(len(index), np.int64))


def densities(tokens: Mapping[str, int], lengths: Mapping[str, int], rows: int) -> dict[str, float]:
    """Returns row feature -> the share of `rows` rows that its tokens fill."""
    return {name: tokens[name] / max(1, rows * length) for name, length in lengths.items()}


def log_normal(lengths: Mapping[str, int], count: int) -> InMemory:
    """Returns examples of random tokens with log-normal lengths, cut off at `lengths`.

    The first feature has a median of 148 tokens, each further one a seventh of that; sigma is 0.8.
    """
    random = np.random.default_rng(0)
    columns = {}
    for place, (name, length) in enumerate(lengths.items()):
        sizes = np.clip(random.lognormal(5 - 2 * place, 0.8, count), 1, length).astype(int)
        columns[name] = np.split(random.integers(1, 1000, sizes.sum(), dtype=np.int32), np.cumsum(sizes)[:-1])
    return InMemory([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
