"""Compares what a compiled step sends with the minimum of closed forms, whose `Setting` a program gives."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding

from meshway.framework.axes import KERNEL_RING, sharded_by
from meshway.framework.interfaces import Model
from meshway.framework.partitioning.partitioner import Activations, Partitioner, path_name
from meshway.framework.planning.collectives import Collective
from meshway.framework.planning.communication import (
    ACTIVATIONS,
    GRADIENTS,
    INPUTS,
    UPDATES,
    WEIGHTS,
    Setting,
    Term,
    balancing,
    gradient_bytes,
    minimum,
    unmerged,
)
from meshway.framework.planning.products import Uses, Weight, find_uses, weights_of
from meshway.framework.terminal import format_bytes, listed

SCALARS, OPTIMIZER = "scalars", "optimizer"
TOLERANCE = 0.005  # relative: larger differences are explained


@dataclasses.dataclass(frozen=True)
class Line:
    """The bytes that a device sends in a step for one role over one set of mesh axes, as compiled and at least.

    Attributes:
      axes: the mesh axes, in the mesh's order.
      role: what is sent.
      calls: such as `12 all-reduce`.
      measured, minimum: bytes.
      why: reasons for the difference; empty if there is none.
    """

    axes: tuple[str, ...]
    role: str
    calls: str
    measured: float
    minimum: float
    why: tuple[str, ...] = ()


def compare(setting: Setting, rows: Sequence[Collective], microbatches: int = 1) -> list[Line]:
    """Returns a line for each role and set of axes, for each set those that send most first."""
    terms = minimum(setting)
    found: dict[tuple[tuple[str, ...], str], list[Collective]] = {}
    sums = {term.axes for term in terms if term.role == GRADIENTS}
    for row in rows:
        role = role_of(row, setting)
        # A sum over two axes may be computed over one after the other: both are parts of it.
        wider = (
            [axes for axes in sums if set(row.axes) < set(axes)] if role == GRADIENTS and row.axes not in sums else []
        )
        found.setdefault((wider[0] if wider else row.axes, role), []).append(row)
    keys = dict.fromkeys([*found, *[(term.axes, term.role) for term in terms]])
    lines = []
    for axes, role in keys:
        mine = found.get((axes, role), [])
        due = [term for term in terms if (term.axes, term.role) == (axes, role)]
        measured, least = sum(row.sent for row in mine), sum(term.bytes for term in due)
        why = _why(setting, role, mine, due, microbatches)
        lines.append(Line(axes, role, _calls(mine), measured, least, tuple(why)))
    return sorted(lines, key=lambda line: (line.axes, -line.measured))


def role_of(row: Collective, setting: Setting) -> str:
    """Returns the role of a collective, from the sources of its payload, its axes and its origin."""
    if row.array.size == 1:
        return SCALARS
    if any(source.startswith("state.opt_state") for source in row.sources):
        return UPDATES if row.kind == "all-gather" else OPTIMIZER
    if row.sources == {"state.params"}:
        return WEIGHTS
    if row.sources <= {"batch"}:
        return INPUTS
    if row.origin and "jvp" not in row.origin:
        return OPTIMIZER
    if row.kind == "collective-permute" and KERNEL_RING in row.origin:
        return GRADIENTS
    if row.origin.rsplit("/", 1)[-1].startswith("reduce_scatter"):  # of a kernel; XLA's own have other names
        return ACTIVATIONS
    if row.kind in ("all-reduce", "reduce-scatter") and set(row.axes) <= setting.tokens:
        # A payload that has no parameter's size and spans only some of the token axes is an activation.
        return GRADIENTS if row.array.size in setting.gradient_sizes or set(row.axes) == setting.tokens else ACTIVATIONS
    return ACTIVATIONS


def _why(setting: Setting, role: str, rows: Sequence[Collective], due: Sequence[Term], microbatches: int) -> list[str]:
    measured, least = sum(row.sent for row in rows), sum(term.bytes for term in due)
    if abs(measured - least) <= TOLERANCE * max(measured, least):
        return []
    if measured < least:
        reasons = ", ".join(dict.fromkeys(term.reason for term in due))
        return [
            f"{format_bytes(least - measured)} less than the formula ({reasons}): done in another way, see the other "
            "lines"
        ]
    why: list[str] = []
    narrow = _narrow(setting, rows)
    if narrow:
        widens = " (XLA:CPU widens it)" if setting.platform == "cpu" else ""
        rows = [dataclasses.replace(row, array=dataclasses.replace(row.array, dtype=narrow)) for row in rows]
        half = measured - sum(row.sent for row in rows)
        why = [f"{format_bytes(half)} for sending float32, although the step computes in {narrow}{widens}"]
    if role == GRADIENTS:
        return why + _why_gradients(setting, rows, due, microbatches)
    if role == WEIGHTS:
        return why + _why_weights(setting, rows, due, microbatches)
    if role == ACTIVATIONS:
        return why + _why_activations(setting, rows, due)
    return [] if role == SCALARS else [_largest(rows)]


def _why_gradients(setting: Setting, rows: Sequence[Collective], due: Sequence[Term], microbatches: int) -> list[str]:
    why = []
    excess = sum(row.sent for row in rows) - sum(term.bytes for term in due)
    axes_of_rows = list(dict.fromkeys(row.axes for row in rows))
    if len(axes_of_rows) > 1 and due:
        each = " and ".join(
            f"over {'+'.join(axes)} {format_bytes(sum(row.sent for row in rows if row.axes == axes))}"
            for axes in axes_of_rows
        )
        return [f"summed over one axis after the other ({each}) instead of over all at once"]
    reduced = [row for row in rows if row.kind == "all-reduce"]
    if any("reduce-scatter" in term.reason for term in due) and reduced:
        half = sum(row.sent for row in reduced) / 2
        forms_none = " (XLA:CPU forms none by itself)" if setting.platform == "cpu" else ""
        why.append(
            f"{format_bytes(half)} for {_number(reduced)} all-reduced where a reduce-scatter would do{forms_none}"
        )
        excess -= half
    steps = max((times for axes, _, times in setting.uses.carried if set(axes) <= setting.stages), default=1)
    for number, name in ((microbatches, "microbatches"), (steps, "time steps of the pipeline")):
        if number > 1:
            often = sum(row.sent * (1 - 1 / number) for row in rows if row.count % number == 0)
            why.append(f"{format_bytes(often)} for summing over the mesh in each of {number} {name}")
            excess -= often
    strange = [row for row in rows if row.array.size not in setting.gradient_sizes]
    if strange:
        why.append(f"{_largest(strange)}: summed over the mesh in a shape that no parameter has")
        excess -= sum(row.sent for row in strange)
    slack = TOLERANCE * sum(row.sent for row in rows)
    for path in dict.fromkeys(lookup.weight.path for lookup in setting.uses.lookups):
        num_uses = _num_uses(setting, path)
        again = min(excess, (num_uses - 1) * gradient_bytes(setting, path, rows[0].axes))
        if again > slack:
            before = ", as XLA:CPU does" if setting.platform == "cpu" else ""
            why.append(
                f"{format_bytes(again)} for {path}, used in {num_uses} places: the gradient of each is summed over the "
                f"mesh before they are added{before}"
            )
            excess -= again
    if excess > slack:
        why.append(f"{format_bytes(excess)} more, of {_largest(rows)}")
    return why


def _why_weights(setting: Setting, rows: Sequence[Collective], due: Sequence[Term], microbatches: int) -> list[str]:
    if not due and all(set(row.axes) <= setting.stages | setting.experts for row in rows):
        return [f"weights moved along the axes of stages or experts: {_largest(rows)}"]
    if not due:
        return [f"no product needs a weight gathered over these axes, which shard no tokens: {_largest(rows)}"]
    least = sum(term.bytes for term in due)
    parts = {
        "forward": [row for row in rows if "transpose(" not in row.origin],
        "backward": [row for row in rows if "transpose(" in row.origin],
    }
    times = [
        f"{sum(row.sent for row in part) / least / microbatches:.2f} times {name}"
        for name, part in parts.items()
        if sum(row.sent for row in part) / least / microbatches >= 0.005
    ]
    each = f" in each of {microbatches} microbatches" if microbatches > 1 else ""
    return [f"gathered {' and '.join(times)}{each}; once a step if the gathered weights were kept"]


def _why_activations(setting: Setting, rows: Sequence[Collective], due: Sequence[Term]) -> list[str]:
    excess = sum(row.sent for row in rows) - sum(term.bytes for term in due)
    why = []
    again = [row for row in rows if "rematted_computation" in row.origin]
    if again:
        sent = sum(row.sent for row in again)
        why.append(f"{format_bytes(sent)} for layers recomputed in the backward pass (remat)")
        excess -= sent
    if any("ring" in term.reason for term in due) and (halves := min(excess, balancing(setting))) > 0:
        why.append(
            f"{format_bytes(halves)} for halves that change places, so that the causal mask is balanced over the "
            "devices"
        )
        excess -= halves
    separate = unmerged(setting) if any("column-parallel" in term.reason for term in due) else 0.0
    reduced = [row for row in rows if row.kind == "all-reduce" and set(row.axes) <= setting.stream]
    if reduced:
        half = sum(row.sent for row in reduced) / 2
        forms_none = " (XLA:CPU forms none by itself)" if setting.platform == "cpu" else ""
        why.append(
            f"{format_bytes(half)} for {_number(reduced)} all-reduced where a reduce-scatter would do{forms_none}"
        )
        excess, separate = excess - half, separate / 2
    if separate:
        before = ", as XLA:CPU does" if setting.platform == "cpu" else ""
        why.append(
            f"{format_bytes(separate)} where several products read one input: the gradient of each is summed over the "
            f"mesh before they are added{before}, instead of after"
        )
        excess -= separate
    if not due:
        why.append(f"no rule asks for it: {_largest(rows)}")
    elif excess > TOLERANCE * sum(row.sent for row in rows):
        reasons = " ".join(term.reason for term in due)
        expected = [row for row in rows if _is_expected(row, reasons)]
        rest = [row for row in rows if row not in expected] or rows
        why.append(f"{format_bytes(excess)} more, of {_largest(rest)}")
    return why


def _is_expected(row: Collective, reasons: str) -> bool:
    """Whether the closed forms' reasons explain a collective."""
    if row.kind == "collective-permute":
        return "ring" in reasons or "stage" in reasons or "products" in reasons
    if row.kind == "all-reduce":
        return "products" in reasons and "dot_general" in row.origin
    return row.kind in reasons


def _num_uses(setting: Setting, path: str) -> int:
    """Returns how many lookups and products of the loss use a parameter."""
    weights = [use.weight for use in setting.uses.lookups] + [use.weight for use in setting.uses.products]
    return sum(weight.path == path for weight in weights)


def _narrow(setting: Setting, rows: Sequence[Collective]) -> str:
    """Returns the HLO name of the type the step computes in, if all rows send float32 and it is narrower; else ""."""
    used = {jax.numpy.dtype(dtype) for dtype in setting.uses.dtypes.values()}
    narrow = [dtype for dtype in used if dtype.itemsize < 4]
    if not narrow or any(row.array.dtype != "f32" for row in rows):
        return ""
    return {"bfloat16": "bf16", "float16": "f16"}.get(str(narrow[0]), "")


def _calls(rows: Sequence[Collective]) -> str:
    counts: dict[str, int] = {}
    for _, kind, count in dict.fromkeys((row.instruction, row.kind, row.count) for row in rows):
        counts[kind] = counts.get(kind, 0) + count
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _number(rows: Iterable[Collective]) -> str:
    return f"{sum(row.count for row in rows)} arrays"


def _largest(rows: Sequence[Collective], limit: int = 2) -> str:
    """Returns a description of the collectives that send most, similar ones together."""
    groups: dict[tuple[str, str, str], list[Collective]] = {}
    for row in rows:
        shape = f"{row.array.dtype}[{','.join(map(str, row.array.shape))}]"
        operation = row.origin.rsplit("/", 1)[-1]  # of arrays that travel together the metadata names all operations
        side = (
            "combined" if ":" in row.origin else f"{operation}, backward" if "transpose(" in row.origin else operation
        )
        groups.setdefault((row.kind, shape, side), []).append(row)
    order = sorted(groups.items(), key=lambda item: -sum(row.sent for row in item[1]))
    shown = [
        f"{sum(row.count for row in group)} {kind} of {shape} ({where}): {format_bytes(sum(row.sent for row in group))}"
        for (kind, shape, where), group in order
    ]
    return listed(shown, limit, "; ")


def ratio(measured: float, least: float) -> str:
    """Returns measured / least as text, "-" if nothing need be sent."""
    if not least:
        return "-"
    return f"{measured / least:.2f}"


_INSIDE_LAYERS = ("heads", "kv_heads", "mlp")


class Program(Protocol):
    """The attributes of a `training.program.TrainProgram` that are used here."""

    model: Model
    partitioner: Partitioner
    axes: Any
    param_shapes: Any

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    @property
    def state_shapes(self) -> Any: ...

    @property
    def state_shardings(self) -> Any: ...

    def trace_loss(self) -> Activations: ...


def setting_of(program: Program) -> Setting:
    """Returns the setting of a program; traces its loss and compiles nothing.

    Raises:
      UserError: the model does not fit the layout.
    """
    program.trace_loss()
    partitioner = program.partitioner
    shardings = partitioner.state_shardings(program.axes, program.param_shapes, "params")
    weights = weights_of(program.param_shapes, program.axes, shardings)
    key = jax.random.key(0)  # made on a device that is here: those of the mesh may not be
    # Products in rings send what the compiler's do, inside of `shard_map`, where uses of parameters are not read.
    with partitioner.activate("compiler") as asked:
        # With a key, as in a training step: without one, experts have the capacity of evaluation.
        closed = jax.make_jaxpr(lambda params, batch, key: program.model.loss(params, batch, key)[0])(
            program.param_shapes, program.abstract_batch, key
        )
    uses = find_uses(closed, weights)
    return Setting(
        dict(partitioner.mesh.shape),
        token_axes(asked),
        weights,
        _optimizer_axes(program, weights),
        uses,
        sharding_axes(asked, ("embed", "length"), beside="embed") - token_axes(asked),
        sharding_axes(asked, ("stage",)),
        sharding_axes(asked, ("expert",)) | _expert_axes(weights, partitioner.mesh.shape),
        _gathered_keys(asked, uses),
        partitioner.mesh.devices.flat[0].platform,
    )


def token_axes(asked: Activations) -> frozenset[str]:
    """Returns the mesh axes, of more than one device, that shard batch or length inside layers.

    Those that shard the length between layers only (Megatron's sequence parallelism) are left out: there, the devices
    along them compute on the same tokens.
    """
    found = set(asked.mesh_axes("batch"))
    for inside in _INSIDE_LAYERS:
        found |= sharding_axes(asked, ("batch", "length"), beside=inside)
    return frozenset(found)


def sharding_axes(asked: Activations, names: Collection[str], beside: str = "") -> frozenset[str]:
    """Returns the mesh axes, of more than one device, that shard one of `names` in an activation the model constrained,
    of those that have the axis `beside` where that is given."""
    found: set[str] = set()
    for axes, shape, spec in asked.constrained:
        if not beside or beside in axes:
            dim_axes = sharded_by(spec, len(shape))
            found |= {axis for name, sharded in zip(axes, dim_axes) if name in names for axis in sharded}
    return frozenset(axis for axis in found if asked.mesh.shape[axis] > 1)


def _gathered_keys(asked: Activations, uses: Uses) -> list[tuple[tuple[str, ...], float]]:
    """Returns (axes, bytes on a device) of keys and values replicated over axes that shard the length of queries."""
    axes = sharding_axes(asked, ("length",), beside="heads") - sharding_axes(asked, ("kv_length",))
    order = tuple(axis for axis in asked.mesh.shape if axis in axes)
    shapes = {(shape, spec) for names, shape, spec in asked.constrained if "kv_length" in names and len(shape) == 4}
    found = []
    for shape, spec in shapes if order else ():
        shard = NamedSharding(asked.mesh, spec).shard_shape(shape)
        found.append((order, float(math.prod(shard) * uses.laid_out.get((shape, spec), 0))))
    return found


def _expert_axes(weights: list[Weight], mesh: Mapping[str, int]) -> frozenset[str]:
    return frozenset(
        axis
        for weight in weights
        for name, dim_axes in zip(weight.names, weight.dim_axes)
        for axis in dim_axes
        if name == "expert" and mesh[axis] > 1
    )


def _optimizer_axes(program: Program, weights: list[Weight]) -> dict[str, frozenset[str]]:
    """Returns parameter -> the axes that shard its optimizer state: leaves of its shape whose path ends in its own."""
    shapes = jax.tree_util.tree_flatten_with_path(program.state_shapes.opt_state)[0]
    shardings = jax.tree.leaves(program.state_shardings.opt_state)
    found: dict[str, frozenset[str]] = {}
    for weight in weights:
        for (path, leaf), sharding in zip(shapes, shardings, strict=True):
            if leaf.shape == weight.shape and path_name(path).endswith(weight.path):
                found[weight.path] = frozenset(axis for axes in sharded_by(sharding.spec) for axis in axes)
                break
    return found
