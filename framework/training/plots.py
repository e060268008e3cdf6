"""Line plots as inline SVG for an HTML page: colours, fonts and legend are the page's own, by CSS."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Points = Sequence[tuple[int, float]]  # (step, value), steps ascending; a value may be NaN, which leaves a gap

NUM_COLOURS = 8  # the page's style sheet defines --c0 to --c7
_MAX_POINTS = 1000
# Matplotlib writes colours as hexadecimal numbers; these stand for what the style sheet decides.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#0300{i:02x}" for i in range(NUM_COLOURS)]
_CSS = {_INK: "var(--muted)", _GRID: "var(--line)"} | {c: f"var(--c{i})" for i, c in enumerate(_SERIES)}


def line_plot(series: Mapping[int, Points], *, percent: bool = False, from_zero: bool = False) -> str:
    """Returns an `<svg>` element with lines over steps.

    Args:
      series: number of a colour -> points of a line: number i is the page's colour `--c<i modulo 8>`.
      percent: values are shares, shown in per cent.
      from_zero: the vertical axis starts at 0.
    """
    import matplotlib  # half a second and more, which only the making of a report pays
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "meshway",
        "font.size": 8.5,
        "axes.linewidth": 0.7,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.4, 2.5))
        figure.subplots_adjust(left=0.14, right=0.96, bottom=0.17, top=0.97)  # alike in every plot
        axes = figure.add_subplot()
        for number, points in series.items():
            colour = _SERIES[number % NUM_COLOURS]
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
        axes.tick_params(colors=_INK, length=0, pad=5)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue())


def _short(number: float, _: int) -> str:
    """Returns a tick's label: 0.0025, 12,000, 1.5M."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:,.10g}{unit}"
    return f"{number:,.10g}"


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.4g}%"


def _thinned(points: Points) -> Points:
    """Returns about a thousand points at most: the lowest and highest of each stretch, so spikes stay."""
    if len(points) <= _MAX_POINTS:
        return points
    length = math.ceil(len(points) / (_MAX_POINTS / 2))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), length):
        stretch = [point for point in points[start : start + length] if math.isfinite(point[1])]
        if stretch:
            kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _inline(svg: str) -> str:
    """Turns a file into an element of a page: no prologue, no size of its own, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # the same names in every plot of the page
    svg = svg.replace("<svg", '<svg role="img"', 1)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    return svg
