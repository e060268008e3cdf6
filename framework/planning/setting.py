"""Makes the `Setting` of a layout's closed forms from a program: its mesh, its parameters and how its loss uses
them."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding

from meshway.framework.interfaces import Model
from meshway.framework.partitioning.partitioner import Partitioner, path_name
from meshway.framework.planning.communication import Setting
from meshway.framework.planning.products import Uses, Weight, find_uses

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

    def trace_loss(self) -> None: ...


def setting_of(program: Program) -> Setting:
    """Returns the setting of a program; traces its loss and compiles nothing.

    Raises:
      UserError: the model does not fit the layout.
    """
    program.trace_loss()
    partitioner = program.partitioner
    shardings = partitioner.state_shardings(program.axes, program.param_shapes, "params")
    paths = jax.tree_util.tree_flatten_with_path(program.param_shapes)[0]
    names = jax.tree.leaves(program.axes, is_leaf=lambda node: isinstance(node, tuple))
    weights = [
        Weight(path_name(path), leaf.shape, leaf.dtype, tuple(name), cuts_of(sharding, len(leaf.shape)))
        for (path, leaf), name, sharding in zip(paths, names, jax.tree.leaves(shardings), strict=True)
    ]
    with partitioner.activate():
        # With a key, as a training step has it: without one, experts have the room of evaluation.
        closed = jax.make_jaxpr(lambda params, batch, key: program.model.loss(params, batch, key)[0])(
            program.param_shapes, program.abstract_batch, jax.random.key(0)
        )
    uses = find_uses(closed, weights)
    return Setting(
        dict(partitioner.mesh.shape),
        token_axes(partitioner),
        weights,
        _optimizer_axes(program, weights),
        uses,
        cutting(partitioner, ("embed", "length"), beside="embed") - token_axes(partitioner),
        cutting(partitioner, ("stage",)),
        cutting(partitioner, ("expert",)) | _expert_axes(weights, partitioner.mesh.shape),
        _gathered_keys(partitioner, uses),
        partitioner.mesh.devices.flat[0].platform,
    )


def cuts_of(sharding: NamedSharding, rank: int) -> tuple[tuple[str, ...], ...]:
    """Returns the mesh axes that cut each dimension."""
    entries = [*sharding.spec, *([None] * rank)][:rank]
    return tuple(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries)


def token_axes(partitioner: Partitioner) -> frozenset[str]:
    """Returns the mesh axes, of more than one device, that cut batch or length inside layers.

    Those that cut the length between layers only (Megatron's sequence parallelism) are left out: there, the devices
    along them compute on the same tokens.
    """
    found = set(partitioner.mesh_axes("batch"))
    for inside in _INSIDE_LAYERS:
        found |= cutting(partitioner, ("batch", "length"), beside=inside)
    return frozenset(found)


def cutting(partitioner: Partitioner, names: Collection[str], beside: str = "") -> frozenset[str]:
    """Returns the mesh axes, of more than one device, that cut one of `names` in an activation the model constrained,
    of those that have the axis `beside` where that is given. Call it once the loss was traced."""
    found: set[str] = set()
    for axes, shape, spec in partitioner.placed:
        if not beside or beside in axes:
            cuts = cuts_of(NamedSharding(partitioner.mesh, spec), len(shape))
            found |= {axis for name, cut in zip(axes, cuts) if name in names for axis in cut}
    return frozenset(axis for axis in found if partitioner.mesh.shape[axis] > 1)


def _gathered_keys(partitioner: Partitioner, uses: Uses) -> list[tuple[tuple[str, ...], float]]:
    """Returns (axes, bytes on a device) of keys and values laid out whole along axes that cut the length of queries."""
    axes = cutting(partitioner, ("length",), beside="heads") - cutting(partitioner, ("kv_length",))
    order = tuple(axis for axis in partitioner.mesh.shape if axis in axes)
    shapes = {(shape, spec) for names, shape, spec in partitioner.placed if "kv_length" in names and len(shape) == 4}
    found = []
    for shape, spec in shapes if order else ():
        shard = NamedSharding(partitioner.mesh, spec).shard_shape(shape)
        found.append((order, float(math.prod(shard) * uses.laid_out.get((shape, spec), 0))))
    return found


def _expert_axes(weights: list[Weight], mesh: Mapping[str, int]) -> frozenset[str]:
    return frozenset(
        axis
        for weight in weights
        for name, cuts in zip(weight.names, weight.cuts)
        for axis in cuts
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
                found[weight.path] = frozenset(axis for axes in cuts_of(sharding, len(leaf.shape)) for axis in axes)
                break
    return found
