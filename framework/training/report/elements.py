"""The parts that the sections of a page are put together from, as HTML text."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.training.report.plots import NUM_COLOURS, Points, line_plot


def escape(value: Any) -> str:
    """Returns text safe inside an element or a quoted attribute, without control characters."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value)))


def section(title: str, plots: Sequence[str], nothing: str) -> str:
    """Returns a section of plots side by side, those that are not "", or with the sentence `nothing`."""
    shown = "\n".join(plot for plot in plots if plot)
    body = f'<div class="plots">\n{shown}\n</div>' if shown else f'<p class="muted">{nothing}</p>'
    return f"<h2>{title}</h2>\n{body}"


def figure(title: str, series: Mapping[str, Points], *, shaded: bool = False, **style: bool) -> str:
    """Returns a line plot with its title; nothing where there is no number.

    Where a plot may have several lines they are named, and each keeps its colour from plot to plot. More lines than
    there are colours, where `shaded`, go along a scale of colours from the first to the last.
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
    return framed(title, keys, plot)


def framed(title: str, keys: str, plot: str) -> str:
    """Returns a plot with its title and legend."""
    return f"<figure><figcaption>{escape(title)}{keys}</figcaption>{plot}</figure>"


def legend(names: Mapping[int, str]) -> str:
    """Returns the names of a plot's colours, by number of the colour; nothing where there are none."""
    keys = [
        f'<span style="--c: var(--c{colour % NUM_COLOURS})">{escape(name)}</span>' for colour, name in names.items()
    ]
    return f'<span class="keys">{"".join(keys)}</span>' if keys else ""


def _scale(names: Sequence[str]) -> str:
    """Returns the ends of a scale of colours, between their names."""
    scale = '<span class="scale" style="--c: linear-gradient(in oklab to right, var(--c0), var(--c4))"></span>'
    return f'<span class="keys">{escape(names[0])}{scale}{escape(names[-1])}</span>'


def table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of texts under `columns`, (title, whether it holds numbers)."""
    number = [' class="number"' if is_number else "" for _, is_number in columns]
    head = "".join(f"<th{style}>{escape(title)}</th>" for (title, _), style in zip(columns, number, strict=True))
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = "".join(f"<td{style}>{escape(text)}</td>" for text, style in zip(row, number, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def folded(name: str, text: str) -> str:
    """Returns a text that is shown on demand."""
    return f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>"
