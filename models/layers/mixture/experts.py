"""The experts themselves: feed-forward layers of one shape, stacked."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.layers.linear import fan_in_init
from meshway.models.layers.mlp import ACTIVATIONS
from meshway.models.module import param

# (x, weight) -> product, each row of x with the weight of its own expert.
Product = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts' parameters in the dtype of activations.

    Attributes:
      inputs: one array [experts, d_model, d_ff] an activation.
      output: [experts, d_ff, d_model].
      activations: names of `mlp.ACTIVATIONS`.
    """

    inputs: tuple[jax.Array, ...]
    output: jax.Array
    activations: tuple[str, ...]

    def hidden(self, x: jax.Array, product: Product) -> jax.Array:
        """Returns the product over activations a_i of a_i(x wi_i), [..., d_ff]."""
        hidden = jnp.ones((), x.dtype)
        for name, weight in zip(self.activations, self.inputs, strict=True):
            hidden = hidden * ACTIVATIONS[name](product(x, weight))
        return hidden


jax.tree_util.register_dataclass(ExpertWeights, ["inputs", "output"], ["activations"])


class Experts(nnx.Module):
    """Parameters wi_0, wi_1 .. [expert, embed, mlp] and wo [expert, mlp, embed], initialised as an `Mlp`'s are."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, activations: Sequence[str], *, rngs: nnx.Rngs):
        unknown = [name for name in activations if name not in ACTIVATIONS]
        if unknown or not activations:
            raise ValueError(f"MoeMlp.activations: unknown {unknown}; known are {sorted(ACTIVATIONS)}")

        def stacked(rows: int, columns: int) -> jax.Array:
            keys = jax.random.split(rngs.params(), num_experts)
            return jax.vmap(lambda key: fan_in_init()(1)(key, (rows, columns), jnp.float32))(keys)

        for i in range(len(activations)):
            setattr(self, f"wi_{i}", param(stacked(d_model, d_ff), ("expert", "embed", "mlp")))
        self.wo = param(stacked(d_ff, d_model), ("expert", "mlp", "embed"))
        self.activations = tuple(activations)

    def weights(self, dtype: jnp.dtype) -> ExpertWeights:
        """Returns the parameters, cast to `dtype`."""
        inputs = tuple(getattr(self, f"wi_{i}")[...].astype(dtype) for i in range(len(self.activations)))
        return ExpertWeights(inputs, self.wo[...].astype(dtype), self.activations)
