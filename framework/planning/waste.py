"""Warnings about a layout: replicated state, replicated activations, needless resharding."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from meshway.framework.axes import sharded_by
from meshway.framework.partitioning.partitioner import Activations
from meshway.framework.partitioning.sharded_model import Row
from meshway.framework.planning.collectives import Collective
from meshway.framework.planning.communication import ACTIVATIONS, WEIGHTS, Setting, minimum
from meshway.framework.planning.comparison import role_of
from meshway.framework.terminal import format_bytes

_WRITTEN = ("ppermute", "all_to_all", "psum", "all_gather", "reduce_scatter", "pmax", "ragged_all_to_all")


@dataclasses.dataclass(frozen=True)
class Waste:
    """One warning: what, where, how much, and what to do about it."""

    what: str
    where: str
    how_much: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}, {self.where}: {self.how_much}; {self.advice}"


def state_waste(rows: Iterable[Row], mesh: Mapping[str, int], limit: float) -> list[Waste]:
    """Returns a warning for each mesh axis along which too much of the state is replicated and could be sharded.

    An axis could shard a tensor if it shards no dimension of it yet and divides one.

    Args:
      rows: the tensors of the state (`explain`); those of the batch are ignored.
      mesh: sizes of the mesh's axes.
      limit: the share of a device's bytes above which to warn, between 0 and 1.
    """
    state = [row for row in rows if not row.name.startswith("batch")]
    total = sum(row.bytes_per_device for row in state)
    found = []
    for axis, size in mesh.items():
        same = [row for row in state if size > 1 and _could_shard(row, axis, size, mesh)]
        bytes_same = sum(row.bytes_per_device for row in same)
        if not same or bytes_same <= limit * total:
            continue
        largest = max(same, key=lambda row: row.bytes_per_device)
        found.append(
            Waste(
                "replicated state",
                f"mesh axis {axis}={size}",
                f"{_percent(bytes_same, total)} of the state on a device ({format_bytes(bytes_same)}) is the same on "
                f"all {size}, most of it {largest.name}",
                f"map a name of its axes ({', '.join(name for name in largest.axes if name)}) to {axis!r} in "
                "Layout.parameters, or for the optimizer's state alone in Layout.optimizer",
            )
        )
    return found


def activation_waste(asked: Activations, limit: float) -> list[Waste]:
    """Returns a warning for each mesh axis along which too many of the activations are replicated.

    What counts are the activations that the model constrained, as a trace of its loss recorded them, each as often as
    it was traced (a scanned layer once), in elements on a device.
    """
    mesh = dict(asked.mesh.shape)
    found = []
    for axis, size in mesh.items():
        total = same = 0.0
        kinds: dict[str, float] = {}
        for (names, shape, spec), count in asked.constrained.items():
            axes = {axis for axes in sharded_by(spec) for axis in axes}
            own = count * math.prod(shape) / math.prod(mesh[each] for each in axes)
            total += own
            if axis not in axes:
                same += own
                kind = f"({', '.join(name or '-' for name in names)})"
                kinds[kind] = kinds.get(kind, 0.0) + own
        if size == 1 or same <= limit * total:
            continue
        largest = max(kinds, key=lambda kind: kinds[kind])
        what = "idle mesh axis" if same == total else "replicated activations"
        found.append(
            Waste(
                what,
                f"mesh axis {axis}={size}",
                f"{_percent(same, total)} of the constrained activations are the same on all {size}, most of them "
                f"{largest}",
                f"all {size} compute the same: map a name to {axis!r} in Layout.activations, or make the axis smaller"
                if same == total
                else f"map one of these names to {axis!r} in Layout.activations ('length' with alternatives, as "
                "layouts/model_sequence does)",
            )
        )
    return found


def resharding_waste(setting: Setting, rows: Sequence[Collective], limit: float) -> list[Waste]:
    """Returns warnings about collectives of a compiled step that the layout does not require.

    These are: activations exchanged, permuted or gathered by the compiler although no kernel does so and no rule
    requires it, and weights gathered along axes that shard no tokens. The compiler's own message about that,
    "involuntary full rematerialization", is not read: it is printed for only one way to reshard, and not at all if the
    program is in the compilation cache. The all-gather that it warns of is in the program and found here.

    Args:
      setting: of the program (`comparison.setting_of`).
      rows: its collectives.
      limit: the share of all bytes sent above which to warn, for each kind and set of axes.
    """
    total = sum(row.sent for row in rows)
    groups: dict[tuple[str, tuple[str, ...], str], list[Collective]] = {}
    expected = setting.stream | setting.stages | setting.experts
    for row in rows:
        role = role_of(row, setting)
        unasked = role == ACTIVATIONS and row.kind not in ("all-reduce", "reduce-scatter")
        if unasked and (row.origin.rsplit("/", 1)[-1] in _WRITTEN or set(row.axes) <= expected):
            continue
        stray = role == WEIGHTS and not set(row.axes) & setting.tokens
        if unasked or stray:
            groups.setdefault((role, row.axes, row.kind), []).append(row)
    exchanged: dict[tuple[tuple[str, ...], str], float] = {}  # lookups that are cheapest exchanged
    for term in minimum(setting):
        if "exchanged" in term.reason:
            exchanged[term.axes, term.role] = exchanged.get((term.axes, term.role), 0.0) + term.bytes
    found = []
    for (role, axes, kind), members in groups.items():
        sent = sum(row.sent for row in members)
        if sent - exchanged.get((axes, role), 0.0) <= limit * total:
            continue
        largest = max(members, key=lambda row: row.sent)
        shape = f"{largest.array.dtype}[{','.join(map(str, largest.array.shape))}]"
        found.append(
            Waste(
                f"resharded {role}",
                f"mesh {' x '.join(f'{axis}={setting.mesh[axis]}' for axis in axes)}",
                f"{kind} of {format_bytes(sent)} a device and step ({_percent(sent, total)} of what is sent), the "
                f"largest {shape} at {largest.origin or largest.instruction}",
                "constrain the result there to the sharding of its use, or change the rules of its axes",
            )
        )
    return found


def _could_shard(row: Row, axis: str, size: int, mesh: Mapping[str, int]) -> bool:
    dim_axes = [rule.partition("->")[2].split("+") for rule in row.rule.split(" ") if rule]
    if any(axis in sharded for sharded in dim_axes):
        return False
    left = [
        length // math.prod(mesh.get(each, 1) for each in sharded)
        for length, sharded in zip(row.shape, dim_axes, strict=False)
    ]
    return any(length % size == 0 and length >= size for length in left)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"
