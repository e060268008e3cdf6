"""A plan of training as a page: the tables of the terminal, and memory and time as bars."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from meshway.framework.planning.train_plan import TrainPlan
from meshway.framework.terminal import format_bytes
from meshway.framework.web_page import escape, framed, table, web_page
from meshway.launch.plan_variants import Fit, Knob, fit_lines, fit_table, knob_table
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
        sections += [_table(fit_table(fit)), _paragraphs(fit_lines(fit))]
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
