"""Reads the files of a run directory, also as a crash left them."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshway.framework.report.plots import Points
from meshway.framework.telemetry.timeline import Goodput, goodput, parse_line


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
