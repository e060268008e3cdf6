"""Multi-head attention, with grouped keys and values, and its cache."""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.dropout import dropout
from meshway.models.layers.linear import Linear, fan_in_init
from meshway.models.layers.masks import Mask
from meshway.models.layers.positions import PositionBias

KeysValues = tuple[jax.Array, jax.Array]  # each [batch, kv_length, kv_heads, head_dim]
HIDDEN = -1e9  # a score that softmax turns to zero, finite so that a row with nothing to see stays finite


class Kernel(Protocol):
    """A way to compute attention: `dot_product_attention` says what all of them return."""

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        bias: PositionBias | None = None,
        mask: Mask | None = None,
        dropout_rate: float = 0.0,
        rng: jax.Array | None = None,
    ) -> jax.Array: ...


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: PositionBias | None = None,
    mask: Mask | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """softmax(query key^T + bias, where mask) value, exactly; scores and softmax in float32.

    Args:
      query: [batch, length, heads, head_dim], already scaled.
      key, value: [batch, kv_length, kv_heads, head_dim]; `heads` is a multiple of `kv_heads`.
      bias: added to the scores.
      mask: which keys a query sees.
      dropout_rate, rng: dropout of the attention weights, one mask shared by all queries (as T5 does).

    Returns:
      [batch, length, heads, head_dim] in the dtype of `query`.
    """
    batch, length, heads, head_dim = query.shape
    groups = heads // key.shape[2]
    if groups > 1:
        key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = _add_bias(bias.dense.shape[0] == 1 < batch, scores, bias.dense)
    if mask is not None:
        scores = jnp.where(mask.dense, scores, HIDDEN)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_rate, rng).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


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


class Attention(nnx.Module):
    """Self- or cross-attention without biases."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        scale_logits: bool = True,
        rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        dropout_rate: float = 0.0,
        kernel: Kernel = dot_product_attention,
    ):
        """`num_kv_heads` below `num_heads` is GQA, 1 is MQA. `scale_logits` False leaves out 1/sqrt(head_dim) and
        starts the query kernel that much smaller, as T5 does. `rotary` turns (x, positions) for queries and keys.
        `kernel` computes attention, except over a cache; layouts that cut the length bind one that can.

        Raises:
          ValueError: `num_heads` is no multiple of `num_kv_heads`.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"Attention: num_heads={num_heads} is no multiple of num_kv_heads={num_kv_heads}")
        query_scale = 1.0 if scale_logits else 1.0 / head_dim
        heads, kv_heads = {"heads": num_heads}, {"kv_heads": num_kv_heads}
        inputs, size = {"embed": d_model}, {"head_dim": head_dim}
        self.query = Linear(inputs, heads | size, rngs=rngs, init=fan_in_init("normal", query_scale))
        self.key = Linear(inputs, kv_heads | size, rngs=rngs, init=fan_in_init("normal"))
        self.value = Linear(inputs, kv_heads | size, rngs=rngs, init=fan_in_init("normal"))
        self.out = Linear(heads | size, inputs, rngs=rngs, init=fan_in_init("normal"))
        self.rotary, self.dropout_rate, self.kernel = rotary, dropout_rate, kernel
        self.logit_scale = head_dim**-0.5 if scale_logits else 1.0
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim

    def keys_values(self, source: jax.Array, positions: jax.Array | None = None) -> KeysValues:
        """Projects what is attended to: source [batch, kv_length, d_model]."""
        source = constrain(source, ("batch", "length", "embed"), free_for="kv_heads")
        key, value = self.key(source), self.value(source)
        if self.rotary is not None and positions is not None:
            key = self.rotary(key, positions)
        names = ("batch", "kv_length", "kv_heads", "head_dim")
        return constrain(key, names), constrain(value, names)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> KeysValues:
        """Returns room for the keys and values of `length` positions."""
        shape = (batch, length, self.num_kv_heads, self.head_dim)
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)

    def __call__(
        self,
        x: jax.Array,
        *,
        attended: KeysValues | None = None,
        positions: jax.Array | None = None,
        bias: PositionBias | None = None,
        mask: Mask | None = None,
        cache: KeysValues | None = None,
        cache_index: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Attends from x [batch, length, d_model].

        Args:
          attended: projected keys and values (cross-attention); None attends to x itself.
          positions: [batch, length] of x in its segment, for rotary embeddings.
          bias, mask: over the cache's length where there is a cache.
          cache: keys and values seen so far; x's own are written in at `cache_index` before attending.
          cache_index: int32 [batch, length], the slot of each position of x.
          rng: dropout key.

        Returns:
          (output [batch, length, d_model], the updated cache or None).
        """
        x = constrain(x, ("batch", "length", "embed"), free_for="heads")
        query = self.query(x) * self.logit_scale
        if attended is None:
            if self.rotary is not None:
                if positions is None:
                    raise ValueError("Attention with rotary embeddings needs the positions of its tokens")
                query = self.rotary(query, positions)
            attended = self.keys_values(x, positions)
            if cache is not None:
                rows = jnp.arange(x.shape[0])[:, None]
                keys, values = (
                    old.at[rows, cache_index].set(new.astype(old.dtype))
                    for old, new in zip(cache, attended, strict=True)
                )
                cache = attended = (keys, values)
        query = constrain(query, ("batch", "length", "heads", "head_dim"))
        blocks = mask is None or mask.queries is not None  # a cache's mask is known in full only
        attend = self.kernel if blocks else dot_product_attention
        y = attend(query, *attended, bias=bias, mask=mask, dropout_rate=self.dropout_rate, rng=rng)
        y = constrain(y, ("batch", "length", "heads", "head_dim"))
        return constrain(self.out(y), ("batch", "length", "embed")), cache
