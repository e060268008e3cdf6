"""The protocol of attention kernels, and the reference kernel, which holds all scores at once."""

import functools
from typing import Protocol, TypedDict, Unpack

import jax
import jax.numpy as jnp

from meshway.models.layers.masks import Mask
from meshway.models.layers.norm import dropout
from meshway.models.layers.positions import PositionBias

HIDDEN = -1e9  # a score that softmax turns to zero, finite so that a row with nothing to see stays finite


class Options(TypedDict, total=False):
    """The options of attention beside query, key and value; `dot_product_attention` documents them."""

    bias: PositionBias | None
    mask: Mask | None
    soft_cap: float | None
    sinks: jax.Array | None
    dropout_rate: float
    rng: jax.Array | None


class AttentionKernel(Protocol):
    """A way to compute attention: all return what `dot_product_attention` returns."""

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array: ...


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: PositionBias | None = None,
    mask: Mask | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T + bias, where mask) value, exactly (Vaswani et al. 2017, eq. 1); scores and softmax in
    float32.

    Args:
      query: [batch, length, heads, head_dim], already scaled.
      key, value: [batch, kv_length, kv_heads, head_dim]; `heads` is a multiple of `kv_heads`.
      bias: added to the scores.
      mask: which keys a query sees.
      soft_cap: scores, with their bias, become soft_cap * tanh(scores / soft_cap) before the mask.
      sinks: [heads], a score a head that takes part in the softmax and has no value: weights then sum to less than 1.
      dropout_rate, rng: dropout of the attention weights, one mask shared by all queries (as T5 does).

    Returns:
      [batch, length, heads, head_dim] in the dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    if length == 1:
        # The heads of a group become queries of one head, so that its keys, all of a decoding step's cache, are read as
        # they lie; repeated they would be copied.
        query = query.reshape(batch, heads // groups, groups, head_dim).swapaxes(1, 2)
    elif groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, heads, length, -1)
    if bias is not None:
        scores = _add_bias(bias.dense.shape[0] == 1 < batch, scores, bias.dense)
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if mask is not None:
        scores = jnp.where(mask.dense, scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1) if sinks is None else _softmax_with_sinks(scores, sinks)
    weights = dropout(weights, dropout_rate, rng).astype(value.dtype)
    weights = weights.reshape(batch, key.shape[2], -1, key.shape[1])
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return y.swapaxes(1, 2).reshape(batch, 1, heads, head_dim) if length == 1 else y


def _softmax_with_sinks(scores: jax.Array, sinks: jax.Array) -> jax.Array:
    """Returns the weights of scores [batch, heads, length, kv_length] beside one sink [heads] (Xiao et al. 2023, eq. 2,
    with a learned score instead of 0)."""
    sink = jnp.broadcast_to(sinks.astype(scores.dtype)[:, None, None], (*scores.shape[:3], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_bias(shared: bool, scores: jax.Array, bias: jax.Array) -> jax.Array:
    """scores [batch, heads, length, kv_length] + bias [1 if shared else batch, ...].

    The gradient of a bias shared by the batch is summed by a product with ones: left to itself XLA:CPU fuses the
    sums of all layers with what follows, and runs that at a tenth of the speed of memory (8 % of a T5 step).
    """
    return scores + bias


def _add_bias_forward(shared: bool, scores: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return scores + bias, None


def _add_bias_backward(shared: bool, _: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not shared:
        return gradient, gradient
    return gradient, jnp.tensordot(jnp.ones(gradient.shape[0], gradient.dtype), gradient, axes=1)[None]


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)
