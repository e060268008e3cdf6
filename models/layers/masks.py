"""Which keys a query may see."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """What tokens know of themselves, from which follows who sees whom: arrays [rows, length], rows 1 or the batch.

    `ordered` says that the places are 0, 1, 2 ... along every row, which kernels that number tokens themselves rely on;
    `row_metadata` makes such.
    """

    segments: jax.Array | None = None  # 0 is padding; None: all of one segment
    places: jax.Array | None = None  # where tokens stand in the row; needed where metadata is causal or has a window
    prefix: jax.Array | None = None  # 1 on tokens of a prefix that sees itself both ways
    ordered: bool = False


jax.tree_util.register_dataclass(AttentionMetadata, ["segments", "places", "prefix"], ["ordered"])


def row_metadata(length: int, segments: jax.Array | None = None, prefix: jax.Array | None = None) -> AttentionMetadata:
    """Returns the metadata of tokens that stand in the row as they are numbered."""
    return AttentionMetadata(segments, row_positions(length), prefix, ordered=True)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Who sees whom: as booleans for kernels that hold all scores, as `queries` and `keys` for those that work in
    blocks. What a kernel leaves unread costs nothing once compiled.

    Attributes:
      dense: bool [rows, 1, queries, keys].
      queries, keys: None where only `dense` is known (a cache).
      causal: whether a query sees no later key.
      window: a query sees keys fewer than so many places away; None: any.
    """

    dense: jax.Array
    queries: AttentionMetadata | None = None
    keys: AttentionMetadata | None = None
    causal: bool = False
    window: int | None = None


jax.tree_util.register_dataclass(Mask, ["dense", "queries", "keys"], ["causal", "window"])


def local_window(mask: Mask | None, window: int, queries: AttentionMetadata, keys: AttentionMetadata) -> Mask:
    """Returns `mask` narrowed to keys fewer than `window` places before or after the query; None hides nothing else.

    Args:
      queries, keys: metadata with places (slots of a cache), of use where the mask does not know of any itself.
    """
    if mask is None:
        return Mask(_near(queries, keys, window), queries, keys, window=window)
    if mask.queries is None or mask.keys is None:  # a cache
        return dataclasses.replace(mask, dense=mask.dense & _near(queries, keys, window))
    window = window if mask.window is None else min(window, mask.window)
    queries, keys = (
        own if own.places is not None else dataclasses.replace(own, places=given.places, ordered=given.ordered)
        for own, given in ((mask.queries, queries), (mask.keys, keys))
    )
    return Mask(mask.dense & _near(queries, keys, window), queries, keys, mask.causal, window)


def make_attention_mask(queries: AttentionMetadata, keys: AttentionMetadata, causal: bool = False) -> Mask:
    """Returns who sees whom: a query sees keys of its own segment, when `causal` none that is later in the row
    unless both are of the segment's prefix."""
    return Mask(make_key_mask(queries, keys, causal), queries, keys, causal)


def make_key_mask(
    queries: AttentionMetadata, keys: AttentionMetadata, causal: bool, window: int | None = None
) -> jax.Array:
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
    if window is not None:
        near = _near(queries, keys, window)
        seen = near if seen is None else seen & near
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


def _near(queries: AttentionMetadata, keys: AttentionMetadata, window: int) -> jax.Array:
    """Sees keys fewer than `window` places away, itself among them."""
    assert queries.places is not None and keys.places is not None
    return (jnp.abs(keys.places[:, None, :] - queries.places[:, :, None]) < window)[:, None]


def row_positions(length: int) -> jax.Array:
    """Returns 0 .. length-1 as [1, length]: where tokens stand in a row, whatever is packed in it."""
    return jnp.arange(length, dtype=jnp.int32)[None]
