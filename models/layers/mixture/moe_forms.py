"""One mixture of experts in each of its forms of dispatch, as pure functions: what `meshway bench moe` compares."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.reports import collecting
from meshway.models.module import Network


class DispatchForms:
    """A `moe.MoeMlp` factory under each value of its `dispatch`, all with the same parameters."""

    def __init__(
        self, layer: Callable[..., Any], d_model: int, names: Sequence[str] = ("all_to_all", "einsum", "dropless")
    ):
        """`names` are the values of `dispatch`, of which the first is what the others are compared with."""
        if not names:
            raise ValueError("DispatchForms.names: nothing to compare")
        self.names, self.d_model = tuple(names), d_model
        self._networks = {name: Network(functools.partial(layer, d_model=d_model, dispatch=name)) for name in names}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters, good for all forms."""
        return self._networks[self.names[0]].init(rng)

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter."""
        return self._networks[self.names[0]].axes()

    def loss(
        self, name: str, params: dict[str, Any], x: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (a scalar that depends on every output, the layer's metrics) of x [batch, length, d_model]."""
        with collecting() as reports:
            y = self._networks[name].bind(params)(x, rng=rng)
        return jnp.mean(jnp.square(y.astype(jnp.float32))) + sum(reports.losses.values()), reports.metrics
