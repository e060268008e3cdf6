"""A run in a few numbers."""

import math
import statistics
from collections.abc import Iterable
from typing import Any

from meshway.framework.partitioning.explain import format_bytes
from meshway.framework.training.report.elements import escape
from meshway.framework.training.report.plots import Points
from meshway.framework.training.report.run_files import Run, number


def heading(run: Run) -> str:
    """Returns the name of the run, its numbers, and what is missing."""
    numbers = [(name, value) for name, value in _summary(run) if value]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in numbers)
    notes = "".join(f'<p class="muted">{escape(sentence)}</p>' for sentence in run.missing)
    return f'<h1>{escape(run.name)}</h1>\n<dl class="numbers">{cells}</dl>\n{notes}'


def _summary(run: Run) -> Iterable[tuple[str, str]]:
    yield "steps", f"{run.reports[-1]['step']:,}" if run.reports else ""
    yield "train loss", _last(run.curve("loss"), "{:.4g}")
    validation = run.curve("validation/loss")
    if len(validation) > 1 and validation[0][0] == 0:
        yield "validation loss at step 0", f"{validation[0][1]:.4g}"
    yield "validation loss", _last(validation, "{:.4g}")
    if not validation:
        for task in run.evaluations:
            yield f"validation loss, {task}", _last(run.metric(task, "loss"), "{:.4g}")
    yield "tokens per second, median", _median(run.curve("tokens_per_second"), "{:,.0f}")
    yield "share of matmul peak (MFU)", _median(run.curve("mfu"), "{:.1%}")
    yield "waiting for data", _median(run.curve("data_wait_fraction"), "{:.1%}")
    yield "peak memory of a device", _memory(run)
    yield "goodput", f"{run.goodput.shares['productive']:.1%}" if run.goodput.wall else ""
    sizes = [_size(row.get("shape")) for row in run.layout if str(row["name"]).startswith("params/")]
    if sizes and math.isfinite(sum(sizes)):
        yield "parameters", f"{sum(sizes):,.0f}"


def _memory(run: Run) -> str:
    """Returns the highest peak and the limit, as far as they were counted."""
    peaks = [value for _, value in run.curve("device_peak_bytes_in_use") if math.isfinite(value)]
    limits = [value for _, value in run.curve("device_bytes_limit") if math.isfinite(value)]
    return " of ".join(format_bytes(max(each)) for each in (peaks, limits) if each) if peaks else ""


def _size(shape: Any) -> float:
    return math.prod(map(number, shape)) if isinstance(shape, list) else math.nan


def _last(points: Points, form: str) -> str:
    return form.format(points[-1][1]) if points else ""


def _median(points: Points, form: str) -> str:
    values = [value for _, value in points if math.isfinite(value)]
    return form.format(statistics.median(values)) if values else ""
