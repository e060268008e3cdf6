"""Which keys a query may see, as booleans [batch, 1, queries, keys]."""

import jax
import jax.numpy as jnp


def segment_mask(query_segments: jax.Array, kv_segments: jax.Array) -> jax.Array:
    """Sees its own segment only: segments [batch, queries] and [batch, keys], 0 for padding."""
    same = query_segments[:, :, None] == kv_segments[:, None, :]
    return (same & (kv_segments != 0)[:, None, :])[:, None]


def causal_mask(query_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
    """Sees no later key: positions in the row, [rows, queries] and [rows, keys]."""
    return (kv_positions[:, None, :] <= query_positions[:, :, None])[:, None]


def prefix_mask(prefix: jax.Array, segments: jax.Array) -> jax.Array:
    """Sees every key of its segment's prefix, from anywhere in it: `prefix` is 1 on prefix tokens [batch, length]."""
    both = (prefix[:, :, None] == 1) & (prefix[:, None, :] == 1)
    return both[:, None] & segment_mask(segments, segments)


def row_positions(length: int) -> jax.Array:
    """Returns 0 .. length-1 as [1, length]: where tokens stand in a row, whatever is packed in it."""
    return jnp.arange(length, dtype=jnp.int32)[None]
