"""Attention in blocks of queries and keys: no pass holds the scores of more than one block.

The softmax of a row is taken while its keys go by (Milakov & Gimelshein 2018, algorithm 3; Rabe & Staats 2021,
section 3); the backward pass computes the scores again from each row's log-sum-exp (Dao et al. 2022, algorithm 4).
Blocks in which no query sees any key are skipped at run time, whatever hides them: later keys, other segments, padding.

Everything here works on plain local arrays: on one device, or on the shards inside a `shard_map`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from meshway.models.layers.masks import Sight, visible_keys

LOWEST = float(jnp.finfo(jnp.float32).min)  # the peak of a row that has seen nothing; finite: -inf - -inf is no number


class Queries(NamedTuple):
    """What asks: the length is axis 1 of every array.

    Attributes:
      query: [batch, length, heads, head_dim], already scaled.
      sight: who sees whom; None: everyone sees everything.
      positions: int32 [rows, length], for a position bias.
    """

    query: Any
    sight: Sight | None = None
    positions: Any = None


class Keys(NamedTuple):
    """What is attended to: the length is axis 1 of every array.

    Attributes:
      key, value: [batch, kv_length, kv_heads, head_dim].
      sight, positions: as for queries.
      real: bool [1, kv_length], False on what only fills up a block; None: all are real.
      kept: [batch, kv_length, heads], what dropout multiplies a key's attention weights by, the same for all queries.
    """

    key: Any
    value: Any
    sight: Sight | None = None
    positions: Any = None
    real: Any = None
    kept: Any = None


@dataclasses.dataclass(frozen=True)
class Terms:
    """How scores are made, and in blocks of what size.

    Attributes:
      causal: whether a query sees no later key (see `masks.visible_keys`).
      bucket: maps key position - query position to a column of the bias table; None: no bias.
      query_block, kv_block: most queries and keys of one block of scores.
    """

    causal: bool = False
    bucket: Callable[[jax.Array], jax.Array] | None = None
    query_block: int = 512
    kv_block: int = 512

    def __post_init__(self) -> None:
        if self.query_block < 1 or self.kv_block < 1:
            raise ValueError(f"blocks of attention need a size of 1 or more, not {self.query_block} x {self.kv_block}")


class Softmax(NamedTuple):
    """A softmax-weighted sum under way, float32: the sum and the total of exp(score - peak).

    Shapes: weighted [batch, length, heads, head_dim], peak and total [batch, length, heads].
    """

    weighted: jax.Array
    peak: jax.Array
    total: jax.Array


class Received(NamedTuple):
    """What the backward pass knows of each query.

    Attributes:
      gradient: of the output, [batch, length, heads, head_dim].
      logsumexp: of the query's scores, float32 [batch, length, heads].
      delta: gradient times output summed over head_dim, less the gradient of logsumexp, float32, same shape.
    """

    gradient: jax.Array
    logsumexp: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Sums of gradients, float32, in the shapes of what they belong to."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    table: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_attention(
    queries: Queries, keys: Keys, table: jax.Array | None, terms: Terms
) -> tuple[jax.Array, jax.Array]:
    """Computes attention as `dot_product_attention` does, block by block in both passes.

    Args:
      queries, keys: of any lengths; blocks that they do not fill are filled up and hidden.
      table: float32 [heads, buckets], added to scores by `terms.bucket`.
      terms: how.

    Returns:
      (output [batch, length, heads, head_dim] in the dtype of the query, log-sum-exp of the scores float32
      [batch, length, heads]). A query that sees no key gets 0 and -inf (the dense reference: the mean of all values).
    """
    return end(attend(begin(queries), queries, keys, table, terms), queries.query.dtype)


def _blockwise_forward(queries: Queries, keys: Keys, table: jax.Array | None, terms: Terms) -> Any:
    out, logsumexp = blockwise_attention(queries, keys, table, terms)
    return (out, logsumexp), (queries, keys, table, out, logsumexp)


def _blockwise_backward(terms: Terms, kept: Any, gradient: Any) -> tuple[Queries, Keys, jax.Array | None]:
    queries, keys, table, out, logsumexp = kept
    received = receive(gradient[0], out, logsumexp, gradient[1])
    sums = attend_backward(no_gradients(queries, keys, table), queries, keys, table, terms, received)
    return as_cotangents(sums, queries, keys)


blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)


def begin(queries: Queries) -> Softmax:
    """Returns the softmax of queries that have seen no key yet."""
    shape = queries.query.shape
    return Softmax(
        jnp.zeros(shape, jnp.float32),
        jnp.full(shape[:3], LOWEST, jnp.float32),
        jnp.zeros(shape[:3], jnp.float32),
    )


def attend(softmax: Softmax, queries: Queries, keys: Keys, table: jax.Array | None, terms: Terms) -> Softmax:
    """Returns the softmax after the queries have also seen `keys`."""
    length, kv_heads = queries.query.shape[1], keys.key.shape[2]
    key_blocks = _key_blocks(keys, terms)

    def row(_: None, block: tuple[Softmax, Queries]) -> tuple[None, Softmax]:
        softmax, queries = block
        query = _by_head(queries.query, kv_heads)

        def see(softmax: Softmax, keys: Keys, seen: jax.Array | None) -> Softmax:
            scores = _scores(query, queries, keys, table, terms)
            if seen is not None:
                scores = jnp.where(seen, scores, LOWEST)
            peak = jnp.maximum(softmax.peak, scores.max(axis=-1))
            weights = jnp.exp(scores - peak[..., None])
            if seen is not None:  # a row that sees nothing has its peak at LOWEST too
                weights = jnp.where(seen, weights, 0.0)
            fade = jnp.exp(softmax.peak - peak)
            total = softmax.total * fade + weights.sum(axis=-1)
            weights = _drop(weights, keys.kept, kv_heads).astype(keys.value.dtype)
            new = jnp.einsum("bhqgk,bkhd->bhqgd", weights, keys.value, preferred_element_type=jnp.float32)
            return Softmax(softmax.weighted * fade[..., None] + new, peak, total)

        def column(softmax: Softmax, keys: Keys) -> tuple[Softmax, None]:
            seen = _seen(queries, keys, terms.causal)
            if seen is None:
                return see(softmax, keys, None), None
            return lax.cond(jnp.any(seen), see, lambda softmax, *_: softmax, softmax, keys, seen), None

        softmax, _ = lax.scan(column, jax.tree.map(lambda x: _by_head(x, kv_heads), softmax), key_blocks)
        return None, jax.tree.map(_by_place, softmax)

    _, softmax = lax.scan(row, None, _blocks((softmax, queries), terms.query_block))
    return _whole(softmax, length)


def end(softmax: Softmax, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Returns (output, log-sum-exp) once the queries have seen all keys; see `blockwise_attention`."""
    nothing = softmax.total == 0
    total = jnp.where(nothing, 1.0, softmax.total)
    out = (softmax.weighted / total[..., None]).astype(dtype)
    return out, jnp.where(nothing, -jnp.inf, softmax.peak + jnp.log(total))


def receive(
    gradient: jax.Array, out: jax.Array, logsumexp: jax.Array, logsumexp_gradient: jax.Array | float = 0.0
) -> Received:
    """Returns what the backward pass needs of each query."""
    delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    return Received(gradient, logsumexp, delta - logsumexp_gradient)


def no_gradients(queries: Queries, keys: Keys, table: jax.Array | None) -> Gradients:
    """Returns sums of gradients to start from."""
    query, key, value = (jnp.zeros(x.shape, jnp.float32) for x in (queries.query, keys.key, keys.value))
    return Gradients(query, key, value, None if table is None else jnp.zeros_like(table))


def attend_backward(
    sums: Gradients, queries: Queries, keys: Keys, table: jax.Array | None, terms: Terms, received: Received
) -> Gradients:
    """Adds the gradients of one `attend` to `sums`."""
    length, kv_length, kv_heads = queries.query.shape[1], keys.key.shape[1], keys.key.shape[2]
    key_blocks = _key_blocks(keys, terms)
    key_sums = _blocks((sums.key, sums.value), terms.kv_block)

    def row(carry: Any, block: tuple[Queries, Received, jax.Array]) -> Any:
        (queries, received, query_sum), (key_sums, table_sum) = block, carry
        query, given = _by_head(queries.query, kv_heads), jax.tree.map(lambda x: _by_head(x, kv_heads), received)

        def see(sums: Gradients, keys: Keys, seen: jax.Array | None) -> Gradients:
            return _block_gradients(sums, query, queries, keys, seen, table, terms, given)

        def column(carry: Any, block: tuple[Keys, Any]) -> Any:
            keys, (key_sum, value_sum) = block
            sums = Gradients(carry[0], key_sum, value_sum, carry[1])
            seen = _seen(queries, keys, terms.causal)
            if seen is None:
                sums = see(sums, keys, None)
            else:
                sums = lax.cond(jnp.any(seen), see, lambda sums, *_: sums, sums, keys, seen)
            return (sums.query, sums.table), (sums.key, sums.value)

        start = (_by_head(query_sum, kv_heads), table_sum)
        (query_sum, table_sum), key_sums = lax.scan(column, start, (key_blocks, key_sums))
        return (key_sums, table_sum), _by_place(query_sum)

    blocks = _blocks((queries, received, sums.query), terms.query_block)
    (key_sums, table_sum), query_sum = lax.scan(row, (key_sums, sums.table), blocks)
    key_sum, value_sum = _whole(key_sums, kv_length)
    return Gradients(_whole(query_sum, length), key_sum, value_sum, table_sum)


def as_cotangents(sums: Gradients, queries: Queries, keys: Keys) -> tuple[Queries, Keys, jax.Array | None]:
    """Returns gradients in the dtypes and the structure of what they belong to."""
    query = sums.query.astype(queries.query.dtype)
    key, value = sums.key.astype(keys.key.dtype), sums.value.astype(keys.value.dtype)
    return Queries(query), Keys(key, value), sums.table


def filled(keys: Keys, size: int) -> Keys:
    """Returns keys filled up to a multiple of `size`, and marked."""
    length = keys.key.shape[1]
    if not length % size:
        return keys
    if keys.real is None:
        keys = keys._replace(real=jnp.ones((1, length), bool))
    return fill_up(keys, size)


def fill_up(tree: Any, size: int) -> Any:
    """Fills axis 1 of every array up to a multiple of `size` with zeros."""

    def fill(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(fill, tree)


def _block_gradients(
    sums: Gradients,
    query: jax.Array,
    queries: Queries,
    keys: Keys,
    seen: jax.Array | None,
    table: jax.Array | None,
    terms: Terms,
    given: Received,
) -> Gradients:
    """Adds the gradients of one block of scores; `query` and `given` are laid out by head."""
    kv_heads, dtype = keys.key.shape[2], keys.key.dtype
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # A weight is at most 1; the bound keeps rows that see nothing, whose log-sum-exp is -inf, finite.
    scores = _scores(query, queries, keys, table, terms)
    weights = jnp.exp(jnp.minimum(scores - given.logsumexp[..., None], 0.0))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    dropped = _drop(weights, keys.kept, kv_heads).astype(dtype)
    value = sums.value + dot("bhqgk,bhqgd->bkhd", dropped, given.gradient)
    weight_gradient = _drop(dot("bhqgd,bkhd->bhqgk", given.gradient, keys.value), keys.kept, kv_heads)
    score_gradient = weights * (weight_gradient - given.delta[..., None])
    table_sum = sums.table
    if table is not None and table_sum is not None:
        table_sum = table_sum + _table_gradient(score_gradient, _buckets(queries, keys, terms), table.shape)
    score_gradient = score_gradient.astype(dtype)
    return Gradients(
        sums.query + dot("bhqgk,bkhd->bhqgd", score_gradient, keys.key),
        sums.key + dot("bhqgk,bhqgd->bkhd", score_gradient, query),
        value,
        table_sum,
    )


def _scores(query: jax.Array, queries: Queries, keys: Keys, table: jax.Array | None, terms: Terms) -> jax.Array:
    """Returns scores with bias, float32 [batch, kv_heads, queries, groups, keys]; `query` is laid out by head."""
    scores = jnp.einsum("bhqgd,bkhd->bhqgk", query, keys.key, preferred_element_type=jnp.float32)
    if table is None:
        return scores
    by_group = table.reshape(keys.key.shape[2], -1, table.shape[1])
    return scores + by_group[:, :, _buckets(queries, keys, terms)].transpose(2, 0, 3, 1, 4)


def _buckets(queries: Queries, keys: Keys, terms: Terms) -> jax.Array:
    """Returns the column of the bias table for each pair, int32 [rows, queries, keys]."""
    assert terms.bucket is not None
    return terms.bucket(keys.positions[:, None, :] - queries.positions[:, :, None])


def _table_gradient(score_gradient: jax.Array, buckets: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums gradients of scores by bucket, as a product with ones and zeros: accelerators are slow at scattered sums."""
    if buckets.shape[0] == 1:
        score_gradient = score_gradient.sum(axis=0, keepdims=True)
    chosen = jax.nn.one_hot(buckets, shape[1], dtype=jnp.float32)
    return jnp.einsum("rhqgk,rqkn->hgn", score_gradient, chosen, precision="highest").reshape(shape)


def _seen(queries: Queries, keys: Keys, causal: bool) -> jax.Array | None:
    """Returns which keys are seen, bool [rows, 1, queries, 1, keys]; None for all."""
    seen = None if keys.real is None else keys.real[:, None, None, None, :]
    if queries.sight is None or keys.sight is None:
        return seen
    visible = visible_keys(queries.sight, keys.sight, causal)[:, :, :, None, :]
    return visible if seen is None else visible & seen


def _drop(weights: jax.Array, kept: jax.Array | None, kv_heads: int) -> jax.Array:
    """Applies dropout to weights [batch, kv_heads, queries, groups, keys]."""
    if kept is None:
        return weights
    batch, length, _ = kept.shape
    return weights * kept.reshape(batch, length, kv_heads, -1).transpose(0, 2, 3, 1)[:, :, None]


def _key_blocks(keys: Keys, terms: Terms) -> Keys:
    return _blocks(filled(keys, min(terms.kv_block, keys.key.shape[1])), terms.kv_block)


def _blocks(tree: Any, size: int) -> Any:
    """Cuts axis 1 of every array: [rows, length, ...] -> [blocks, rows, size, ...], filled up with zeros."""

    def cut(x: jax.Array) -> jax.Array:
        blocks = -(-x.shape[1] // size)
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(lambda x: cut(fill_up(x, min(size, x.shape[1]))), tree)


def _whole(tree: Any, length: int) -> Any:
    """Undoes `_blocks`."""

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, tree)


def _by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """[batch, queries, heads, ...] -> [batch, kv_heads, queries, groups, ...]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, -1, *x.shape[3:]), 1, 2)


def _by_place(x: jax.Array) -> jax.Array:
    """Undoes `_by_head`."""
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
