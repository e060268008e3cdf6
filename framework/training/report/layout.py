"""How the tensors of a run lie on its devices."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.counting import count_of
from meshway.framework.partitioning.explain import format_bytes
from meshway.framework.training.report.elements import escape, folded, table
from meshway.framework.training.report.run_files import Run, number

_OPEN_ROWS = 40  # a longer table is folded away
_COLUMNS = ("name", "axes", "shape", "spec", "bytes a device", "rule")


def layout(run: Run) -> str:
    """Returns the tensors by group: `params`, the optimizer's state, the batch, as their names begin."""
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
        is_open = " open" if group == "params" and len(rows) <= _OPEN_ROWS else ""
        summary = f"{escape(group)}: {tensors}, {size} a device"
        parts.append(f"<details{is_open}><summary>{summary}</summary>{_tensors(rows)}</details>")
    return "<h2>Layout</h2>\n" + "\n".join(parts)


def _tensors(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [(title, title == "bytes a device") for title in _COLUMNS]
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
