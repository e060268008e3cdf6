"""Attention in blocks of queries and keys: neither pass holds the scores of more than one block.

The softmax of a row is accumulated over its blocks of keys (Milakov & Gimelshein 2018, algorithm 3; Rabe & Staats 2021,
section 3); the backward pass recomputes the scores from each row's log-sum-exp (Dao et al. 2022, algorithm 4).
Blocks in which no query sees any key are skipped, whatever hides them: causality, the window, segments or padding.

Everything here takes plain local arrays: on one device, or the shards inside a `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from meshway.models.layers.kernels.scores import (
    ByHead,
    Keys,
    Queries,
    Terms,
    dropped,
    scores,
    seen,
    table_gradient,
    uncapped,
    visits,
)

LOWEST = float(jnp.finfo(jnp.float32).min)  # the peak of a row that has seen nothing; finite, as -inf - -inf is NaN


class Softmax(NamedTuple):
    """A partial softmax-weighted sum, float32: the sum and the total of exp(score - peak).

    Shapes: weighted [batch, length, heads, head_dim], peak and total [batch, length, heads].
    """

    weighted: jax.Array
    peak: jax.Array
    total: jax.Array


class Received(NamedTuple):
    """What the backward pass needs of each query.

    Attributes:
      gradient: of the output, [batch, length, heads, head_dim].
      logsumexp: of the query's scores, float32 [batch, length, heads].
      delta: gradient times output summed over head_dim, less the gradient of logsumexp, float32, same shape.
    """

    gradient: jax.Array
    logsumexp: jax.Array
    delta: jax.Array


class Gradients(NamedTuple):
    """Sums of gradients, float32, each in the shape of its operand; slopes have none."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    by_head: ByHead


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blockwise_attention(queries: Queries, keys: Keys, by_head: ByHead, terms: Terms) -> tuple[jax.Array, jax.Array]:
    """Computes attention as `dot_product_attention` does, block by block in both passes.

    Args:
      queries, keys: of any lengths; the last block is padded, and the padding hidden.
      by_head: biases and sinks.
      terms: how scores are made, and the sizes of blocks.

    Returns:
      (output [batch, length, heads, head_dim] in the dtype of the query, log-sum-exp of the scores and the sink float32
      [batch, length, heads]). A query that sees no key gets 0, and -inf if there are no sinks (the dense reference
      without sinks: the mean of all values).
    """
    return end(attend(begin(queries, by_head), queries, keys, by_head, terms), queries.query.dtype)


def _blockwise_forward(queries: Queries, keys: Keys, by_head: ByHead, terms: Terms) -> Any:
    out, logsumexp = blockwise_attention(queries, keys, by_head, terms)
    return (out, logsumexp), (queries, keys, by_head, out, logsumexp)


def _blockwise_backward(terms: Terms, kept: Any, gradient: Any) -> tuple[Queries, Keys, ByHead]:
    queries, keys, by_head, out, logsumexp = kept
    received = receive(gradient[0], out, logsumexp, gradient[1])
    sums = begin_backward(queries, keys, by_head, received)
    return as_cotangents(attend_backward(sums, queries, keys, by_head, terms, received), queries, keys)


blockwise_attention.defvjp(_blockwise_forward, _blockwise_backward)


def begin(queries: Queries, by_head: ByHead) -> Softmax:
    """Returns the softmax of queries that have seen no key yet: that of the sinks alone, where there are any."""
    shape = queries.query.shape
    weighted, total = jnp.zeros(shape, jnp.float32), jnp.zeros(shape[:3], jnp.float32)
    if by_head.sinks is None:
        return Softmax(weighted, jnp.full(shape[:3], LOWEST, jnp.float32), total)
    return Softmax(weighted, jnp.broadcast_to(by_head.sinks.astype(jnp.float32), shape[:3]), total + 1.0)


def attend(softmax: Softmax, queries: Queries, keys: Keys, by_head: ByHead, terms: Terms) -> Softmax:
    """Returns the softmax after the queries have also seen `keys`."""
    length, kv_heads = queries.query.shape[1], keys.key.shape[2]
    query_blocks, key_blocks = _query_blocks(queries, kv_heads, terms), _key_blocks(keys, terms)

    def see(softmax: Softmax, queries: Queries, keys: Keys) -> Softmax:
        found, shown = scores(queries, keys, by_head, terms), seen(queries, keys, terms)
        if shown is not None:
            found = jnp.where(shown, found, LOWEST)
        peak = jnp.maximum(softmax.peak, found.max(axis=-1))
        weights = jnp.exp(found - peak[..., None])
        if shown is not None:  # a row that sees nothing has its peak at LOWEST too
            weights = jnp.where(shown, weights, 0.0)
        fade = jnp.exp(softmax.peak - peak)
        total = softmax.total * fade + weights.sum(axis=-1)
        weights = dropped(weights, keys.kept).astype(keys.value.dtype)
        new = jnp.einsum("bhqgk,bhkd->bhqgd", weights, keys.value, preferred_element_type=jnp.float32)
        return Softmax(softmax.weighted * fade[..., None] + new, peak, total)

    def row(_: None, block: tuple[Softmax, Queries, Any]) -> tuple[None, Softmax]:
        softmax, queries, visited = block
        return None, _over(visited, key_blocks, lambda _, keys, softmax: see(softmax, queries, keys), softmax)

    blocks = jax.tree.map(lambda x: _by_head(x, kv_heads, terms.query_block), softmax)
    _, softmax = lax.scan(row, None, (blocks, query_blocks, visits(query_blocks, key_blocks, terms)))
    return jax.tree.map(lambda x: _by_position(x, length), softmax)


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


def begin_backward(queries: Queries, keys: Keys, by_head: ByHead, received: Received) -> Gradients:
    """Returns the initial sums of gradients: zeros, but the whole gradient for the sinks."""
    query, key, value = (jnp.zeros(x.shape, jnp.float32) for x in (queries.query, keys.key, keys.value))
    table = None if by_head.table is None else jnp.zeros_like(by_head.table)
    sinks = None
    if by_head.sinks is not None:
        weights = jnp.exp(by_head.sinks.astype(jnp.float32) - received.logsumexp)
        sinks = -jnp.sum(weights * received.delta, axis=range(weights.ndim - 1)).astype(by_head.sinks.dtype)
    return Gradients(query, key, value, ByHead(table, None, sinks))


def attend_backward(
    sums: Gradients, queries: Queries, keys: Keys, by_head: ByHead, terms: Terms, received: Received
) -> Gradients:
    """Adds the gradients of one `attend` to `sums`."""
    length, kv_length, kv_heads = queries.query.shape[1], keys.key.shape[1], keys.key.shape[2]
    query_blocks, key_blocks = _query_blocks(queries, kv_heads, terms), _key_blocks(keys, terms)

    def row(carry: Any, block: tuple[jax.Array, Queries, Received, Any]) -> Any:
        query_sum, queries, received, visited = block

        def see(number: Any, keys: Keys, carry: Any) -> Any:
            query_sum, table_sum, key_sums = carry
            key_sum, value_sum = _take(key_sums, number)
            sums = Gradients(query_sum, key_sum, value_sum, ByHead(table_sum))
            sums = _block_gradients(sums, queries, keys, by_head, terms, received)
            return sums.query, sums.by_head.table, _put(key_sums, number, (sums.key, sums.value))

        query_sum, table_sum, key_sums = _over(visited, key_blocks, see, (query_sum, *carry))
        return (table_sum, key_sums), query_sum

    query_sum, *given = (_by_head(x, kv_heads, terms.query_block) for x in (sums.query, *received))
    # Arranged as [blocks, batch, kv_heads, head_dim, size]: XLA:CPU transposes the left factor of these products, and
    # queries are smaller than scores.
    key_sums = tuple(_by_kv_head(x, terms.kv_block).swapaxes(3, 4) for x in (sums.key, sums.value))
    blocks = (query_sum, query_blocks, Received(*given), visits(query_blocks, key_blocks, terms))
    (table_sum, key_sums), query_sum = lax.scan(row, (sums.by_head.table, key_sums), blocks)
    key_sum, value_sum = (_by_position(jnp.expand_dims(x.swapaxes(3, 4), 4), kv_length) for x in key_sums)
    return Gradients(_by_position(query_sum, length), key_sum, value_sum, sums.by_head._replace(table=table_sum))


def as_cotangents(sums: Gradients, queries: Queries, keys: Keys) -> tuple[Queries, Keys, ByHead]:
    """Returns gradients in the dtypes and the structure of the operands."""
    query = sums.query.astype(queries.query.dtype)
    key, value = sums.key.astype(keys.key.dtype), sums.value.astype(keys.value.dtype)
    return Queries(query), Keys(key, value), sums.by_head


def filled(keys: Keys, size: int) -> Keys:
    """Returns keys padded to a multiple of `size`, with `real` False on the padding."""
    length = keys.key.shape[1]
    if not length % size:
        return keys
    if keys.real is None:
        keys = keys._replace(real=jnp.ones((1, length), bool))
    return fill_up(keys, size)


def fill_up(tree: Any, size: int) -> Any:
    """Pads axis 1 of every array to a multiple of `size`: integers (row positions, segments) with their last value, so
    that the ranges of blocks stay narrow, and others with zeros."""

    def fill(x: jax.Array) -> jax.Array:
        mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2), mode=mode)

    return jax.tree.map(fill, tree)


def _block_gradients(
    sums: Gradients, queries: Queries, keys: Keys, by_head: ByHead, terms: Terms, received: Received
) -> Gradients:
    """Adds the gradients of one block of scores; arrays are arranged by head, sums of keys with head_dim before
    length."""
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dtype = keys.key.dtype
    found, shown = scores(queries, keys, by_head, terms), seen(queries, keys, terms)
    # A weight is at most 1; the bound keeps rows that see nothing, whose log-sum-exp is -inf, finite.
    weights = jnp.exp(jnp.minimum(found - received.logsumexp[..., None], 0.0))
    if shown is not None:
        weights = jnp.where(shown, weights, 0.0)
    value = sums.value + dot("bhqgd,bhqgk->bhdk", received.gradient, dropped(weights, keys.kept).astype(dtype))
    gradient = dropped(dot("bhqgd,bhkd->bhqgk", received.gradient, keys.value), keys.kept)
    gradient = uncapped(weights * (gradient - received.delta[..., None]), found, terms)
    table = sums.by_head.table
    if table is not None:
        table = table + table_gradient(gradient, queries, keys, by_head, terms)
    gradient = gradient.astype(dtype)
    return Gradients(
        sums.query + dot("bhqgk,bhkd->bhqgd", gradient, keys.key),
        sums.key + dot("bhqgd,bhqgk->bhdk", queries.query, gradient),
        value,
        ByHead(table),
    )


def _over(visited: Any, key_blocks: Keys, step: Callable[[Any, Keys, Any], Any], carry: Any) -> Any:
    """Runs `carry = step(number, keys, carry)` over the blocks of keys to visit: see `visits`, for one block of
    queries."""
    order, count = (None, key_blocks.key.shape[0]) if visited is None else visited

    def turn(index: Any, carry: Any) -> Any:
        number = index if order is None else order[index]
        return step(number, _take(key_blocks, number), carry)

    return lax.fori_loop(0, count, turn, carry)


def _query_blocks(queries: Queries, kv_heads: int, terms: Terms) -> Queries:
    rest = jax.tree.map(lambda x: _blocks(x, terms.query_block), (queries.metadata, queries.positions))
    return Queries(_by_head(queries.query, kv_heads, terms.query_block), *rest)


def _key_blocks(keys: Keys, terms: Terms) -> Keys:
    size = min(terms.kv_block, keys.key.shape[1])
    keys = filled(keys, size)
    metadata, positions, real = jax.tree.map(lambda x: _blocks(x, size), (keys.metadata, keys.positions, keys.real))
    kept = None if keys.kept is None else _by_head(keys.kept, keys.key.shape[2], size).swapaxes(3, 4)
    return Keys(_by_kv_head(keys.key, size), _by_kv_head(keys.value, size), metadata, positions, real, kept)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[rows, length, ...] -> [blocks, rows, size, ...], padded."""
    x = fill_up(x, min(size, x.shape[1]))
    blocks = -(-x.shape[1] // size)
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, -1, *x.shape[2:]), 1, 0)


def _by_head(x: jax.Array, kv_heads: int, size: int) -> jax.Array:
    """[batch, length, heads, ...] -> [blocks, batch, kv_heads, size, groups, ...], padded."""
    x = _blocks(x, size)
    return jnp.moveaxis(x.reshape(*x.shape[:3], kv_heads, -1, *x.shape[4:]), 3, 2)


def _by_kv_head(x: jax.Array, size: int) -> jax.Array:
    """[batch, length, kv_heads, ...] -> [blocks, batch, kv_heads, size, ...], padded."""
    return jnp.moveaxis(_blocks(x, size), 3, 2)


def _by_position(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_by_head`."""
    x = x.transpose(1, 0, 3, 2, *range(4, x.ndim))
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :length]


def _take(tree: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, 0, keepdims=False), tree)


def _put(tree: Any, number: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, number, 0), tree, new)
