"""What evaluation found: metrics over steps, and predictions to read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.training.report.elements import escape, figure, section, table
from meshway.framework.training.report.experts import is_of_router
from meshway.framework.training.report.run_files import Run, metrics_of, number

_MAX_SAMPLES = 12  # predictions shown a task
_MAX_TEXT = 4000  # characters shown of a prediction's texts
_MAX_STEPS = 40  # rows of a task's table


def evaluation(run: Run) -> str:
    """Returns the curves of the tasks' metrics, one plot a metric, and a table of them for each task."""
    names: dict[str, None] = {}
    for lines in run.evaluations.values():
        for line in lines:
            names |= dict.fromkeys(metrics_of(line))
    plots = [
        figure(name.replace("_", " "), {task: run.metric(task, name) for task in run.evaluations})
        for name in sorted(names)
        if not is_of_router(name)  # a plot for each layer of a stack would bury the others
    ]
    tables = [_table(task, lines) for task, lines in run.evaluations.items() if lines]
    return "\n".join([section("Evaluation", plots, "No evaluation has been written yet."), *tables])


def samples(run: Run) -> str:
    """Returns each task's latest predictions beside inputs and targets."""
    parts = []
    for task, lines in run.evaluations.items():
        latest = [(line["step"], _predictions(line)) for line in lines if _predictions(line)]
        if latest:
            step, predictions = latest[-1]
            parts.append(f"<h3>{escape(task)}, step {step:,}</h3>")
            parts += [_sample(prediction) for prediction in predictions[:_MAX_SAMPLES]]
    body = "\n".join(parts) or '<p class="muted">No evaluation has written predictions.</p>'
    return f"<h2>Sample predictions</h2>\n{body}"


def _table(task: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns a task's metrics over steps, what of its own code failed last, and nothing for none."""
    names = list(dict.fromkeys(name for line in lines for name in metrics_of(line) if not is_of_router(name)))
    shown = lines[-_MAX_STEPS:]
    rows = [[f"{line['step']:,}", *(_value(metrics_of(line).get(name)) for name in names)] for line in shown]
    columns = [("step", True), *((name.replace("_", " "), True) for name in names)]
    which = f", the last {_MAX_STEPS} of {len(lines):,} steps" if len(lines) > _MAX_STEPS else ""
    failed = lines[-1].get("failed")
    notes = [
        f'<p class="muted">{escape(function)} raised {escape(message)} at step {lines[-1]["step"]:,}</p>'
        for function, message in (failed.items() if isinstance(failed, dict) else ())
    ]
    return "\n".join([f"<h3>{escape(task)}{which}</h3>", table(columns, rows), *notes])


def _value(value: Any) -> str:
    return f"{found:.5g}" if math.isfinite(found := number(value)) else "-"


def _predictions(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    predictions = line.get("predictions")
    return [item for item in predictions if isinstance(item, dict)] if isinstance(predictions, list) else []


def _sample(prediction: Mapping[str, Any]) -> str:
    cells = []
    for name in ("input", "target", "prediction"):
        text = str(prediction.get(name, ""))
        cut = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " ..."
        cells.append(f"<div><b>{name}</b><pre>{escape(cut)}</pre></div>")
    return f'<div class="sample">{"".join(cells)}</div>'
