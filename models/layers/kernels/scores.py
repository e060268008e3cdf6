"""The scores of one block of queries with one block of keys, their gradients, and which blocks can be skipped.

Everything here takes plain local arrays: on one device, or the shards inside a `shard_map`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshway.models.layers.masks import AttentionMetadata, make_key_mask

FAR = jnp.iinfo(jnp.int32).max // 2  # beyond any row position or segment, without overflow when added to


class Queries(NamedTuple):
    """Queries and what belongs to each: the length is axis 1 of every array.

    Attributes:
      query: [batch, length, heads, head_dim], already scaled.
      metadata: what determines the mask; None: every query sees every key.
      positions: int32 [rows, length], for a position bias.
    """

    query: Any
    metadata: AttentionMetadata | None = None
    positions: Any = None


class Keys(NamedTuple):
    """Keys, values and what belongs to each: the length is axis 1 of every array.

    Attributes:
      key, value: [batch, kv_length, kv_heads, head_dim].
      metadata, positions: as for queries.
      real: bool [1, kv_length], False on the padding of a block; None: all are real.
      kept: [batch, kv_length, heads], what dropout multiplies a key's attention weights by, the same for all queries.
    """

    key: Any
    value: Any
    metadata: AttentionMetadata | None = None
    positions: Any = None
    real: Any = None
    kept: Any = None


class ByHead(NamedTuple):
    """Parameters of each query head: axis 0 of every array is the heads.

    Attributes:
      table: float32 [heads, buckets], learned: added to scores by `Terms.bucket`.
      slopes: float32 [heads], fixed: times the distance of query and key, subtracted from scores (ALiBi).
      sinks: float32 [heads], learned: a score beside those of the keys, without a value.
    """

    table: Any = None
    slopes: Any = None
    sinks: Any = None


@dataclasses.dataclass(frozen=True)
class Terms:
    """How scores are made, and in blocks of what size.

    Attributes:
      causal: whether a query sees no later key (see `masks.make_key_mask`).
      bucket: maps key position - query position to a column of the bias table; None: no table.
      query_block, kv_block: most queries and keys of one block of scores.
      window: a query sees keys fewer than so many row positions away; None: any.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); None: they stay as they are.
    """

    causal: bool = False
    bucket: Callable[[jax.Array], jax.Array] | None = None
    query_block: int = 512
    kv_block: int = 512
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        if self.query_block < 1 or self.kv_block < 1:
            raise ValueError(f"blocks of attention need a size of 1 or more, not {self.query_block} x {self.kv_block}")


# Below, arrays of queries are arranged by head, [batch, kv_heads, queries, groups, ...], and so are those of keys,
# [batch, kv_heads, keys, ...]: products are then plain matrix products without transposes.


def scores(queries: Queries, keys: Keys, by_head: ByHead, terms: Terms) -> jax.Array:
    """Returns scores before the mask, with bias and cap, float32 [batch, kv_heads, queries, groups, keys]."""
    found = jnp.einsum("bhqgd,bhkd->bhqgk", queries.query, keys.key, preferred_element_type=jnp.float32)
    kv_heads = keys.key.shape[1]
    if by_head.table is not None:
        table = by_head.table.reshape(kv_heads, -1, by_head.table.shape[1])
        found = found + table[:, :, _buckets(queries, keys, terms)].transpose(2, 0, 3, 1, 4)
    if by_head.slopes is not None:
        distance = jnp.abs(_relative(queries, keys)).astype(jnp.float32)
        found = found - by_head.slopes.reshape(kv_heads, 1, -1, 1) * distance[:, None, :, None, :]
    return found if terms.soft_cap is None else terms.soft_cap * jnp.tanh(found / terms.soft_cap)


def uncapped(gradient: jax.Array, scores: jax.Array, terms: Terms) -> jax.Array:
    """Returns the gradient of scores before their cap from that of `scores`."""
    return gradient if terms.soft_cap is None else gradient * (1 - jnp.square(scores / terms.soft_cap))


def table_gradient(gradient: jax.Array, queries: Queries, keys: Keys, by_head: ByHead, terms: Terms) -> jax.Array:
    """Sums gradients of scores by bucket, as a product with ones and zeros: accelerators are slow at scattered sums."""
    buckets = _buckets(queries, keys, terms)
    if buckets.shape[0] == 1:
        gradient = gradient.sum(axis=0, keepdims=True)
    chosen = jax.nn.one_hot(buckets, by_head.table.shape[1], dtype=jnp.float32)
    return jnp.einsum("rhqgk,rqkn->hgn", gradient, chosen, precision="highest").reshape(by_head.table.shape)


def seen(queries: Queries, keys: Keys, terms: Terms) -> jax.Array | None:
    """Returns which keys are seen, bool [rows, 1, queries, 1, keys]; None for all."""
    found = None if keys.real is None else keys.real[:, None, None, None, :]
    if queries.metadata is None or keys.metadata is None:
        return found
    visible = make_key_mask(queries.metadata, keys.metadata, terms.causal, terms.window)[:, :, :, None, :]
    return visible if found is None else visible & found


def dropped(weights: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Applies dropout, [batch, kv_heads, groups, keys], to weights [batch, kv_heads, queries, groups, keys]."""
    return weights if kept is None else weights * kept[:, :, None]


def visits(queries: Queries, keys: Keys, terms: Terms) -> tuple[jax.Array, jax.Array] | None:
    """Returns which blocks of keys each block of queries has to visit; None for all.

    Segments and row positions of blocks are compared by their ranges, so where these do not grow along the row a fully
    masked block may be visited.

    Args:
      queries, keys: in blocks, [blocks, rows, size, ...].

    Returns:
      (int32 [query blocks, key blocks], the indices of the blocks to visit, then those to skip; int32 [query blocks],
      how many to visit).
    """
    mine, theirs = queries.metadata, keys.metadata
    if mine is None or theirs is None:
        return None
    worth = jnp.ones((1, 1, 1), bool)
    if mine.segments is not None and theirs.segments is not None:
        low, high = _range(mine.segments, mine.segments != 0)
        first, last = _range(theirs.segments, theirs.segments != 0, keys.real)
        worth = worth & (low[:, None] <= last) & (first <= high[:, None])
    if mine.row_positions is not None and theirs.row_positions is not None:
        low, high = _range(mine.row_positions)
        first, last = _range(theirs.row_positions, keys.real)
        if terms.window is not None:
            worth = worth & (first - high[:, None] < terms.window) & (low[:, None] - last < terms.window)
        if terms.causal:
            before = first <= high[:, None]
            if mine.prefix is not None and theirs.prefix is not None:
                before = before | (mine.prefix == 1).any(-1)[:, None] & (theirs.prefix == 1).any(-1)
            worth = worth & before
    worth = worth.any(axis=-1)
    return jnp.argsort(~worth, axis=1, stable=True).astype(jnp.int32), worth.sum(axis=1, dtype=jnp.int32)


def _range(x: jax.Array, *among: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the least and the largest of x [blocks, rows, size] where all of `among` hold, each [blocks, rows]."""
    low = high = x
    for counts in among:
        if counts is not None:
            low, high = jnp.where(counts, low, FAR), jnp.where(counts, high, -FAR)
    return low.min(axis=-1), high.max(axis=-1)


def _buckets(queries: Queries, keys: Keys, terms: Terms) -> jax.Array:
    """Returns the column of the bias table for each pair, int32 [rows, queries, keys]."""
    assert terms.bucket is not None
    return terms.bucket(_relative(queries, keys))


def _relative(queries: Queries, keys: Keys) -> jax.Array:
    """Returns key position - query position, int32 [rows, queries, keys]."""
    return keys.positions[:, None, :] - queries.positions[:, :, None]
