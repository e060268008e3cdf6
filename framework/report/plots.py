"""The files of a run directory, read also as a crash left them, and the parts of a report: plots as inline SVG, and
sections of them as HTML text."""

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.telemetry.timeline import Goodput, goodput, parse_line
from meshway.framework.web_page import escape, framed

Points = Sequence[tuple[int, float]]  # (step, value), steps ascending; a value may be NaN, which leaves a gap

NUM_COLOURS = 8  # the page's style sheet defines --c0 to --c7
_NUM_SHADES = 33  # between --c0 and --c4
_MAX_POINTS = 1000
# Matplotlib writes colours as hexadecimal numbers; these are placeholders for variables of the style sheet.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#0300{i:02x}" for i in range(NUM_COLOURS)]
_SHADES = [f"#0400{i:02x}" for i in range(_NUM_SHADES)]
_CSS = (
    {_INK: "var(--muted)", _GRID: "var(--line)"}
    | {colour: f"var(--c{i})" for i, colour in enumerate(_SERIES)}
    | {
        colour: f"color-mix(in oklab, var(--c4) {100 * i / (_NUM_SHADES - 1):g}%, var(--c0))"
        for i, colour in enumerate(_SHADES)
    }
)
_STYLE: Any = {  # Any: matplotlib's stubs type each name
    "svg.fonttype": "none",
    "svg.hashsalt": "meshway",
    "font.size": 8.5,
    "axes.linewidth": 0.7,
}


def line_plot(
    series: Mapping[int, Points], *, percent: bool = False, from_zero: bool = False, shaded: bool = False
) -> str:
    """Returns an `<svg>` element with lines over steps.

    Args:
      series: number of a colour -> points of a line: number i is the page's colour `--c<i modulo 8>`.
      percent: values are shares, shown in per cent.
      from_zero: the vertical axis starts at 0.
      shaded: colours are instead on a scale from the lowest to the highest number.
    """
    import matplotlib  # lazy: half a second and more, needed only for reports
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.5))
        figure.subplots_adjust(left=0.14, right=0.96, bottom=0.17, top=0.97)  # the same in every plot
        axes = figure.add_subplot()
        for number, points in series.items():
            colour = _shade(number, series) if shaded else _SERIES[number % NUM_COLOURS]
            steps, values = zip(*_thinned(points), strict=True) if points else ((), ())
            few = len(steps) <= 25
            axes.plot(steps, values, color=colour, linewidth=1.5, marker="o" if few else None, markersize=3)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_formatter(FuncFormatter(_percent if percent else _short))
        _style_axes(axes, "y")
        return _inline(figure)


def bar_plot(bars: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Returns an `<svg>` element with horizontal stacked bars of durations, from top to bottom.

    Args:
      bars: a bar's name -> (number of a colour as for `line_plot`, seconds) of its parts, from left to right.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    longest = max(sum(seconds for _, seconds in parts) for parts in bars.values())
    unit, size = next((unit for unit in _UNITS if longest >= 2 * unit[1]), _UNITS[-1])
    with matplotlib.rc_context(_STYLE):
        height = 0.6 + 0.24 * len(bars)
        figure = Figure(figsize=(9.2, height))
        figure.subplots_adjust(left=0.05, right=0.98, bottom=0.46 / height, top=1 - 0.05 / height)
        axes = figure.add_subplot()
        for row, parts in enumerate(bars.values()):
            left = 0.0
            for number, seconds in parts:
                axes.barh(row, seconds / size, left=left, height=0.66, color=_SERIES[number % NUM_COLOURS], linewidth=0)
                left += seconds / size
        axes.set_yticks(range(len(bars)), list(bars))
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, longest / size)
        axes.set_xlabel(unit, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        _style_axes(axes, "x")
        return _inline(figure)


_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def _shade(number: int, series: Mapping[int, Points]) -> str:
    fraction = (number - min(series)) / max(1, max(series) - min(series))
    return _SHADES[round(fraction * (_NUM_SHADES - 1))]


def _style_axes(axes: Any, grid: str) -> None:
    """Applies the common style of all plots."""
    axes.tick_params(colors=_INK, length=0, pad=5)
    axes.grid(axis=grid, color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)


def _short(number: float, _: int) -> str:
    """Returns a tick's label: 0.0025, 12,000, 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:,.10g}{unit}"
    return f"{number:,.10g}"


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.4g}%"


def _thinned(points: Points) -> Points:
    """Returns about a thousand points at most: the lowest and highest of each interval, so that spikes remain."""
    if len(points) <= _MAX_POINTS:
        return points
    length = math.ceil(len(points) / (_MAX_POINTS / 2))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), length):
        interval = [point for point in points[start : start + length] if math.isfinite(point[1])]
        if interval:
            kept += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return kept


def _inline(figure: Any) -> str:
    """Returns a figure as an `<svg>` element: without prologue and fixed size, in the page's colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # ids would be the same in every plot of the page
    svg = svg.replace("<svg", '<svg role="img"', 1)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    return svg


def section(title: str, plots: Sequence[str], nothing: str) -> str:
    """Returns a section with those plots that are not "" side by side, or with the sentence `nothing`."""
    shown = "\n".join(plot for plot in plots if plot)
    body = f'<div class="plots">\n{shown}\n</div>' if shown else f'<p class="muted">{nothing}</p>'
    return f"<h2>{title}</h2>\n{body}"


def figure(title: str, series: Mapping[str, Points], *, shaded: bool = False, **style: bool) -> str:
    """Returns a line plot with its title; "" if there are no finite values.

    If `series` has several lines there is a legend, and each keeps its colour from plot to plot. With `shaded`, more
    lines than there are colours get a scale of colours from the first to the last.
    """
    drawn = {
        colour: (name, points)
        for colour, (name, points) in enumerate(series.items())
        if any(math.isfinite(value) for _, value in points)
    }
    if not drawn:
        return ""
    names = {colour: name for colour, (name, _) in drawn.items()}
    shaded = shaded and len(drawn) > NUM_COLOURS
    keys = _scale(list(names.values())) if shaded else legend(names if len(series) > 1 else {})
    plot = line_plot({colour: points for colour, (_, points) in drawn.items()}, shaded=shaded, **style)
    return framed(title, plot, keys)


def legend(names: Mapping[int, str]) -> str:
    """Returns the legend of a plot, for names by number of their colour; "" if there are none."""
    keys = [
        f'<span style="--c: var(--c{colour % NUM_COLOURS})">{escape(name)}</span>' for colour, name in names.items()
    ]
    return f'<span class="keys">{"".join(keys)}</span>' if keys else ""


def _scale(names: Sequence[str]) -> str:
    """Returns the legend of a scale of colours, between the first and the last name."""
    scale = '<span class="scale" style="--c: linear-gradient(in oklab to right, var(--c0), var(--c4))"></span>'
    return f'<span class="keys">{escape(names[0])}{scale}{escape(names[-1])}</span>'


def histogram(edges: Sequence[float], counts: Sequence[float]) -> str:
    """Returns an `<svg>` of bars [bins] over `edges` [bins + 1], with their range and how many values there are."""
    if len(edges) != len(counts) + 1 or not counts:
        return ""
    width, most = (edges[-1] - edges[0]) or 1.0, max(counts) or 1
    bars = "".join(
        f'<rect x="{300 * (left - edges[0]) / width:.1f}" y="{80 - 80 * count / most:.1f}" '
        f'width="{300 * (right - left) / width:.1f}" height="{80 * count / most:.1f}" fill="var(--c0)"/>'
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True)
    )
    said = f"{sum(counts):,g} values from {edges[0]:.4g} to {edges[-1]:.4g}"
    return f'<svg role="img" viewBox="0 0 300 80" width="300">{bars}</svg><p class="muted">{said}</p>'


_MAX_TEXT = 4000  # characters shown of a text


def shown_value(value: Mapping[str, Any]) -> str:
    """Returns a text, image, sound, histogram or tensor of a metric, as `task_metrics.plain_values` has it."""
    kind = value.get("kind")
    if kind == "text":
        text = str(value.get("text", ""))
        return f"<pre>{escape(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + ' ...')}</pre>"
    if kind == "image":
        images = (escape(each) for each in _of(value.get("png"), str))
        return "".join(f'<img alt="" src="data:image/png;base64,{each}">' for each in images)
    if kind == "audio":
        sounds = (escape(each) for each in _of(value.get("wav"), str))
        return "".join(f'<audio controls src="data:audio/wav;base64,{each}"></audio>' for each in sounds)
    if kind == "histogram":
        edges, counts = (_of(value.get(name), (int, float)) for name in ("edges", "counts"))
        return histogram(*([each for each in numbers if abs(each) < 1e300] for numbers in (edges, counts)))
    said = f"{value.get('dtype')} {value.get('shape')}, in TensorBoard"
    return f"<pre>{escape(said)}</pre>"


def _of(values: Any, kind: Any) -> list[Any]:
    """Returns the members of a list that are of a kind; [] for anything else."""
    return [each for each in values if isinstance(each, kind)] if isinstance(values, list) else []


def folded(name: str, text: str) -> str:
    """Returns a text that is shown on a click."""
    return f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>"


@dataclasses.dataclass
class Run:
    """The contents of the files; `missing` has a sentence for each file that is missing or unreadable."""

    name: str
    reports: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]  # by task
    layout: list[dict[str, Any]]
    goodput: Goodput
    model_info: str
    config: str
    missing: list[str]

    def curve(self, name: str) -> Points:
        """Returns the values of a scalar by step, NaN where it is not a number."""
        return [(line["step"], number(line[name])) for line in self.reports if name in line]

    def metric(self, task: str, name: str) -> Points:
        """Returns the values of a task's metric by step."""
        lines = self.evaluations[task]
        return [(line["step"], number(metrics_of(line)[name])) for line in lines if name in metrics_of(line)]


def read_run(folder: Path) -> Run:
    """Reads everything that a report is made from. What is missing or unreadable is listed in `missing`."""
    missing: list[str] = []
    reports = _read_lines(folder / "metrics.jsonl", folder, missing)
    evaluations = {}
    for path in sorted((folder / "eval").glob("*.jsonl")):
        evaluations[path.stem] = _read_lines(path, folder, missing)
    return Run(
        name=folder.resolve().name,
        reports=reports,
        evaluations=evaluations,
        layout=_read_layout(folder / "layout.json", missing),
        goodput=_read_timeline(folder / "timeline.jsonl", missing),
        model_info=_read_text(folder / "model_info.txt", folder, missing),
        config=_read_text(folder / "config.gin", folder, missing),
        missing=missing,
    )


def number(value: Any) -> float:
    """Returns a finite float, or NaN for any other value of a file (null stands for NaN)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return math.nan


def metrics_of(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the metrics in a line of an evaluation."""
    metrics = line.get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def _read_text(path: Path, folder: Path, missing: list[str]) -> str:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        text = ""
    if not text.strip():
        missing.append(f"There is no {path.relative_to(folder)}, or nothing in it.")
    return text


def _read_lines(path: Path, folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file in order of `step`; of several with one step, the last."""
    by_step, unreadable = {}, 0
    for line in _read_text(path, folder, missing).split("\n"):  # not splitlines: JSON may contain U+2028
        value = _parse(line)
        step = value.get("step") if isinstance(value, dict) else None
        if type(step) is int and 0 <= step < 2**53:
            by_step[step] = value
        elif line.strip():
            unreadable += 1
    _note_unreadable(unreadable, path.relative_to(folder), missing)
    return [by_step[step] for step in sorted(by_step)]


def _read_timeline(path: Path, missing: list[str]) -> Goodput:
    """Returns the goodput of a run; without attempts if it has no timeline."""
    if not path.exists():
        return Goodput([])
    texts = [text for text in _read_text(path, path.parent, missing).split("\n") if text.strip()]
    lines = [line for line in map(parse_line, texts) if line]
    _note_unreadable(len(texts) - len(lines), Path(path.name), missing)
    return goodput(lines)


def _read_layout(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = _read_text(path, path.parent, missing)
    rows = _parse(text)
    if isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows):
        return rows
    missing.append("layout.json could not be read.")
    return []


def _note_unreadable(count: int, path: Path, missing: list[str]) -> None:
    if count:
        lines = "1 line" if count == 1 else f"{count} lines"
        missing.append(f"{lines} of {path} could not be read.")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
