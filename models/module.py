"""The only file that depends on how flax.nnx stores parameters: a module factory becomes functions on plain dicts.

nnx objects never cross a `jit` boundary: the framework sees nested dicts of arrays beside a tree of axis
names, and `Network.bind` rebuilds the module inside the trace, where it costs nothing at run time.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import qwix
from flax import nnx


class NetworkFactory(Protocol):
    """A module class with every argument but the random streams bound, as gin makes it."""

    def __call__(self, *, rngs: nnx.Rngs) -> nnx.Module: ...


class Param(nnx.Param):
    """A parameter; its metadata `axes` is a logical axis name, or None, for each dimension."""


def param(value: jax.Array, axes: tuple[str | None, ...], summed: tuple[str, ...] = ()) -> Param:
    """Declares a parameter with its logical axes, None for a dimension that is never sharded.

    Args:
      value: its initial value.
      axes: the names.
      summed: those of the axes that products with it sum over. One that names any may be quantised, with a scale for
        each entry of the other axes, and is read by `value_of`.

    Raises:
      ValueError: the number of names differs from the rank.
    """
    if value.ndim != len(axes):
        raise ValueError(f"a parameter of shape {value.shape} was declared with axes {axes}")
    return Param(value, axes=axes, summed=summed)


def value_of(parameter: nnx.Param, dtype: Any) -> jax.Array:
    """Returns the value of a parameter in `dtype`, of a quantised one (`qwix.QArray`) what it stands for."""
    value = parameter[...]
    return jnp.asarray(qwix.dequantize(value) if isinstance(value, qwix.QArray) else value, dtype)


class Network:
    """A module factory as pure functions: `init`, `axes` and `bind`."""

    def __init__(self, factory: NetworkFactory):
        self._factory = factory

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters as nested dicts with string keys."""
        return nnx.to_pure_dict(nnx.state(self._factory(rngs=nnx.Rngs(params=rng)), nnx.Param))

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter, a tree of the structure of `init`.

        Raises:
          ValueError: a parameter was declared without axes (use `module.param`).
        """
        _, state = self._abstract
        axes: dict[str, Any] = {}
        for path, variable in nnx.to_flat_state(state):
            names = variable.get_metadata().get("axes")
            if names is None:
                raise ValueError(
                    f"parameter {'/'.join(map(str, path))} has no logical axes; declare it by module.param"
                )
            node = axes
            *parents, last = map(str, path)
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = names
        return axes

    def stacked(self) -> list[str]:
        """Returns the '/'-joined paths of the parameters that a `Stack` stores as [layers, ...]: `bind` takes each of
        them as a tuple of one array a layer, too."""
        flat = nnx.to_flat_state(self._abstract[1])
        return ["/".join(map(str, path)) for path, variable in flat if variable.get_metadata().get("stacked")]

    def summed(self) -> dict[str, tuple[str, ...]]:
        """Returns, by '/'-joined path, the axes that products with a parameter sum over: `bind` takes each of these
        quantised, too, as a `qwix.QArray`."""
        flat = nnx.to_flat_state(self._abstract[1])
        found = {"/".join(map(str, path)): variable.get_metadata().get("summed") for path, variable in flat}
        return {path: axes for path, axes in found.items() if axes}

    def bind(self, params: dict[str, Any]) -> Any:
        """Returns the module holding `params`: call its methods within the same trace."""
        graphdef, abstract = self._abstract
        state = jax.tree.map(lambda leaf: leaf, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    @functools.cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._factory(rngs=nnx.Rngs(params=jax.random.key(0)))))
