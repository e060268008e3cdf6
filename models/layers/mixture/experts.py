"""The experts' stacked parameters, and products of rows sorted by expert."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.layers.integer_products import IntegerProduct
from meshway.models.layers.mlp import ACTIVATIONS, fan_in_init
from meshway.models.module import param, value_of

# (x, weight) -> product, each row of x with the weight of its own expert.
Product = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts' parameters in the dtype of activations.

    Attributes:
      inputs: one array [experts, d_model, d_ff] an activation.
      output: [experts, d_ff, d_model].
      activations: names of `mlp.ACTIVATIONS`.
      products: computes products in integers, if not None.
    """

    inputs: tuple[jax.Array, ...]
    output: jax.Array
    activations: tuple[str, ...]
    products: IntegerProduct | None = None

    def hidden(self, x: jax.Array, product: Product) -> jax.Array:
        """Returns the product over activations a_i of a_i(x wi_i), [..., d_ff]."""
        hidden = jnp.ones((), x.dtype)
        for name, weight in zip(self.activations, self.inputs, strict=True):
            hidden = hidden * ACTIVATIONS[name](product(x, weight))
        return hidden


jax.tree_util.register_dataclass(ExpertWeights, ["inputs", "output"], ["activations", "products"])


class Experts(nnx.Module):
    """Parameters wi_0, wi_1 .. [expert, embed, mlp] and wo [expert, mlp, embed], initialised as those of an `Mlp`.

    Raises:
      ValueError: an unknown activation.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        activations: Sequence[str],
        *,
        rngs: nnx.Rngs,
        products: IntegerProduct | None = None,
    ):
        unknown = [name for name in activations if name not in ACTIVATIONS]
        if unknown or not activations:
            raise ValueError(f"MoeMlp.activations: unknown {unknown}; known are {sorted(ACTIVATIONS)}")

        def stacked(rows: int, columns: int) -> jax.Array:
            keys = jax.random.split(rngs.params(), num_experts)
            return jax.vmap(lambda key: fan_in_init()(1)(key, (rows, columns), jnp.float32))(keys)

        for i in range(len(activations)):
            setattr(self, f"wi_{i}", param(stacked(d_model, d_ff), ("expert", "embed", "mlp"), ("embed",)))
        self.wo = param(stacked(d_ff, d_model), ("expert", "mlp", "embed"), ("mlp",))
        self.activations, self.products = tuple(activations), products

    def weights(self, dtype: jnp.dtype) -> ExpertWeights:
        """Returns the parameters, cast to `dtype`."""
        inputs = tuple(value_of(getattr(self, f"wi_{i}"), dtype) for i in range(len(self.activations)))
        return ExpertWeights(inputs, value_of(self.wo, dtype), self.activations, self.products)


@jax.custom_vjp
def gather_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns y[i] = x[index[i]], zeros where `index` is past the end.

    The gradient of a gather is a scatter, which runs row after row; with `inverse` it is a gather instead.

    Args:
      x: [rows, features].
      index: int32 [taken].
      inverse: int32 [rows, copies]: every i with index[i] == row; unused entries are past the end.
    """
    del inverse
    return _take(x, index)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(x, index), inverse


def _backward(inverse: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    copies = [_take(g, inverse[:, i]) for i in range(inverse.shape[1])]
    return functools.reduce(jnp.add, copies), None, None


gather_rows.defvjp(_forward, _backward)


class Sorted(NamedTuple):
    """The choices of tokens sorted by expert, stably.

    Attributes:
      expert: int32 [rows], in order.
      order: int32 [rows], the choice in each row; the choices of a token are adjacent in the unsorted order.
      inverse_order: int32 [rows], the row of each choice.
      sizes: int32 [experts], how many rows each expert has.
    """

    expert: jax.Array
    order: jax.Array
    inverse_order: jax.Array
    sizes: jax.Array

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Each choice's token: [tokens, features] -> [rows, features], sorted."""
        copies = self.inverse_order.reshape(tokens.shape[0], -1)
        return gather_rows(tokens, self.order // copies.shape[1], copies)

    def choices(self, rows: jax.Array) -> jax.Array:
        """Back from sorted rows to choices, [rows, features] both."""
        return gather_rows(rows, self.inverse_order, self.order[:, None])


def sort_by_expert(expert: jax.Array, num_experts: int) -> Sorted:
    """Sorts choices, int32 [rows], by expert; those of `num_experts` and above come last and are not counted in
    `sizes`."""
    ids = jnp.arange(expert.shape[0], dtype=jnp.int32)
    expert, order = jax.lax.sort((expert, ids), num_keys=1, is_stable=True)
    inverse_order = jnp.zeros_like(order).at[order].set(ids, unique_indices=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Sorted(expert, order, inverse_order, sizes)


def through_experts(tokens: jax.Array, by_expert: Sorted, weights: ExpertWeights, mask: jax.Array | None) -> jax.Array:
    """Passes tokens [tokens, d_model] through the experts they chose.

    Args:
      tokens: each with the same number of choices.
      by_expert: the choices.
      weights: of the experts counted in `by_expert.sizes`.
      mask: dropout's, scaled, of the sorted rows, [rows, d_ff]; or None.

    Returns:
      the experts' outputs [rows, d_model], by choice; zeros for choices of experts that are not counted.
    """

    def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
        if weights.products is not None:
            return weights.products.of_sorted(rows, weight, by_expert.sizes)
        return jax.lax.ragged_dot(rows, weight, by_expert.sizes)

    hidden = weights.hidden(by_expert.rows(tokens), product)
    if mask is not None:
        hidden = hidden * mask.astype(hidden.dtype)
    counted = by_expert.expert < by_expert.sizes.shape[0]
    return by_expert.choices(jnp.where(counted[:, None], product(hidden, weights.output), 0))
