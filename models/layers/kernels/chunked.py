"""Chunked attention: exact, in pure JAX, with memory that grows with the length and not with its square."""

import dataclasses
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from meshway.models.layers.kernels.attention_shards import attention_sharding, check_sharding, on_shards, operands
from meshway.models.layers.kernels.blockwise import (
    as_cotangents,
    attend,
    attend_backward,
    begin,
    begin_backward,
    blockwise_attention,
    end,
    receive,
)
from meshway.models.layers.kernels.reference import Options, dot_product_attention
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms


@dataclasses.dataclass(frozen=True)
class ChunkedAttention:
    """An `AttentionKernel` that holds the scores of one block of queries and keys at a time, in both passes
    (`blockwise`).

    It supports everything that the reference does, at any length: causal and bidirectional masks, packed segments,
    prefixes, windows, position biases (T5's, ALiBi), soft caps, sinks, fewer key heads than query heads, and dropout
    (with the same random draws). Blocks that no query sees, beyond a window or in other segments, are skipped. It
    refuses a bias or a mask given as a dense array only.

    Under a mesh each device attends from its own queries, rows and heads, and nothing is sent where the layout shards
    only these. Where it shards the length of keys too, they are all-gathered (their gradients are reduce-scattered):
    that takes more memory than `ring_attention.RingAttention`, and causal work is not balanced.
    """

    query_block: int = 256
    kv_block: int = 256

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`; a query that sees no key gets 0 instead of the mean of all values.

        Raises:
          ValueError: a bias that is not a `PositionBias`, a mask given as a dense array only, a layout that shards
            head_dim, or one that shards keys by other mesh axes than queries.
        """
        given = operands("ChunkedAttention", query, key, value, **options, blocks=(self.query_block, self.kv_block))
        sharding = check_sharding("ChunkedAttention", attention_sharding(query, key), query, key, gathers=True)
        if sharding is None or sharding.mesh.size == 1:
            return blockwise_attention(given.queries, given.keys, given.by_head, given.terms)[0]
        if sharding.kv_length not in ((), sharding.length):  # a single query is not sharded, and scores are few
            return dot_product_attention(query, key, value, **options)
        return on_shards(
            Gathered(sharding.length, sharding.kv_length, given.terms), given, sharding, by_head=sharding.heads
        )


@dataclasses.dataclass(frozen=True)
class Gathered:
    """A `ShardKernel`: attention of a device's own queries to all keys. `length` and `kv_length` are the mesh axes that
    shard queries and keys; those of the keys are the same or none."""

    length: tuple[str, ...]
    kv_length: tuple[str, ...]
    terms: Terms

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Attends from this device's queries to the keys of all devices."""
        softmax = attend(begin(queries, by_head), queries, self._gather(keys), by_head, self.terms)
        out, logsumexp = end(softmax, queries.query.dtype)
        return out, (queries, keys, by_head, out, logsumexp)

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Gathers the keys once more, and sums their gradients over the devices whose queries saw them."""
        queries, keys, by_head, out, logsumexp = saved
        keys = self._gather(keys)
        received = receive(gradient, out, logsumexp)
        sums = begin_backward(queries, keys, by_head, received)
        sums = attend_backward(sums, queries, keys, by_head, self.terms, received)
        return as_cotangents(sums._replace(key=self._sum(sums.key), value=self._sum(sums.value)), queries, keys)

    def _gather(self, keys: Keys) -> Keys:
        if not self.kv_length:
            return keys
        return jax.tree.map(lambda x: lax.all_gather(x, self.kv_length, axis=1, tiled=True), keys)

    def _sum(self, gradient: jax.Array) -> jax.Array:
        if self.kv_length:
            return lax.psum_scatter(gradient, self.kv_length, scatter_dimension=1, tiled=True)
        return lax.psum(gradient, self.length) if self.length else jnp.asarray(gradient)
