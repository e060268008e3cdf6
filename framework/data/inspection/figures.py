"""Statistics of a run's data: of its sources, its first batches and its mixture, with some of its rows.

Everything is read as training reads it, through `DataSource.train`. A cache has the sizes of all its examples; for any
other stream the statistics cover only the batches drawn.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.cache.format import CachedSplit
from meshway.framework.data.inspection.decoded_rows import (
    DecodedRow,
    SpecialTokenCounts,
    decode_rows,
    reads_special_tokens,
    sampled,
    segments,
    sentence,
    sides,
)
from meshway.framework.data.objective import Spec
from meshway.framework.data.rows.examples import Stepped
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream, Source
from meshway.framework.data.source import Dataset, DataSource
from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import UserError

SIMULATED_ROWS = 100_000
_BARS = 40  # of a histogram


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths of one feature of a source's examples, before truncation.

    Attributes:
      feature: the task's feature.
      sizes: tokens of every example, integers [examples].
      cut_at: tokens to which an example is truncated; None if it is not.
    """

    feature: str
    sizes: np.ndarray
    cut_at: int | None

    @property
    def total(self) -> int:
        """All its tokens."""
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def mean(self) -> float:
        """Mean tokens of an example."""
        return self.total / len(self.sizes)

    @functools.cached_property
    def largest(self) -> int:
        """Tokens of the longest example."""
        return int(self.sizes.max())

    def quantile(self, share: float) -> int:
        """Returns the smallest length that `share` of the examples do not exceed."""
        return int(np.quantile(self.sizes, share, method="inverted_cdf"))

    def histogram(self) -> tuple[np.ndarray, int]:
        """Returns (examples by length [bars], tokens that a bar spans); the last bar includes all longer examples."""
        width = max(1, -(-max(self.quantile(0.99), 1) // _BARS))
        bars = np.minimum(self.sizes // width, _BARS)
        return np.bincount(bars), width


@dataclasses.dataclass(frozen=True)
class SourceFigures:
    """Statistics of one task.

    Attributes:
      name: the task.
      split: the split that is read, "" if it is not known.
      examples: how many there are.
      lengths: of each feature of tokens that is read.
      items: number of items per epoch, as an example may be split or skipped; None if it is known only after reading.
      items_per_row: how many of them a row holds on average.
      lost: tokens of an epoch that are in no row, truncated or skipped; None if it is known only after reading.
    """

    name: str
    split: str
    examples: int
    lengths: Sequence[Lengths]
    items: int | None
    items_per_row: float
    lost: int | None

    @property
    def tokens(self) -> int:
        """Tokens of an epoch, of all features."""
        return sum(lengths.total for lengths in self.lengths)


@dataclasses.dataclass
class Drawn:
    """Statistics of the rows that were drawn.

    Attributes:
      rows: how many.
      items: the items in them, not counting items without tokens at the end of a row.
      filled: side ('encoder', 'decoder') -> (tokens that are not padding, tokens that fit).
      loss: side -> (tokens with a loss weight, tokens that fit); only for sides with loss weights.
    """

    rows: int = 0
    items: int = 0
    filled: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    loss: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Adds rows, features [rows, ...] by name."""
        count = len(next(iter(rows.values())))
        if not count:
            return
        items = np.ones(count, np.int64)
        for side in sides(rows):
            segments, weights = rows.get(f"{side}_segment_ids"), rows.get(f"{side}_loss_weights")
            if segments is not None:
                items = np.maximum(items, segments.max(axis=1))
                _count(self.filled, side, segments)
            if weights is not None:
                _count(self.loss, side, weights)
        self.rows += count
        self.items += int(items.sum())


@dataclasses.dataclass(frozen=True)
class Share:
    """One source's share of a mixture: as the rates demand it, and as rows are assigned.

    Attributes:
      rate: its rate in the recipe.
      asked: (share of all items, share of all rows) by the rates.
      simulated: (items, rows) in the first `Period.batches` batches; items are rows times its mean items per row.
    """

    source: str
    rate: float
    asked: tuple[float, float]
    simulated: tuple[float, int]


@dataclasses.dataclass(frozen=True)
class Period:
    """Batches drawn at the same rates: shares are counted over `batches` batches from number `first` on."""

    first: int
    batches: int
    shares: Sequence[Share]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows to show: the first ones of a source, or of the run if the sources of rows are not known."""

    source: str
    rows: Sequence[DecodedRow]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect`.

    Attributes:
      name: the task or mixture.
      facts: facts from the recipe, by heading.
      spec: the batch features.
      batches: how many were drawn.
      total: statistics of all drawn rows.
      drawn: the same by source; {} if the stream does not name its sources.
      sources: the tasks it reads; () if the stream does not name its sources.
      periods: the shares of a mixture's sources.
      samples: rows to show.
      missing: a sentence for each thing that is not known.
    """

    name: str
    facts: Mapping[str, str]
    spec: Spec
    batches: int
    total: Drawn
    drawn: Mapping[str, Drawn]
    sources: Sequence[SourceFigures]
    periods: Sequence[Period]
    samples: Sequence[Sample]
    missing: Sequence[str]


def inspect(data: DataSource, batches: int = 20, rows: int = 3) -> Inspection:
    """Returns statistics of a run's data, drawing its first batches; the model is not needed.

    Args:
      data: the recipe's data source.
      batches: how many to draw.
      rows: how many to show of each source.

    Raises:
      UserError: the data cannot be opened, as for training, or `batches` is not at least 1.
    """
    if batches < 1:
        raise UserError(f"an inspection draws at least 1 batch, not {batches}")
    dataset = data.train(slice(0, data.batch_size))
    stream: Any = getattr(dataset, "stream", dataset)  # worker processes do not pay off for a few batches
    vocabularies = data.vocabularies()
    name = str(getattr(data, "name", type(data).__name__))
    known = (name, _facts(data, stream, vocabularies), dataset.spec(), batches)
    if isinstance(stream, RowStream):
        return _of_sources(stream, known, data, rows, vocabularies)
    return _of_batches(dataset, known, type(data).__name__, rows, vocabularies)


def _of_sources(
    stream: RowStream,
    known: tuple[str, dict[str, str], Spec, int],
    data: DataSource,
    rows: int,
    vocabularies: Mapping[str, Vocabulary],
) -> Inspection:
    """Returns the inspection of a stream that names the source of each row."""
    total, drawn = Drawn(), {source.name: Drawn() for source in stream.sources}
    written = {source.name: SpecialTokenCounts() for source in stream.sources}
    reads = reads_special_tokens(vocabularies)
    for number in range(known[-1]):
        batch, origins = stream.batch(number), stream.origins(number)
        total.add(batch)
        for place, source in enumerate(stream.sources):
            of_source = {name: array[origins == place] for name, array in batch.items()}
            drawn[source.name].add(of_source)
            if reads and not isinstance(source, RowSource):  # its examples may not be tokens yet
                written[source.name].add(segments(of_source), vocabularies)
    if reads:
        for source in stream.sources:
            if isinstance(source, RowSource):
                written[source.name].add(sampled(source.examples), vocabularies)
        known[1]["special tokens"] = sentence(written)
    sources = [_figures(source, data.lengths) for source in stream.sources]
    samples = []
    for source in stream.sources if rows else ():
        samples.append(Sample(source.name, decode_rows(source.take(np.arange(rows))[0], vocabularies)))
    missing = [
        f"Steps of {figures.name} after its cache run in TensorFlow when it is read: the lengths shown are those in "
        "the cache, and what is cut off is not known."
        for figures in sources
        if figures.lost is None
    ]
    return Inspection(*known, total, drawn, sources, _periods(stream, data.batch_size), samples, missing)


def _of_batches(
    dataset: Dataset,
    known: tuple[str, dict[str, str], Spec, int],
    kind: str,
    rows: int,
    vocabularies: Mapping[str, Vocabulary],
) -> Inspection:
    """Returns the inspection of any other stream, from the drawn rows only."""
    total, written = Drawn(), SpecialTokenCounts()
    shown: list[DecodedRow] = []
    reads = reads_special_tokens(vocabularies)
    for batch in itertools.islice(dataset, known[-1]):
        total.add(batch)
        if reads:
            written.add(segments(batch), vocabularies)
        if (wanted := rows - len(shown)) > 0:
            shown += decode_rows({name: array[:wanted] for name, array in batch.items()}, vocabularies)
    if reads:
        known[1]["special tokens"] = sentence({"": written})
    missing = (
        f"{kind} tells neither the sizes of all examples nor which task a row is from: every figure is of the "
        "batches drawn, and the shares of a mixture are not known."
    )
    return Inspection(*known, total, {}, [], [], [Sample("", shown)] if shown else [], [missing])


def _count(counts: dict[str, tuple[int, int]], side: str, array: np.ndarray) -> None:
    """Adds the number of an array's elements that are not 0, and of all its elements."""
    some, every = counts.get(side, (0, 0))
    counts[side] = some + int(np.count_nonzero(array)), every + array.size


def _figures(source: Source, lengths: Mapping[str, int]) -> SourceFigures:
    examples = source.examples
    whole = examples.whole if isinstance(examples, Stepped) else examples.sizes
    split = _cached(source)
    kept = source if isinstance(source, RowSource) else None
    lost: int | None = None
    trims: Mapping[str, int] = {}
    if kept:
        trims = kept.objective.trims
        lost = int(np.sum(kept.objective.lost(examples.sizes))) if kept.objective.row_lengths else 0
        lost += int(examples.lost.sum()) if isinstance(examples, Stepped) else 0
    return SourceFigures(
        source.name,
        split.split if split else "",
        len(examples),
        [Lengths(name, whole[name], trims.get(name)) for name in lengths if name in whole and whole[name].any()],
        kept.items_per_epoch if kept else None,
        source.items_per_row,
        lost,
    )


def _cached(source: Source) -> CachedSplit | None:
    examples = source.examples
    inner = examples.examples if isinstance(examples, Stepped) else examples
    return inner if isinstance(inner, CachedSplit) else None


def _periods(stream: RowStream, batch_size: int) -> list[Period]:
    """Returns the shares of each period, over `SIMULATED_ROWS` rows or all rows if it has fewer."""
    per_row = np.array([source.items_per_row for source in stream.sources])
    found = []
    starts = [first for first, _ in stream.rates]
    for (first, rates), following in itertools.zip_longest(stream.rates, starts[1:]):
        batches = -(-SIMULATED_ROWS // batch_size)
        if following is not None:
            batches = min(batches, following - first)
        before, after = stream.drawn(first), stream.drawn(first + batches)
        weights = rates / per_row
        shares = []
        for place, source in enumerate(stream.sources):
            rows = after[source.name] - before[source.name]
            asked = float(rates[place] / rates.sum()), float(weights[place] / weights.sum())
            shares.append(Share(source.name, float(rates[place]), asked, (rows * source.items_per_row, rows)))
        found.append(Period(first, batches, shares))
    return found


def _facts(data: DataSource, stream: Any, vocabularies: Mapping[str, Vocabulary]) -> dict[str, str]:
    """Returns the facts that are known without reading examples, by heading."""
    facts = {"read by": type(data).__name__}
    if isinstance(stream, RowStream):
        folders = {str(split.directory.parent.parent) for split in map(_cached, stream.sources) if split}
        facts["cached in"] = ", ".join(sorted(folders))
    converter = getattr(data, "converter", None)
    if converter is not None:
        packed = "packed" if getattr(converter, "pack", False) else "one item a row"
        facts["converter"] = f"{type(converter).__name__}, {packed}"
    facts["lengths"] = ", ".join(f"{name} {length:,}" for name, length in data.lengths.items())
    facts["batch size"] = f"{data.batch_size:,} rows"
    texts: dict[str, list[str]] = {}
    for name, vocabulary in vocabularies.items():
        texts.setdefault(str(vocabulary), []).append(name)
    facts["vocabulary"] = "; ".join(f"{', '.join(names)}: {text}" for text, names in texts.items())
    return {name: text for name, text in facts.items() if text}
