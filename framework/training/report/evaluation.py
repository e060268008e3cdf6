"""What evaluation found: metrics over steps, and predictions to read."""

from collections.abc import Mapping
from typing import Any

from meshway.framework.training.report.elements import escape, figure, section
from meshway.framework.training.report.experts import is_of_router
from meshway.framework.training.report.run_files import Run, metrics_of

_MAX_SAMPLES = 12  # predictions shown a task
_MAX_TEXT = 4000  # characters shown of a prediction's texts


def evaluation(run: Run) -> str:
    """Returns the curves of the tasks' metrics, one plot a metric."""
    names: dict[str, None] = {}
    for lines in run.evaluations.values():
        for line in lines:
            names |= dict.fromkeys(metrics_of(line))
    plots = [
        figure(name.replace("_", " "), {task: run.metric(task, name) for task in run.evaluations})
        for name in sorted(names)
        if not is_of_router(name)  # a plot for each layer of a stack would bury the others
    ]
    return section("Evaluation", plots, "No evaluation has been written yet.")


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
