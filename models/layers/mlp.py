"""Feed-forward layers."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.linear import Linear
from meshway.models.layers.norm import dropout

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,  # the tanh form, as in T5 1.1
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


class Mlp(nnx.Module):
    """wo(product over i of a_i(wi_i(x))) for activations a_i: one is a plain MLP, two are gated (Shazeer 2020, eq.
    5-6)."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        rngs: nnx.Rngs,
        activations: Sequence[str] = ("gelu", "linear"),
        use_bias: bool = False,
        dropout_rate: float = 0.0,
    ):
        """`activations` name functions of ACTIVATIONS; `use_bias` adds a bias to each product.

        Raises:
          ValueError: an unknown activation.
        """
        unknown = [name for name in activations if name not in ACTIVATIONS]
        if unknown or not activations:
            raise ValueError(f"Mlp.activations: unknown {unknown}; known are {sorted(ACTIVATIONS)}")
        for i in range(len(activations)):
            setattr(self, f"wi_{i}", Linear({"embed": d_model}, {"mlp": d_ff}, rngs=rngs, use_bias=use_bias))
        self.wo = Linear({"mlp": d_ff}, {"embed": d_model}, rngs=rngs, use_bias=use_bias)
        self.activations, self.dropout_rate = tuple(activations), dropout_rate

    def __call__(self, x: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
        """x [batch, length, d_model] -> the same shape."""
        x = constrain(x, ("batch", "length", "embed"), free_for="mlp")
        hidden = jnp.ones((), x.dtype)
        for i, name in enumerate(self.activations):
            hidden = hidden * ACTIVATIONS[name](getattr(self, f"wi_{i}")(x))
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return constrain(self.wo(dropout(hidden, self.dropout_rate, rng)), ("batch", "length", "embed"))
