"""Attention masks: which keys a query sees, as dense arrays and as per-token metadata."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Per-token metadata that determines the attention mask: arrays [rows, length], where rows is 1 or the batch.

    Attributes:
      segments: segment ids, 0 on padding; None: all tokens are of one segment.
      row_positions: positions in the row (slots of a cache); needed for causal masks and windows.
      prefix: 1 on tokens of a prefix within which attention is bidirectional.
      ordered: whether row positions are 0, 1, 2 ... along every row, as `row_metadata` makes them: kernels that do not
        read positions rely on it.
    """

    segments: jax.Array | None = None
    row_positions: jax.Array | None = None
    prefix: jax.Array | None = None
    ordered: bool = False


jax.tree_util.register_dataclass(AttentionMetadata, ["segments", "row_positions", "prefix"], ["ordered"])


def row_metadata(length: int, segments: jax.Array | None = None, prefix: jax.Array | None = None) -> AttentionMetadata:
    """Returns the metadata of tokens at row positions 0 .. length - 1."""
    return AttentionMetadata(segments, row_positions(length), prefix, ordered=True)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees: a dense array for kernels that hold all scores, metadata of queries and keys for
    blockwise kernels. What a kernel does not read is removed by the compiler.

    Attributes:
      dense: bool [rows, 1, queries, keys], True where the key is seen.
      queries, keys: None where there is only `dense` (a cache).
      causal: whether a query sees no later key.
      window: a query sees keys fewer than so many row positions away; None: any.
    """

    dense: jax.Array
    queries: AttentionMetadata | None = None
    keys: AttentionMetadata | None = None
    causal: bool = False
    window: int | None = None


jax.tree_util.register_dataclass(Mask, ["dense", "queries", "keys"], ["causal", "window"])


def local_window(mask: Mask | None, window: int, queries: AttentionMetadata, keys: AttentionMetadata) -> Mask:
    """Returns `mask` narrowed to keys fewer than `window` row positions before or after the query.

    Args:
      mask: None hides nothing.
      window: in row positions, at least 1.
      queries, keys: metadata whose row positions are used where the mask has none.
    """
    if mask is None:
        return Mask(_near(queries, keys, window), queries, keys, window=window)
    if mask.queries is None or mask.keys is None:  # a cache
        return dataclasses.replace(mask, dense=mask.dense & _near(queries, keys, window))
    window = window if mask.window is None else min(window, mask.window)
    queries, keys = (
        own
        if own.row_positions is not None
        else dataclasses.replace(own, row_positions=given.row_positions, ordered=given.ordered)
        for own, given in ((mask.queries, queries), (mask.keys, keys))
    )
    return Mask(mask.dense & _near(queries, keys, window), queries, keys, mask.causal, window)


def make_attention_mask(queries: AttentionMetadata, keys: AttentionMetadata, causal: bool = False) -> Mask:
    """Returns a mask in which a query sees the keys of its own segment; if `causal`, none that is later in the row
    unless both are of the segment's prefix."""
    return Mask(make_key_mask(queries, keys, causal), queries, keys, causal)


def make_key_mask(
    queries: AttentionMetadata, keys: AttentionMetadata, causal: bool, window: int | None = None
) -> jax.Array:
    """Returns the dense mask, bool [rows, 1, queries, keys], of any block of queries and keys: the definition that
    every kernel follows.

    Raises:
      ValueError: there are neither segments nor causality nor a window.
    """
    seen = None
    if causal:
        assert queries.row_positions is not None and keys.row_positions is not None
        seen = causal_mask(queries.row_positions, keys.row_positions)
        if queries.prefix is not None and keys.prefix is not None:
            seen = seen | ((queries.prefix[:, :, None] == 1) & (keys.prefix[:, None, :] == 1))[:, None]
    if window is not None:
        near = _near(queries, keys, window)
        seen = near if seen is None else seen & near
    if queries.segments is not None and keys.segments is not None:
        same = segment_mask(queries.segments, keys.segments)
        seen = same if seen is None else seen & same
    if seen is None:
        raise ValueError("a mask needs segments, or row positions and causal=True")
    return seen


def segment_mask(query_segments: jax.Array, kv_segments: jax.Array) -> jax.Array:
    """Returns bool [batch, 1, queries, keys]: keys of the query's segment, from segment ids [batch, queries] and
    [batch, keys]; those of segment 0, padding, are never seen."""
    same = query_segments[:, :, None] == kv_segments[:, None, :]
    return (same & (kv_segments != 0)[:, None, :])[:, None]


def causal_mask(query_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
    """Returns bool [rows, 1, queries, keys]: keys not after the query, from row positions [rows, queries] and
    [rows, keys]."""
    return (kv_positions[:, None, :] <= query_positions[:, :, None])[:, None]


def _near(queries: AttentionMetadata, keys: AttentionMetadata, window: int) -> jax.Array:
    """Returns bool [rows, 1, queries, keys]: keys fewer than `window` row positions away from the query."""
    assert queries.row_positions is not None and keys.row_positions is not None
    return (jnp.abs(keys.row_positions[:, None, :] - queries.row_positions[:, :, None]) < window)[:, None]


def row_positions(length: int) -> jax.Array:
    """Returns 0 .. length-1 as int32 [1, length]: the positions in a row, whatever is packed in it."""
    return jnp.arange(length, dtype=jnp.int32)[None]
