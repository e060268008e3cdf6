"""The logical axes of an optimizer's state, for any optax transformation: they determine its sharding.

optax states consist of scalars and of trees like the parameters'. A state array belongs to the parameter whose path is
the end of its own path, and whose shape it has.
"""

from collections.abc import Callable, Container
from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, keystr, tree_flatten_with_path

from meshway.framework.axes import Names
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.adafactor import AdafactorState, factored_slots, without_dims
from meshway.framework.trees import flatten

Slots = dict[str, tuple[tuple[int, ...], Names]]  # attribute of a state -> (shape, axes) for one parameter

# State that belongs to no parameter and has more than one entry, by attribute name: replicated.
REPLICATED_STATE = {
    "ns_coeffs": "coefficients of Muon's Newton-Schulz iteration",
    "rng_key": "raw random key of optax.add_noise and similar transformations",
}


def transformation_axes(state: Any, axes: Axes, shapes: Params) -> Any:
    """Returns the logical axes of each array of an optax state, as a tree of its structure.

    Each leaf is a tuple of names, () for a scalar and (None,) for a placeholder [1].

    Args:
      state: the state, or its shapes.
      axes: the logical axis names of each parameter that the state belongs to.
      shapes: the same tree of arrays, or of ShapeDtypeStructs.

    Raises:
      UserError: an array that is neither shaped like its parameter, nor a known factored moment of it, nor a
        scalar or placeholder.
    """
    names, arrays = flatten(axes), flatten(shapes)
    parameters = {path: (tuple(array.shape), names[path]) for path, array in arrays.items()}
    nodes, treedef = tree_flatten_with_path(state, is_leaf=lambda node: type(node) in _FACTORED)
    found = []
    for path, node in nodes:
        leaves, structure = tree_flatten_with_path(node)
        slots = _FACTORED.get(type(node), _no_slots)
        found.append(
            jax.tree.unflatten(structure, [_leaf_axes(path + inner, leaf, parameters, slots) for inner, leaf in leaves])
        )
    return jax.tree.unflatten(treedef, found)


def counted_from(state: Any, step: int) -> Any:
    """Returns an optimizer's state whose schedules have counted `step` updates; what its moments have counted stays.

    Args:
      state: an `OptimizerState`, of sharded arrays.
      step: the number of updates.
    """

    def node(each: Any) -> Any:
        is_schedule = isinstance(each, optax.ScaleByScheduleState)
        return optax.ScaleByScheduleState(counter_like(each.count, step)) if is_schedule else each

    state = state._replace(step=counter_like(state.step, step))
    return jax.tree.map(node, state, is_leaf=lambda each: isinstance(each, optax.ScaleByScheduleState))


def counter_like(leaf: jax.Array, step: int) -> jax.Array:
    """Returns a count [] with the dtype and the sharding of another."""
    return jax.make_array_from_callback((), leaf.sharding, lambda index: np.asarray(step, leaf.dtype))


def _leaf_axes(
    path: tuple[Any, ...],
    leaf: Any,
    parameters: dict[str, tuple[tuple[int, ...], Names]],
    slots: Callable[[Names, tuple[int, ...]], Slots],
) -> Names:
    parameter = _parameter_of(path, parameters)
    attribute = next((key.name for key in reversed(path) if isinstance(key, GetAttrKey)), "")
    if parameter is not None:
        shape, names = parameters[parameter]
        if leaf.shape == shape:
            return names
        expected, factored_names = slots(names, shape).get(attribute, (None, ()))
        if leaf.shape == expected:
            return factored_names
    if leaf.ndim == 0:
        return ()
    if leaf.shape == (1,) or (parameter is None and attribute in REPLICATED_STATE):
        return (None,) * leaf.ndim
    owner = f"parameter {parameter!r} of shape {parameters[parameter][0]}" if parameter else "no parameter"
    raise UserError(
        f"optimizer state {keystr(path)} of shape {leaf.shape} belongs to {owner}: its logical axes, "
        "hence its sharding, are unknown; use an optimizer whose state is shaped like the parameters"
    )


def _parameter_of(path: tuple[Any, ...], parameters: Container[str]) -> str | None:
    """Returns the parameter with the longest path that is the end of a state leaf's path."""
    keys: list[str] = []
    for key in reversed(path):
        if not isinstance(key, DictKey):
            break
        keys.insert(0, str(key.key))
    suffixes = ("/".join(keys[start:]) for start in range(len(keys)))
    return next((suffix for suffix in suffixes if suffix in parameters), None)


def _no_slots(names: Names, shape: tuple[int, ...]) -> Slots:
    return {}


def _optax_slots(names: Names, shape: tuple[int, ...]) -> Slots:
    """Slots of optax.adafactor: v_row lacks the largest dimension, v_col the second largest."""
    if len(shape) < 2:
        return {}
    second, largest = (int(dim) for dim in np.argsort(shape)[-2:])
    return {
        slot: (without_dims(shape, (dim,)), without_dims(names, (dim,)))
        for slot, dim in (("v_row", largest), ("v_col", second))
    }


# State nodes with factored moments.
_FACTORED: dict[type, Callable[[Names, tuple[int, ...]], Slots]] = {
    AdafactorState: factored_slots,
    optax.FactoredState: _optax_slots,
}
