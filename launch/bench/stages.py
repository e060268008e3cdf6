"""The stages of `meshway bench data`, each timed a slice at a time, so that they can be interleaved.

First meshway's; then seqio's, which do the same work as a user of seqio would have it done. Only these import seqio and
TensorFlow, inside functions.
"""

import abc
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_adapter
from meshway.framework.data.features import EncoderDecoderRows, JoinedRows, LanguageModelRows
from meshway.framework.data.objective import Items, Objective
from meshway.framework.data.prefetch import Prefetcher, prefetch
from meshway.framework.data.rows.examples import Examples, InMemory
from meshway.framework.data.rows.packing import Example, best_fit
from meshway.framework.data.rows.row_source import POOL_ITEMS
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import Dataset
from meshway.framework.data.windowed_text import WindowedText
from meshway.framework.interfaces import Batch

_READ_AT_ONCE = 256  # examples; about what the rows of a batch hold
_TOKENS = ("encoder_input_tokens", "decoder_target_tokens")
_SHUFFLE_BUFFER = 1000  # seqio's own
_CONVERTERS: dict[type, str] = {
    EncoderDecoderRows: "EncDecFeatureConverter",
    LanguageModelRows: "LMFeatureConverter",
    JoinedRows: "PrefixLMFeatureConverter",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one slice did.

    Attributes:
      seconds: how long it took.
      counts: how much was done in it: examples, tokens, batches, megabytes.
      density: row feature -> share of a packed row's tokens that are an item's.
      core_seconds: processor time of it, 0 where that is not measured.
    """

    seconds: float
    counts: Mapping[str, float]
    density: Mapping[str, float] = dataclasses.field(default_factory=dict)
    core_seconds: float = 0.0


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

    Tokens are those with a segment id, or, without segment ids, those other than 0; rows without tokens hold one
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
    """Returns examples of random tokens with log-normal lengths, at most `lengths`.

    The first feature has a median of 148 tokens, each further one a seventh of that; sigma is 0.8.
    """
    random = np.random.default_rng(0)
    columns = {}
    for place, (name, length) in enumerate(lengths.items()):
        sizes = np.clip(random.lognormal(5 - 2 * place, 0.8, count), 1, length).astype(int)
        columns[name] = np.split(random.integers(1, 1000, sizes.sum(), dtype=np.int32), np.cumsum(sizes)[:-1])
    return InMemory([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])


def twin(objective: Objective, sizes: Mapping[str, np.ndarray]) -> str | None:
    """Returns the name of the seqio feature converter that does the same with these examples; None if none does.

    An objective that corrupts text as it is read has no twin, but passes examples with inputs on as they are.
    """
    if isinstance(objective, WindowedText):
        if not objective.has_inputs or not np.all(sizes["inputs"]):
            return None
        objective = objective.pairs
    rows = getattr(objective, "rows", None)
    beyond = getattr(rows, "weighted", False) or not getattr(rows, "prefix", True)
    return None if beyond else _CONVERTERS.get(type(rows))


class SeqioPacking(Stage):
    """`seqio.utils.trim_and_pack_dataset` over items held in memory, its rows handed to numpy in batches.

    Args:
      name: what the table calls it.
      items: row features of each item.
      lengths: tokens of a row, by row feature.
      batch_size: rows handed over at a time.
    """

    share = 2.0

    def __init__(self, name: str, items: Sequence[Example], lengths: Mapping[str, int], batch_size: int) -> None:
        self.name = name
        self._lengths = dict(lengths)
        self._count = len(items)
        seqio = seqio_adapter.import_seqio()
        with seqio_adapter.task_errors(name, "packing"):
            dataset = seqio.utils.trim_and_pack_dataset(_in_memory(items, self._lengths), self._lengths, False)
            self._dataset = dataset.batch(batch_size)

    def once(self, seconds: float) -> Sample:
        """Packs all items once; a pass takes as long as it takes."""
        with seqio_adapter.task_errors(self.name, "packing"):
            begin = time.perf_counter()
            batches = list(self._dataset.as_numpy_iterator())
            passed = time.perf_counter() - begin
        tokens = {name: sum(int(np.count_nonzero(batch[name])) for batch in batches) for name in self._lengths}
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        counts = {"examples": self._count, "tokens": sum(tokens.values())}
        return Sample(passed, counts, densities(tokens, self._lengths, rows))


class SeqioLoading(Stage):
    """A seqio pipeline to numpy batches. Each slice starts it anew, lets it settle, and then times it.

    Kept between slices, it would fill its buffers while other stages are timed.

    Args:
      name: what the table calls it.
      dataset: of batches, without end.
    """

    share = 3.0

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset

    def once(self, seconds: float) -> Sample:
        with seqio_adapter.task_errors(self.name, "reading"):
            batches: Iterator[Batch] = self._dataset.as_numpy_iterator()
            next(batches)
            timed_batches(batches, seconds / 3)  # it comes in bursts, and begins with one
            return timed_batches(batches, seconds)


def pipeline(
    name: str, split: str, lengths: Mapping[str, int], converter: str, pack: bool, batch_size: int, seed: int
) -> Any:
    """Returns the batches that seqio makes of a registered task or mixture, read from its own source, shuffled.

    Raises:
      UserError: seqio cannot.
    """
    seqio = seqio_adapter.import_seqio()
    with seqio_adapter.task_errors(name, "seqio's pipeline"), seqio_adapter.seqio_lock, _quiet():
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            dict(lengths),
            split,
            shuffle=True,
            num_epochs=None,
            seed=seed,
            try_in_mem_cache=False,  # a slice ends before such a cache is full
        )
        return getattr(seqio, converter)(pack=pack)(dataset, dict(lengths)).batch(batch_size, drop_remainder=True)


def pipeline_from_memory(
    examples: Sequence[Example], lengths: Mapping[str, int], converter: str, pack: bool, batch_size: int, seed: int
) -> Any:
    """Returns the batches that seqio makes of prepared examples held in memory, shuffled in a buffer as seqio does.

    Raises:
      UserError: seqio cannot.
    """
    seqio = seqio_adapter.import_seqio()
    with seqio_adapter.task_errors("in memory", "seqio's pipeline"), _quiet():
        dataset = _in_memory(examples, lengths).repeat().shuffle(_SHUFFLE_BUFFER, seed=seed)
        dataset = seqio.utils.trim_dataset(dataset, dict(lengths), dict(lengths))
        return getattr(seqio, converter)(pack=pack)(dataset, dict(lengths)).batch(batch_size, drop_remainder=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences seqio's notes on uncached sources and on features that are left out."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _in_memory(examples: Sequence[Example], features: Mapping[str, Any]) -> Any:
    """Returns a dataset of some features of examples, kept in TensorFlow's memory from the first pass on."""
    import tensorflow as tf

    spec = {name: tf.TensorSpec([None], tf.int32) for name in features}
    rows = [{name: np.asarray(example[name], np.int32) for name in features} for example in examples]
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec).cache()
    for _ in dataset:
        pass
    return dataset
