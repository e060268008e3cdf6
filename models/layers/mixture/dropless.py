"""Dropless dispatch: choices are sorted by expert, and each expert multiplies as many rows as chose it.

Where the mesh cuts experts and tokens, tokens are gathered over the mesh axes of "expert", each device computes what
chose its own experts, and outputs are added and scattered back. Rows are enough for the worst case, in which all tokens
choose one device.
"""

import math

import jax
import jax.numpy as jnp

from meshway.models.layers.mixture.dispatch import Groups, on_devices
from meshway.models.layers.mixture.expert_mesh import ExpertMesh
from meshway.models.layers.mixture.experts import ExpertWeights
from meshway.models.layers.mixture.grouped import sort_by_expert, through_experts
from meshway.models.layers.mixture.routers import Choices, TokenChoices


def dropless(
    x: jax.Array,
    choices: Choices,
    real: jax.Array,
    weights: ExpertWeights,
    masks: jax.Array | None,
    groups: Groups,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Passes every token through all the experts it chose; arguments and results are those of `dispatch.einsum`, except
    that masks are of rows and nothing is bounded.

    Raises:
      ValueError: experts choose the tokens.
    """
    del groups
    check(choices, "dropless")
    return on_devices(on_own_experts, x, choices, real, weights, masks, cut)


def check(choices: Choices, dispatch: str) -> None:
    """Raises ValueError where experts choose the tokens."""
    if not isinstance(choices, TokenChoices):
        raise ValueError(
            "MoeMlp: with ExpertChoice each expert takes as many tokens as it has slots, so there is nothing for "
            f"dispatch = {dispatch!r} to do; use 'all_to_all'"
        )


def on_own_experts(
    x: jax.Array,
    choices: TokenChoices,
    real: jax.Array,
    weights: ExpertWeights,
    mask: jax.Array | None,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """All tokens of the exchange through a device's own experts."""
    kept = choices.experts.shape[-1] * real
    first, _ = (0, 0) if cut is None else cut.own_experts(weights.output.shape[0] * cut.size(cut.expert))
    tokens, choices, real = jax.tree.map(lambda t: t.reshape(-1, *t.shape[2:]), (x, choices, real))
    if cut is not None and cut.exchange:
        tokens, choices, real = jax.tree.map(
            lambda t: jax.lax.all_gather(t, cut.exchange, tiled=True), (tokens, choices, real)
        )
    y = _own(tokens, choices, real, weights, mask, first).astype(x.dtype)
    if cut is not None and cut.exchange:
        y = jax.lax.psum_scatter(y, cut.exchange, tiled=True)
    y = y.reshape(x.shape)
    return (y if cut is None else cut.reduce(y)), kept


def _own(
    tokens: jax.Array,
    choices: TokenChoices,
    real: jax.Array,
    weights: ExpertWeights,
    mask: jax.Array | None,
    first: jax.Array | int,
) -> jax.Array:
    """tokens [n, d_model] -> float32 [n, d_model], what the experts from `first` on add to them.

    Choices of others' experts and of padding go to the end of the rows, past the last group.
    """
    (n, k), count = choices.experts.shape, weights.output.shape[0]
    expert = choices.experts - first
    own = (expert >= 0) & (expert < count) & (real[:, None] > 0)
    by_expert = sort_by_expert(jnp.where(own, expert, count).reshape(-1), count)
    if mask is not None:
        mask = mask[by_expert.order // k // math.ceil(n / mask.shape[0])]
    return choices.combine(through_experts(tokens, by_expert, weights, mask))
