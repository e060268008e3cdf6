"""Makes the `Setting` of a layout's closed forms from a program: its mesh, its parameters and how its loss uses
them."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import NamedSharding

from meshway.framework.axes import sharded_by
from meshway.framework.interfaces import Model
from meshway.framework.partitioning.partitioner import Activations, Partitioner, path_name
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

    def trace_loss(self) -> Activations: ...


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
        Weight(path_name(path), leaf.shape, leaf.dtype, tuple(name), sharded_by(sharding.spec, len(leaf.shape)))
        for (path, leaf), name, sharding in zip(paths, names, jax.tree.leaves(shardings), strict=True)
    ]
    with partitioner.activate() as asked:
        # With a key, as in a training step: without one, experts have the capacity of evaluation.
        closed = jax.make_jaxpr(lambda params, batch, key: program.model.loss(params, batch, key)[0])(
            program.param_shapes, program.abstract_batch, jax.random.key(0)
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
