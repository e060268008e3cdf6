"""The figures of an inspection as tables of text, the same for a terminal and for a page."""

import dataclasses
from collections.abc import Iterator, Sequence

from meshway.framework.data.inspection.figures import Drawn, Inspection, Period, SourceFigures

_UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      title: its heading.
      note: what its columns mean, where that needs saying.
      head: names of columns.
      rows: their texts.
      words: how many columns, from the left, are words; the others are numbers.
    """

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def tables(inspection: Inspection) -> Iterator[Table]:
    """Yields every table that there is something to say in."""
    shapes = [[name, dtype.name, str(list(shape))] for name, (shape, dtype) in inspection.spec.items()]
    yield Table("Batch features", "", ["feature", "dtype", "shape"], shapes, words=3)
    if inspection.sources:
        yield _sources(inspection.sources)
        if any(source.lengths for source in inspection.sources):
            yield _lengths(inspection.sources)
    yield _drawn(inspection)
    if len(inspection.sources) > 1:
        for period in inspection.periods:
            yield _mixture(period, inspection)


def _sources(sources: Sequence[SourceFigures]) -> Table:
    rows = []
    for source in sources:
        items = epoch = lost = _UNKNOWN
        if source.items is not None:
            items = f"{source.items:,}"
            epoch = f"{source.items / source.items_per_row:,.0f}"
        if source.lost is not None and source.tokens:
            lost = f"{source.lost / source.tokens:.2%}"
        per_row = f"{source.items_per_row:.2f}"
        rows.append([source.name, source.split or _UNKNOWN, f"{source.examples:,}", items, per_row, epoch, lost])
    note = (
        "An item is an example, or one of the parts it is split into. Truncated is the share of all tokens that no "
        "row shows."
    )
    head = ["source", "split", "examples", "items an epoch", "items a row", "rows an epoch", "truncated"]
    return Table("Sources", note, head, rows, words=2)


def _lengths(sources: Sequence[SourceFigures]) -> Table:
    rows = []
    for source in sources:
        for lengths in source.lengths:
            numbers = [lengths.quantile(0.5), lengths.quantile(0.95), lengths.largest, lengths.total]
            cut = _UNKNOWN if lengths.cut_at is None else f"{lengths.cut_at:,}"
            figures = [f"{lengths.mean:,.1f}", *(f"{number:,}" for number in numbers), cut]
            rows.append([source.name, lengths.feature, *figures])
    note = "Of every example, before anything is cut off."
    head = ["source", "feature", "mean", "p50", "p95", "max", "total", "cut at"]
    return Table("Tokens of an example", note, head, rows, words=2)


def _drawn(inspection: Inspection) -> Table:
    total = inspection.total
    named = dict(inspection.drawn) if len(inspection.drawn) > 1 else {}
    rows = [_drawn_row(name, drawn, total) for name, drawn in {**named, "all": total}.items()]
    head = ["source", "rows", "items", "items a row"]
    head += [f"{side} density" for side in total.filled] + [f"{side} loss" for side in total.loss]
    count = "The first batch" if inspection.batches == 1 else f"The first {inspection.batches:,} batches"
    note = "Density is the share of a row that is no padding, loss the share that carries loss." if total.filled else ""
    return Table(count, note, head, rows)


def _drawn_row(name: str, drawn: Drawn, total: Drawn) -> list[str]:
    per_row = f"{drawn.items / drawn.rows:.2f}" if drawn.rows else _UNKNOWN
    cells = [name, f"{drawn.rows:,}", f"{drawn.items:,}", per_row]
    shares = [drawn.filled.get(side, (0, 0)) for side in total.filled]
    shares += [drawn.loss.get(side, (0, 0)) for side in total.loss]
    return cells + [f"{part / whole:.1%}" if whole else _UNKNOWN for part, whole in shares]


def _mixture(period: Period, inspection: Inspection) -> Table:
    items, rows = (sum(share.simulated[kind] for share in period.shares) for kind in (0, 1))
    is_only = len(inspection.periods) == 1
    is_drawn = is_only or (period.first == 0 and inspection.batches <= period.batches)
    lines = []
    for share in period.shares:
        simulated = share.simulated[0] / items, share.simulated[1] / rows
        pairs = zip(share.asked, simulated, strict=True)
        cells = [f"{number:.2%}" for pair in pairs for number in pair]
        if is_drawn:
            drawn = inspection.drawn[share.source]
            cells += [f"{drawn.items / inspection.total.items:.1%}", f"{drawn.rows / inspection.total.rows:.1%}"]
        lines.append([share.source, f"{share.rate:g}", *cells])
    head = ["source", "rate", "items asked", "items dealt", "rows asked", "rows dealt"]
    note = (
        f"Rates count items. Dealt is what {rows:,} rows ({period.batches:,} batches) hold, items by how many "
        "a row of the source holds on average."
    )
    if is_drawn:
        head += ["items drawn", "rows drawn"]
        note += " Drawn is what the batches above hold."
    title = "Mixture" if is_only else f"Mixture from step {period.first:,} on"
    return Table(title, note, head, lines)
