"""`report.html`: a run on one page, made from the files of its run directory alone."""

import math
import re
import statistics
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.files import io_errors, open_path, replace_file
from meshway.framework.report.plots import (
    Points,
    Run,
    bar_plot,
    figure,
    folded,
    legend,
    metrics_of,
    number,
    read_run,
    section,
    shown_value,
)
from meshway.framework.telemetry.timeline import KINDS, Attempt
from meshway.framework.terminal import count_of, format_bytes, format_duration
from meshway.framework.web_page import escape, framed, numbers, table, web_page


def write_report(model_dir: str | Path) -> Path:
    """Writes `report.html` in a run directory and returns its path.

    Reads `metrics.jsonl`, `timeline.jsonl`, `eval/<task>.jsonl`, `layout.json`, `model_info.txt` and `config.gin`.
    For a file that is missing or unreadable the page has a sentence instead, so it can be made at any time, also after
    a crash. The page needs no other file, runs no script, and is the same bytes for the same files.

    Raises:
      UserError: no such folder, or the page may not be written there.
      EnvironmentFailure: the disk is full or broken.
    """
    folder = open_path(model_dir)
    if not folder.is_dir():
        raise UserError(f"no run directory {folder}: a report is made from the files of a run")
    run = read_run(folder)
    sections = (heading, training, experts, evaluation, samples, time_spent, layout, _recipe)
    page = web_page(run.name, (section(run) for section in sections), Path(__file__).with_suffix(".css"))
    path = folder / "report.html"
    with io_errors(path):
        replace_file(path, page.encode("utf-8", "replace"))
    return path


def heading(run: Run) -> str:
    """Returns the name of the run, its numbers, and what is missing."""
    cells = numbers((name, value) for name, value in _summary(run) if value)
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
    """Returns the highest peak and the limit of device memory, as far as they were reported."""
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


_MEMORY = {"in use": "device_bytes_in_use", "peak": "device_peak_bytes_in_use", "limit": "device_bytes_limit"}


def training(run: Run) -> str:
    """Returns the curves of the metrics that every run reports."""
    losses = {"train": run.curve("loss")}
    if validation := run.curve("validation/loss"):
        losses["validation"] = validation
    else:
        losses |= {f"validation, {task}": run.metric(task, "loss") for task in run.evaluations}
    plots = [
        figure("Loss", losses),
        figure("Learning rate", {"learning rate": run.curve("learning_rate")}, from_zero=True),
        figure("Tokens per second", {"tokens/s": run.curve("tokens_per_second")}, from_zero=True),
        figure(
            "Time spent waiting for data",
            {"share": run.curve("data_wait_fraction")},
            percent=True,
            from_zero=True,
        ),
        figure("Gradient norm", {"norm": run.curve("grad_norm")}, from_zero=True),
        figure("Share of matmul peak (MFU)", {"share": run.curve("mfu")}, percent=True, from_zero=True),
        figure("Device memory, GiB", _memory_curve(run), from_zero=True),
    ]
    return section("Training", plots, "No step has been reported yet.")


def _memory_curve(run: Run) -> dict[str, Points]:
    """Returns the memory of the fullest device; nothing if no backend reported it."""
    curves = {name: [(step, value / 2**30) for step, value in run.curve(key)] for name, key in _MEMORY.items()}
    return {name: points for name, points in curves.items() if points}


_MAX_SAMPLES = 12  # predictions shown for each task
_MAX_TEXT = 4000  # characters shown of a prediction's texts
_MAX_STEPS = 40  # rows of a task's table


def evaluation(run: Run) -> str:
    """Returns the curves of the tasks' metrics, one plot for each metric, and a table for each task."""
    names: dict[str, None] = {}
    for lines in run.evaluations.values():
        for line in lines:
            names |= dict.fromkeys(metrics_of(line))
    plots = [
        figure(name.replace("_", " "), {task: run.metric(task, name) for task in run.evaluations})
        for name in sorted(names)
        if not is_of_router(name)  # one plot for each layer of a stack would be too many
    ]
    tables = [_table(task, lines) + _values(lines) for task, lines in run.evaluations.items() if lines]
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
    """Returns a task's metrics over steps, and which of its metric functions failed last."""
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


def _values(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the last texts, images, sounds, histograms and tensors of a task's metrics."""
    found = [(line["step"], line["values"]) for line in lines if isinstance(line.get("values"), dict)]
    if not found:
        return ""
    step, values = found[-1]
    parts = [
        f"<div><b>{escape(name)}, step {step:,}</b>{shown_value(value)}</div>"
        for name, value in sorted(values.items())
        if isinstance(value, dict)
    ]
    return f'\n<div class="sample">{"".join(parts)}</div>'


def _value(value: Any) -> str:
    return f"{found:.5g}" if math.isfinite(found := number(value)) else "-"


def _predictions(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    predictions = line.get("predictions")
    return [item for item in predictions if isinstance(item, dict)] if isinstance(predictions, list) else []


def _sample(prediction: Mapping[str, Any]) -> str:
    cells = []
    for name in ("input", "target", "prediction"):
        text = str(prediction.get(name, ""))
        shown = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " ..."
        cells.append(f"<div><b>{name}</b><pre>{escape(shown)}</pre></div>")
    return f'<div class="sample">{"".join(cells)}</div>'


_OPEN_TENSORS = 40  # a longer table is folded away
_TENSOR_COLUMNS = ("name", "axes", "shape", "spec", "bytes a device", "rule")


def layout(run: Run) -> str:
    """Returns a table of tensors for each group, the first part of their names: `params`, the optimizer's state, the
    batch."""
    if not run.layout:
        if not run.model_info.strip():
            return ""
        return f"<h2>Layout</h2>\n{folded('model_info.txt', run.model_info)}"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in run.layout:
        groups.setdefault(str(row["name"]).split("/")[0], []).append(row)
    parts = []
    for group, rows in groups.items():
        size = _bytes(sum(filter(math.isfinite, (number(row.get("bytes_per_device")) for row in rows))))
        tensors = count_of(len(rows), "tensor")
        is_open = " open" if group == "params" and len(rows) <= _OPEN_TENSORS else ""
        summary = f"{escape(group)}: {tensors}, {size} a device"
        parts.append(f"<details{is_open}><summary>{summary}</summary>{_tensors(rows)}</details>")
    return "<h2>Layout</h2>\n" + "\n".join(parts)


def _tensors(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [(title, title == "bytes a device") for title in _TENSOR_COLUMNS]
    return table(columns, [_texts(row) for row in rows])


def _texts(row: Mapping[str, Any]) -> list[str]:
    axes, shape = row.get("axes", ""), row.get("shape", "")
    return [
        str(row.get("name", "")),
        ", ".join(str(axis or "-") for axis in axes) if isinstance(axes, list) else str(axes),
        " x ".join(map(str, shape)) if isinstance(shape, list) else str(shape),
        str(row.get("spec", "")),
        _bytes(number(row.get("bytes_per_device", ""))),
        str(row.get("rule", "")),
    ]


def _bytes(count: float) -> str:
    return format_bytes(count) if math.isfinite(count) else "-"


# The scalars of one layer's router: `decoder/router/load_max/layer_03`.
_ROUTER = re.compile(r"(?P<stack>\w+)/router/(?P<statistic>\w+)/layer_(?P<layer>\d+)")
# Statistic -> (title, whether it is a share).
_STATISTICS = {
    "load_max": ("busiest expert (1 is even)", False),
    "load_min": ("idlest expert (1 is even)", False),
    "entropy": ("entropy of the router, in nats", False),
    "drop_rate": ("dropped token choices", True),
}
_LOSSES = {
    "router_load_loss": "Router loss: load",
    "router_importance_loss": "Router loss: importance",
    "router_z_loss": "Router loss: z",
}


def is_of_router(name: str) -> bool:
    """Whether a metric is shown in the section on experts."""
    return name in _LOSSES or _ROUTER.fullmatch(name) is not None


def experts(run: Run) -> str:
    """Returns a plot for each stack and statistic with a line for each layer, and the router's losses; nothing for a
    dense model."""
    plots = [
        _layers(stack, statistic, layers)
        for (stack, statistic), layers in sorted(_curves(run).items(), key=_plot_order)
    ]
    plots += [figure(title, {name: run.curve(name)}, from_zero=True) for name, title in _LOSSES.items()]
    return section("Experts", plots, "") if any(plots) else ""


def _curves(run: Run) -> dict[tuple[str, str], dict[int, Points]]:
    """Returns the curves by layer of each (stack, statistic)."""
    found: dict[tuple[str, str], dict[int, Points]] = {}
    for name in sorted({name for line in run.reports for name in line}):
        if match := _ROUTER.fullmatch(name):
            layers = found.setdefault((match["stack"], match["statistic"]), {})
            layers[int(match["layer"])] = run.curve(name)
    return found


def _plot_order(item: tuple[tuple[str, str], object]) -> tuple[str, int, str]:
    """Sorts by stack, then statistics in the order of `_STATISTICS`, then others by name."""
    stack, statistic = item[0]
    known = list(_STATISTICS)
    return stack, known.index(statistic) if statistic in known else len(known), statistic


def _layers(stack: str, statistic: str, layers: Mapping[int, Points]) -> str:
    title, is_share = _STATISTICS.get(statistic, (statistic.replace("_", " "), False))
    series = {f"layer {layer}": layers[layer] for layer in sorted(layers)}
    where = stack.capitalize() if len(series) > 1 else f"{stack.capitalize()}, {next(iter(series))}"
    return figure(f"{where}: {title}", series, percent=is_share, from_zero=True, shaded=True)


_MAX_BARS = 24  # the table has all of them
_MAX_OUTCOME = 80  # characters; the file has all of them
_OPEN_ATTEMPTS = 40  # a longer table is folded away
_COLOURS = {
    "productive": 2,
    "compile": 4,
    "startup": 6,
    "data_wait": 1,
    "checkpoint": 0,
    "evaluation": 3,
    "lost": 5,
    "restart": 7,
}
_ATTEMPT_COLUMNS = [  # (title, whether it holds numbers), before those of `KINDS`
    ("attempt", False),
    ("began (UTC)", False),
    ("steps", False),
    ("devices", True),
    ("end", False),
    ("time", True),
]


def time_spent(run: Run) -> str:
    """Returns the bars and the table of attempts; nothing if there is no timeline."""
    found = run.goodput
    if not found.wall:
        return ""
    attempts = list(enumerate(found.attempts, 1))
    shown = attempts[-_MAX_BARS:]
    used = [kind for kind, seconds in found.seconds.items() if seconds]
    bars = {f"{index}": [(_COLOURS[kind], attempt.seconds[kind]) for kind in _order(used)] for index, attempt in shown}
    title = "Time by attempt" if len(shown) == len(attempts) else f"Time by attempt, the last {len(shown)}"
    keys = legend({_COLOURS[kind]: KINDS[kind] for kind in _order(used)})
    plot = framed(title, bar_plot(bars), keys)
    rows = [_row(str(index), attempt, last=index == len(attempts)) for index, attempt in attempts]
    rows.append(["all", "", "", "", "", format_seconds(found.wall), *map(format_seconds, _of_kinds(found.seconds))])
    rows.append(["share", "", "", "", "", "100.0%", *(f"{share:.1%}" for share in _of_kinds(found.shares))])
    numbers = table([*_ATTEMPT_COLUMNS, *((title, True) for title in KINDS.values())], rows)
    if len(rows) > _OPEN_ATTEMPTS:
        numbers = f"<details><summary>{len(attempts)} attempts</summary>{numbers}</details>"
    return f"<h2>Where the time went</h2>\n<p>{_sentence(run)}</p>\n{plot}\n{numbers}"


def _sentence(run: Run) -> str:
    attempts = count_of(len(run.goodput.attempts), "attempt")
    share = f"{run.goodput.shares['productive']:.1%}"
    lost = ". Lost are steps that a later attempt repeated" if run.goodput.seconds["lost"] else ""
    return f"{share} of {format_seconds(run.goodput.wall)} in {attempts} went into steps that count{lost}."


def _order(kinds: Iterable[str]) -> list[str]:
    """Returns kinds in the order in which they usually occur in an attempt."""
    return sorted(kinds, key=["restart", "startup", "compile", *KINDS].index)


def _of_kinds(values: Mapping[str, float]) -> list[float]:
    return [values[kind] for kind in KINDS]


def _row(index: str, attempt: Attempt, last: bool) -> list[str]:
    unknown = "not written yet" if last else "killed"
    return [
        index,
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(attempt.began)) if attempt.began < 1e11 else "-",
        f"{attempt.start_step:,} to {attempt.last_step:,}",
        "-" if attempt.devices is None else f"{attempt.devices:,}",
        textwrap.shorten(attempt.outcome or unknown, _MAX_OUTCOME),
        format_seconds(sum(attempt.seconds.values())),
        *map(format_seconds, _of_kinds(attempt.seconds)),
    ]


def format_seconds(seconds: float) -> str:
    """Returns `12.3 s` below 100 seconds, else `m:ss`."""
    return f"{seconds:.1f} s" if seconds < 99.95 else format_duration(seconds)


def _recipe(run: Run) -> str:
    if not run.config.strip():
        return ""
    return f"<h2>Recipe</h2>\n{folded('config.gin', run.config)}"
