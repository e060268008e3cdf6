"""Which keys a query may see."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sight:
    """What tokens know of themselves, from which follows who sees whom: arrays [rows, length], rows 1 or the batch."""

    segments: jax.Array | None = None  # 0 is padding; None: all of one segment
    places: jax.Array | None = None  # where tokens stand in the row; needed where sight is causal
    prefix: jax.Array | None = None  # 1 on tokens of a prefix that sees itself both ways


jax.tree_util.register_dataclass(Sight, ["segments", "places", "prefix"], [])


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom: as booleans for kernels that hold all scores, as `queries` and `keys` for those that work in
    blocks. What a kernel leaves unread costs nothing once compiled.

    Attributes:
      dense: bool [rows, 1, queries, keys].
      queries, keys: None where only `dense` is known (a cache).
      causal: whether a query sees no later key.
    """

    dense: jax.Array
    queries: Sight | None = None
    keys: Sight | None = None
    causal: bool = False


jax.tree_util.register_dataclass(Mask, ["dense", "queries", "keys"], ["causal"])


def visible(queries: Sight, keys: Sight, causal: bool = False) -> Mask:
    """Returns who sees whom: a query sees keys of its own segment, when `causal` none that is later in the row
    unless both are of the segment's prefix."""
    return Mask(visible_keys(queries, keys, causal), queries, keys, causal)


def visible_keys(queries: Sight, keys: Sight, causal: bool) -> jax.Array:
    """Returns bool [rows, 1, queries, keys]: the definition that every kernel follows, for any block of both.

    Raises:
      ValueError: neither segments nor places tell anything.
    """
    seen = None
    if causal:
        assert queries.places is not None and keys.places is not None
        seen = causal_mask(queries.places, keys.places)
        if queries.prefix is not None and keys.prefix is not None:
            seen = seen | ((queries.prefix[:, :, None] == 1) & (keys.prefix[:, None, :] == 1))[:, None]
    if queries.segments is not None and keys.segments is not None:
        same = segment_mask(queries.segments, keys.segments)
        seen = same if seen is None else seen & same
    if seen is None:
        raise ValueError("a mask needs segments, or places and causal=True")
    return seen


def segment_mask(query_segments: jax.Array, kv_segments: jax.Array) -> jax.Array:
    """Sees its own segment only: segments [batch, queries] and [batch, keys], 0 for padding."""
    same = query_segments[:, :, None] == kv_segments[:, None, :]
    return (same & (kv_segments != 0)[:, None, :])[:, None]


def causal_mask(query_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
    """Sees no later key: positions in the row, [rows, queries] and [rows, keys]."""
    return (kv_positions[:, None, :] <= query_positions[:, :, None])[:, None]


def row_positions(length: int) -> jax.Array:
    """Returns 0 .. length-1 as [1, length]: where tokens stand in a row, whatever is packed in it."""
    return jnp.arange(length, dtype=jnp.int32)[None]
