"""Every tensor of a run: its axes, where it lies, what that costs a device, and which rule said so."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from meshway.framework.axes import sharded_by
from meshway.framework.partitioning.partitioner import Partitioner, path_name
from meshway.framework.partitioning.rules import Resolution
from meshway.framework.terminal import format_bytes, format_columns


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor; `replicated` is the number of devices that hold the same bytes."""

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int
    total_bytes: int
    replicated: int
    rule: str


def explain(partitioner: Partitioner, names: Any, shapes: Any, what: str) -> list[Row]:
    """Returns a row a tensor, for a tree of axis names beside a tree of shapes with dtypes."""
    rows: list[Row] = []

    def add(path: Any, leaf: Any, leaf_names: tuple[str | None, ...], resolved: Resolution) -> None:
        name = f"{what}/{path_name(path)}" if path_name(path) else what
        sharding = NamedSharding(partitioner.mesh, resolved.spec)
        itemsize = jax.numpy.dtype(leaf.dtype).itemsize
        own, total = math.prod(sharding.shard_shape(leaf.shape)) * itemsize, math.prod(leaf.shape) * itemsize
        copies = partitioner.mesh.size * own // total if total else 1
        spec = "(" + ", ".join("+".join(axes) or "None" for axes in sharded_by(resolved.spec)) + ")"
        rows.append(
            Row(
                name,
                tuple(leaf_names),
                tuple(leaf.shape),
                str(leaf.dtype),
                spec,
                own,
                total,
                copies,
                " ".join(resolved.rules),
            )
        )

    jax.tree_util.tree_map_with_path(add, shapes, names, partitioner.resolve(names, shapes, what))
    return rows


def replicated_share(rows: Sequence[Row]) -> float:
    """Returns the share of a device's bytes that every other device holds as well, in [0, 1]."""
    total = sum(row.bytes_per_device for row in rows)
    whole = sum(row.bytes_per_device for row in rows if row.bytes_per_device == row.total_bytes)
    return whole / total if total else 0.0


def format_rows(rows: Iterable[Row]) -> str:
    """Returns an aligned text table."""
    cells = [("tensor", "axes", "shape", "dtype", "spec", "bytes/device", "copies", "rules")]
    for row in rows:
        axes = ", ".join(name or "-" for name in row.axes)
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append(
            (
                row.name,
                axes,
                shape,
                row.dtype,
                row.spec,
                format_bytes(row.bytes_per_device),
                f"x{row.replicated}",
                row.rule,
            )
        )
    return "\n".join(format_columns(cells))
