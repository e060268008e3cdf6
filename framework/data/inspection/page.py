"""`data.html`: statistics and examples of a recipe's data on one page."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from meshway.framework.data.inspection.decoded_rows import Lane, Token, Values
from meshway.framework.data.inspection.figures import Drawn, Inspection, Lengths, Period, Sample, SourceFigures
from meshway.framework.web_page import escape, framed, numbers, table, web_page

_UNKNOWN = "-"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      title: its heading.
      note: what its columns mean, if it needs an explanation.
      head: names of columns.
      rows: their texts.
      words: how many columns, from the left, are text; the others are numbers.
    """

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def tables(inspection: Inspection) -> Iterator[Table]:
    """Yields every table that is not empty."""
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


_COLOURS = 4  # of segments, in turn; the style sheet has them
_WIDTH, _HEIGHT = 440, 150  # of a histogram
_LEGEND = (
    '<p class="muted">A colour for each segment; <b class="special">special tokens</b> in a box; where only some '
    'tokens carry loss, <b>those that do</b> and <span class="free">those that do not</span>. Point at a token '
    "for its id.</p>"
)


def page(inspection: Inspection) -> str:
    """Returns the page: the same text for the same inspection; all text in it is escaped."""
    parts = [_heading(inspection)]
    for each in tables(inspection):
        parts.append(_table(each))
        if each.title == "Tokens of an example":
            parts.append(_histograms(inspection))
    parts += _samples(inspection)
    return web_page(f"data of {inspection.name}", parts, Path(__file__).with_suffix(".css"))


def _heading(inspection: Inspection) -> str:
    notes = "".join(f'<p class="note">{escape(sentence)}</p>' for sentence in inspection.missing)
    return f"<h1>{escape(inspection.name)}</h1>\n<dl>{numbers(inspection.facts.items())}</dl>\n{notes}"


def _table(given: Table) -> str:
    columns = [(name, place >= given.words) for place, name in enumerate(given.head)]
    note = f'<p class="muted">{escape(given.note)}</p>' if given.note else ""
    return f"<h2>{escape(given.title)}</h2>\n{table(columns, given.rows)}\n{note}"


def _histograms(inspection: Inspection) -> str:
    plots = []
    for source in inspection.sources:
        for lengths in source.lengths:
            title = f"{source.name}, {lengths.feature}"
            plots.append(framed(title, _histogram(lengths)))
    return f'<div class="plots">{"".join(plots)}</div>'


def _histogram(lengths: Lengths) -> str:
    """Returns an `<svg>` of bars, examples by tokens, with a line where examples are truncated."""
    counts, width = lengths.histogram()
    counts = np.pad(counts, (0, max(0, 8 - len(counts))))  # one or two bars would be as wide as the plot
    end = len(counts) * width
    step, bottom = _WIDTH / len(counts), _HEIGHT - 18
    parts = []
    for bar, count in enumerate(counts.tolist()):
        height = (bottom - 14) * count / counts.max()
        is_last = bar == len(counts) - 1 and lengths.largest >= end
        span = f"{bar * width:,} or more" if is_last else f"{bar * width:,} to {(bar + 1) * width - 1:,}"
        if width == 1 and not is_last:
            span = f"{bar:,}"
        place = f'x="{bar * step + 0.5:.1f}" y="{bottom - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}"'
        parts.append(f'<rect class="bar" {place}><title>{span} tokens: {count:,} examples</title></rect>')
    if lengths.cut_at is not None and lengths.cut_at < len(counts) * width:
        at = lengths.cut_at / width * step
        side = "end" if at > _WIDTH / 2 else "start"
        x = at - 4 if side == "end" else at + 4
        parts.append(f'<line class="cut" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="cut" x="{x:.1f}" y="10" text-anchor="{side}">cut at {lengths.cut_at:,}</text>')
    parts.append(f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{bottom}" y2="{bottom}"/>')
    labels = ("0", f"{end // 2:,}", f"{end - width:,} or more" if lengths.largest >= end else f"{end:,} tokens")
    for x, side, label in zip((0, _WIDTH // 2, _WIDTH), ("start", "middle", "end"), labels, strict=True):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 4}" text-anchor="{side}">{label}</text>')
    return f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'


def _samples(inspection: Inspection) -> Iterator[str]:
    if not inspection.samples:
        return
    yield "<h2>Rows, as the model sees them</h2>"
    if any(row.lanes for sample in inspection.samples for row in sample.rows):
        yield _LEGEND
    for sample in inspection.samples:
        yield from _rows(sample)


def _rows(sample: Sample) -> Iterator[str]:
    for number, row in enumerate(sample.rows):
        yield f"<h3>{escape(f'{sample.source}, ' if sample.source else '')}row {number}</h3>"
        for lane in row.lanes:
            yield _lane(lane)
        for values in row.values:
            yield _values(values)


def _lane(lane: Lane) -> str:
    parts = []
    segment = 0
    for token in lane.tokens:
        if token.segment != segment:
            parts.append(f'{"</span>" if segment else ""}<span class="s{(token.segment - 1) % _COLOURS}">')
            parts.append(f"<sup>{token.segment}</sup>")
            segment = token.segment
        parts.append(_token(token, lane.is_mixed))
    if segment:
        parts.append("</span>")
    left = lane.length - lane.filled
    padding = f'<span class="padding">{left:,} of padding</span>' if left else ""
    segments = "1 segment" if lane.segments == 1 else f"{lane.segments} segments"
    about = f"{lane.filled:,} of {lane.length:,} tokens, {segments}"
    title = f"<h4>{escape(lane.title)} <span>{about}</span></h4>"
    return f'{title}<pre class="lane">{"".join(parts)}{padding}</pre>'


def _token(token: Token, is_mixed: bool) -> str:
    text = (
        escape(token.text).replace("\n", '<i class="mark">\u21b5</i>\n').replace("\t", '<i class="mark">\u21e5</i>\t')
    )
    classes = ["special"] if token.special else []
    if is_mixed:
        classes.append("loss" if token.weight else "free")
    kind = f' class="{" ".join(classes)}"' if classes else ""
    return f'<b{kind} title="{" ".join(map(str, token.ids))}">{text}</b>'


def _values(values: Values) -> str:
    if not values.is_picture:
        return f"<h4>{escape(values.name)} <span>{escape(values.text)}</span></h4>"
    pixels = values.picture()
    size = max(2, 128 // max(pixels.shape[:2]))
    cells = [
        f'<rect x="{x * size}" y="{y * size}" width="{size}" height="{size}" fill="rgb({r},{g},{b})"/>'
        for y, line in enumerate(pixels.tolist())
        for x, (r, g, b) in enumerate(line)
    ]
    height, width = (side * size for side in pixels.shape[:2])
    shape = f"{values.array.dtype.name} {list(values.array.shape)}"
    svg = f'<svg class="picture" role="img" width="{width}" height="{height}">{"".join(cells)}</svg>'
    return f"<h4>{escape(values.name)} <span>{escape(shape)}</span></h4>{svg}"
