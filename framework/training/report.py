"""`report.html`: a run on one page, made from the files of its run directory and from nothing else."""

import dataclasses
import html
import json
import math
import re
import statistics
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.partitioning.explain import format_bytes
from meshway.framework.training.plots import NUM_COLOURS, Points, line_plot
from meshway.framework.training.writers import replace_file

_MAX_SAMPLES = 12  # predictions shown a task
_MAX_TEXT = 4000  # characters shown of a prediction's texts
_OPEN_ROWS = 40  # a longer table is folded away


def write_report(model_dir: str | Path) -> Path:
    """Makes `report.html` in a run directory and returns its path.

    Reads `metrics.jsonl`, `eval/<task>.jsonl`, `layout.json`, `model_info.txt` and `config.gin`. What is
    missing or unreadable is left out with a sentence, so a page can be made at any time, also after a crash.
    The page needs no other file, runs no script, and is the same bytes for the same files.

    Raises:
      UserError: no such folder, or the page cannot be written.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise UserError(f"no run directory {folder}: a report is made from the files of a run")
    run = _read(folder)
    parts = [_heading(run), _curves(run), _evaluations(run), _samples(run), _layout(run), _texts(run)]
    template = string.Template((Path(__file__).with_name("report.html")).read_text(encoding="utf-8"))
    page = template.substitute(title=_escape(run.name), body="\n".join(parts))
    path = folder / "report.html"
    try:
        replace_file(path, page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


@dataclasses.dataclass
class _Run:
    """What the files say; `missing` holds a sentence for each thing that they do not."""

    name: str
    reports: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]  # by task
    layout: list[dict[str, Any]]
    model_info: str
    config: str
    missing: list[str]

    def curve(self, name: str) -> Points:
        return [(line["step"], _number(line[name])) for line in self.reports if name in line]


def _read(folder: Path) -> _Run:
    missing: list[str] = []
    reports = _read_lines(folder / "metrics.jsonl", folder, missing)
    evaluations = {}
    for path in sorted((folder / "eval").glob("*.jsonl")):
        evaluations[path.stem] = _read_lines(path, folder, missing)
    return _Run(
        name=folder.resolve().name,
        reports=reports,
        evaluations=evaluations,
        layout=_read_layout(folder / "layout.json", missing),
        model_info=_read_text(folder / "model_info.txt", folder, missing),
        config=_read_text(folder / "config.gin", folder, missing),
        missing=missing,
    )


def _read_text(path: Path, folder: Path, missing: list[str]) -> str:
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError:
        text = ""
    if not text.strip():
        missing.append(f"There is no {path.relative_to(folder)}, or nothing in it.")
    return text


def _read_lines(path: Path, folder: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a JSON-lines file in order of `step`, the last of each step."""
    by_step, unreadable = {}, 0
    for line in _read_text(path, folder, missing).splitlines():
        value = _parse(line)
        step = value.get("step") if isinstance(value, dict) else None
        if type(step) is int and 0 <= step < 2**53:
            by_step[step] = value
        elif line.strip():
            unreadable += 1
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable} lines"
        missing.append(f"{lines} of {path.relative_to(folder)} could not be read.")
    return [by_step[step] for step in sorted(by_step)]


def _read_layout(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = _read_text(path, path.parent, missing)
    rows = _parse(text)
    if isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows):
        return rows
    missing.append("layout.json could not be read.")
    return []


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> float:
    """Returns a finite float, or NaN for everything else that a file may hold (null stands for NaN)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    return math.nan


def _escape(value: Any) -> str:
    """Returns text safe inside an element or a quoted attribute, without control characters."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value)))


def _heading(run: _Run) -> str:
    numbers = [(name, value) for name, value in _summary(run) if value]
    cells = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in numbers)
    notes = "".join(f'<p class="muted">{_escape(sentence)}</p>' for sentence in run.missing)
    return f'<h1>{_escape(run.name)}</h1>\n<dl class="numbers">{cells}</dl>\n{notes}'


def _summary(run: _Run) -> Iterable[tuple[str, str]]:
    yield "steps", f"{run.reports[-1]['step']:,}" if run.reports else ""
    yield "train loss", _last(run.curve("loss"), "{:.4g}")
    validation = run.curve("validation/loss")
    if len(validation) > 1 and validation[0][0] == 0:
        yield "validation loss at step 0", f"{validation[0][1]:.4g}"
    yield "validation loss", _last(validation, "{:.4g}")
    if not validation:
        for task in run.evaluations:
            yield f"validation loss, {task}", _last(_metric(run, task, "loss"), "{:.4g}")
    yield "tokens per second, median", _median(run.curve("tokens_per_second"), "{:,.0f}")
    yield "share of matmul peak (MFU)", _median(run.curve("mfu"), "{:.1%}")
    yield "waiting for data", _median(run.curve("data_wait_fraction"), "{:.1%}")
    sizes = [_size(row.get("shape")) for row in run.layout if str(row["name"]).startswith("params/")]
    if sizes and math.isfinite(sum(sizes)):
        yield "parameters", f"{sum(sizes):,.0f}"


def _size(shape: Any) -> float:
    return math.prod(map(_number, shape)) if isinstance(shape, list) else math.nan


def _last(points: Points, form: str) -> str:
    return form.format(points[-1][1]) if points else ""


def _median(points: Points, form: str) -> str:
    values = [value for _, value in points if math.isfinite(value)]
    return form.format(statistics.median(values)) if values else ""


def _curves(run: _Run) -> str:
    losses = {"train": run.curve("loss")}
    if validation := run.curve("validation/loss"):
        losses["validation"] = validation
    else:
        losses |= {f"validation, {task}": _metric(run, task, "loss") for task in run.evaluations}
    plots = [
        _figure("Loss", losses),
        _figure("Learning rate", {"learning rate": run.curve("learning_rate")}, from_zero=True),
        _figure("Tokens per second", {"tokens/s": run.curve("tokens_per_second")}, from_zero=True),
        _figure(
            "Time spent waiting for data",
            {"share": run.curve("data_wait_fraction")},
            percent=True,
            from_zero=True,
        ),
        _figure("Gradient norm", {"norm": run.curve("grad_norm")}, from_zero=True),
        _figure("Share of matmul peak (MFU)", {"share": run.curve("mfu")}, percent=True, from_zero=True),
    ]
    return _section("Training", plots, "No step has been reported yet.")


def _evaluations(run: _Run) -> str:
    names: dict[str, None] = {}
    for lines in run.evaluations.values():
        for line in lines:
            names |= dict.fromkeys(_metrics(line))
    plots = [
        _figure(name.replace("_", " "), {task: _metric(run, task, name) for task in run.evaluations})
        for name in sorted(names)
    ]
    return _section("Evaluation", plots, "No evaluation has been written yet.")


def _metrics(line: Mapping[str, Any]) -> Mapping[str, Any]:
    metrics = line.get("metrics")
    return metrics if isinstance(metrics, dict) else {}


def _metric(run: _Run, task: str, name: str) -> Points:
    lines = run.evaluations[task]
    return [(line["step"], _number(_metrics(line)[name])) for line in lines if name in _metrics(line)]


def _section(title: str, plots: Sequence[str], nothing: str) -> str:
    shown = "\n".join(plot for plot in plots if plot)
    body = f'<div class="plots">\n{shown}\n</div>' if shown else f'<p class="muted">{nothing}</p>'
    return f"<h2>{title}</h2>\n{body}"


def _figure(title: str, series: Mapping[str, Points], **style: bool) -> str:
    """Returns a plot with its title; nothing where there is no number.

    Where a plot may have several lines they are named, and each keeps its colour from plot to plot.
    """
    drawn = {
        colour: (name, points)
        for colour, (name, points) in enumerate(series.items())
        if any(math.isfinite(value) for _, value in points)
    }
    if not drawn:
        return ""
    keys = [
        f'<span style="--c: var(--c{colour % NUM_COLOURS})">{_escape(name)}</span>'
        for colour, (name, _) in drawn.items()
    ]
    legend = f'<span class="keys">{"".join(keys)}</span>' if len(series) > 1 else ""
    plot = line_plot({colour: points for colour, (_, points) in drawn.items()}, **style)
    return f"<figure><figcaption>{_escape(title)}{legend}</figcaption>{plot}</figure>"


def _samples(run: _Run) -> str:
    parts = []
    for task, lines in run.evaluations.items():
        latest = [(line["step"], _predictions(line)) for line in lines if _predictions(line)]
        if latest:
            step, predictions = latest[-1]
            parts.append(f"<h3>{_escape(task)}, step {step:,}</h3>")
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
        cells.append(f"<div><b>{name}</b><pre>{_escape(cut)}</pre></div>")
    return f'<div class="sample">{"".join(cells)}</div>'


def _layout(run: _Run) -> str:
    """Returns the tensors by group: `params`, the optimizer's state, the batch, as their names begin."""
    if not run.layout:
        if not run.model_info.strip():
            return ""
        return f"<h2>Layout</h2>\n{_folded('model_info.txt', run.model_info)}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run.layout:
        groups.setdefault(str(row["name"]).split("/")[0], []).append(row)
    parts = []
    for group, rows in groups.items():
        size = _bytes(sum(filter(math.isfinite, (_number(row.get("bytes_per_device")) for row in rows))))
        tensors = "1 tensor" if len(rows) == 1 else f"{len(rows)} tensors"
        is_open = " open" if group == "params" and len(rows) <= _OPEN_ROWS else ""
        summary = f"{_escape(group)}: {tensors}, {size} a device"
        parts.append(f"<details{is_open}><summary>{summary}</summary>{_table(rows)}</details>")
    return "<h2>Layout</h2>\n" + "\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns: list[tuple[str, str, Callable[[Any], str]]] = [
        ("name", "name", str),
        (
            "axes",
            "axes",
            lambda axes: ", ".join(str(a or "-") for a in axes) if isinstance(axes, list) else str(axes),
        ),
        (
            "shape",
            "shape",
            lambda shape: " x ".join(map(str, shape)) if isinstance(shape, list) else str(shape),
        ),
        ("spec", "spec", str),
        ("bytes_per_device", "bytes a device", lambda size: _bytes(_number(size))),
        ("rule", "rule", str),
    ]
    number = {"bytes_per_device": ' class="number"'}
    head = "".join(f"<th{number.get(key, '')}>{title}</th>" for key, title, _ in columns)
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        texts = ((number.get(key, ""), show(row.get(key, ""))) for key, _, show in columns)
        cells = "".join(f"<td{style}>{_escape(text)}</td>" for style, text in texts)
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _bytes(count: float) -> str:
    return format_bytes(count) if math.isfinite(count) else "-"


def _texts(run: _Run) -> str:
    if not run.config.strip():
        return ""
    return f"<h2>Recipe</h2>\n{_folded('config.gin', run.config)}"


def _folded(name: str, text: str) -> str:
    return f"<details><summary>{name}</summary><pre>{_escape(text)}</pre></details>"
