"""Grouped products: rows sorted by expert, so that each expert multiplies as many as chose it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from meshway.models.layers.mixture.experts import ExpertWeights
from meshway.models.layers.mixture.gather import gather_rows


class Sorted(NamedTuple):
    """The choices of tokens sorted by expert, stably.

    Attributes:
      expert: int32 [rows], in order.
      order: int32 [rows], which choice each row is; those of a token follow one another.
      place: int32 [rows], which row each choice is.
      sizes: int32 [experts], how many rows each expert has.
    """

    expert: jax.Array
    order: jax.Array
    place: jax.Array
    sizes: jax.Array

    def rows(self, tokens: jax.Array) -> jax.Array:
        """Each choice's token: [tokens, features] -> [rows, features], sorted."""
        copies = self.place.reshape(tokens.shape[0], -1)
        return gather_rows(tokens, self.order // copies.shape[1], copies)

    def choices(self, rows: jax.Array) -> jax.Array:
        """Back from sorted rows to choices, [rows, features] both."""
        return gather_rows(rows, self.place, self.order[:, None])


def sort_by_expert(expert: jax.Array, num_experts: int) -> Sorted:
    """Sorts choices, int32 [rows], by expert; those of `num_experts` and above come last and are in no size."""
    ids = jnp.arange(expert.shape[0], dtype=jnp.int32)
    expert, order = jax.lax.sort((expert, ids), num_keys=1, is_stable=True)
    place = jnp.zeros_like(order).at[order].set(ids, unique_indices=True)
    sizes = jnp.sum(expert[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    return Sorted(expert, order, place, sizes)


def through_experts(tokens: jax.Array, by_expert: Sorted, weights: ExpertWeights, mask: jax.Array | None) -> jax.Array:
    """Passes tokens [tokens, d_model] through the experts they chose.

    Args:
      tokens: of which each has as many choices.
      by_expert: the choices.
      weights: of the experts that are counted.
      mask: dropout's, scaled, of the sorted rows, [rows, d_ff]; or None.

    Returns:
      the experts' outputs [rows, d_model], by choice; zeros for choices of experts that are not counted.
    """

    def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(rows, weight, by_expert.sizes)

    hidden = weights.hidden(by_expert.rows(tokens), product)
    if mask is not None:
        hidden = hidden * mask.astype(hidden.dtype)
    counted = by_expert.expert < by_expert.sizes.shape[0]
    return by_expert.choices(jnp.where(counted[:, None], product(hidden, weights.output), 0))
