"""A plan of training as a page: the tables of the terminal, memory and time as bars, and what a search tried drawn."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from meshway.framework.planning.search import Rough, frontier
from meshway.framework.planning.train_plan import TrainPlan
from meshway.framework.terminal import format_bytes
from meshway.framework.web_page import escape, framed, table, web_page
from meshway.launch.plan_variants import Fit, Knob, first_flags, fit_table, knob_table
from meshway.launch.train_plan import Table, format_seconds, heading, memory_rows, tables, time_lines


def page(plan: TrainPlan, options: Sequence[Knob], fit: Fit | None) -> str:
    """Returns the page."""
    title = f"Plan for {plan.where.name}"
    cost = plan.best_cost
    sections = [f"<h1>{escape(title)}</h1>", _paragraphs(heading(plan).splitlines())]
    sections.append(framed("Memory of a device", _bars(memory_rows(plan), plan.capacity, format_bytes)))
    sections.append(framed("Time of a step, each alone", _bars(cost.terms, cost.most, format_seconds)))
    sections.append(_paragraphs(time_lines(plan)))
    sections += [_table(each) for each in [*tables(plan), knob_table(options)]]
    if plan.waste:
        sections.append(_paragraphs([f"Warning: {each}" for each in plan.waste]))
    if fit:
        sections += [_table(fit_table(fit)), _paragraphs([first_flags(fit)])]
        sections.append(framed("Every way that was tried, by rough closed forms", drawn(fit.tried, plan.capacity)))
        sections.append(table([("mesh and layout", False), ("why not", False)], fit.lost.items()))
    return web_page(title, sections, Path(__file__).with_suffix(".css"))


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{escape(line.strip())}</p>" for line in lines)


def _table(found: Table) -> str:
    head, *rows = found.rows
    columns = [(title, number in found.numbers) for number, title in enumerate(head)]
    note = f"<p>{escape(found.note)}</p>" if found.note else ""
    return note + table(columns, rows)


def _bars(parts: Mapping[str, float], whole: float, words: Callable[[float], str]) -> str:
    """Returns a bar for each part, as long as its share of the whole."""
    lines = []
    for name, size in parts.items():
        share = min(1.0, size / whole) if whole else 0.0
        lines.append(
            f"<tr><td>{escape(name)}</td><td class='number'>{escape(words(size))}</td>"
            f"<td class='room'><div class='bar' style='width:{100 * share:.2f}%'></div></td></tr>"
        )
    return f"<table>{''.join(lines)}</table>"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 400, 70, 40


def drawn(tried: Sequence[Rough], capacity: float) -> str:
    """Returns an `<svg>` of a step's time over a device's memory, both logarithmic, for every way to train that can be:
    what each is appears over its point. The frontier is a line, and what a device holds a dashed one."""
    shown = [each for each in tried if each.cost]
    if not shown:
        return ""
    times, sizes = [each.cost.estimate for each in shown if each.cost], [each.bytes for each in shown]
    across = _scale([*sizes, capacity], _LEFT, _WIDTH - 10)
    up = _scale(times, _HEIGHT - _BOTTOM, 10)
    best = frontier(shown)
    parts = [*_ticks(sizes, times, across, up), *(_point(each, across, up, each in best) for each in shown)]
    line = " ".join(f"{across(each.bytes):.1f},{up(each.seconds):.1f}" for each in best)
    parts.append(f"<polyline class='frontier' points='{line}'/>")
    held = f"{across(capacity):.1f}"
    parts.append(f"<line class='held' x1='{held}' x2='{held}' y1='10' y2='{_HEIGHT - _BOTTOM}'/>")
    parts.append(f"<text x='{held}' y='9' text-anchor='middle'>a device</text>")
    return f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>{''.join(parts)}</svg>"


def _point(each: Rough, across: Callable[[float], float], up: Callable[[float], float], is_best: bool) -> str:
    seconds = each.cost.estimate if each.cost else math.inf
    kind = "best" if is_best else "lost" if each.why_not else "fits"
    words = [each.candidate.words, f"about {format_seconds(seconds)}", format_bytes(each.bytes), each.why_not]
    title = escape(", ".join(filter(None, words)))
    place = f"cx='{across(each.bytes):.1f}' cy='{up(seconds):.1f}'"
    return f"<circle class='{kind}' {place} r='3'><title>{title}</title></circle>"


def _scale(values: Sequence[float], begin: float, end: float) -> Callable[[float], float]:
    """Returns the place of a value on a logarithmic axis from `begin` to `end`."""
    low, high = math.log(min(values)) - 0.05, math.log(max(values)) + 0.05
    return lambda value: begin + (math.log(value) - low) / (high - low) * (end - begin)


def _ticks(
    sizes: Sequence[float], times: Sequence[float], across: Callable[[float], float], up: Callable[[float], float]
) -> Iterator[str]:
    for power in range(math.ceil(math.log2(min(sizes))), math.floor(math.log2(max(sizes))) + 1):
        x = f"{across(2.0**power):.1f}"
        yield f"<text x='{x}' y='{_HEIGHT - _BOTTOM + 15}' text-anchor='middle'>{escape(format_bytes(2**power))}</text>"
        yield f"<line x1='{x}' x2='{x}' y1='10' y2='{_HEIGHT - _BOTTOM}'/>"
    for power in range(math.floor(math.log10(min(times))), math.ceil(math.log10(max(times))) + 1):
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            if min(times) <= value <= max(times):
                y = f"{up(value):.1f}"
                yield f"<text x='{_LEFT - 6}' y='{y}' text-anchor='end'>{escape(format_seconds(value))}</text>"
                yield f"<line x1='{_LEFT}' x2='{_WIDTH - 10}' y1='{y}' y2='{y}'/>"
    yield f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 6}' text-anchor='middle'>memory of a device</text>"
