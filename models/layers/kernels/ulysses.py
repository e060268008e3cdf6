"""Ulysses attention: all-to-alls exchange shards of the length for shards of the heads, and back after attention."""

import dataclasses
from typing import Any, Unpack

import jax
from jax import lax

from meshway.models.layers.kernels.attention_shards import (
    AttentionSharding,
    attention_sharding,
    check_sharding,
    on_shards,
    operands,
)
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
class UlyssesAttention:
    """An `AttentionKernel` for layouts that shard `length` and `kv_length` over the same mesh axes (Jacobs et al. 2023,
    section 3).

    An all-to-all turns shards of the length into shards of the heads, blockwise attention works on whole rows, and an
    all-to-all turns its output back. It sends less than a ring while there are heads to shard; key heads too few for
    the devices are repeated the fewest times that suffice. Where the layout does not shard the length, or without a
    mesh, it is blockwise attention on each device's own rows and heads. Dropout makes the reference's random draws.
    """

    query_block: int = 512
    kv_block: int = 512

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`; a query that sees no key gets 0 instead of the mean of all values.

        Raises:
          ValueError: the query heads of a device are not divisible by the devices that shard the length, a bias that is
            not a `PositionBias`, a mask given as a dense array only, or a layout that shards queries by other mesh axes
            than keys.
        """
        given = operands("UlyssesAttention", query, key, value, **options, blocks=(self.query_block, self.kv_block))
        sharding = check_sharding("UlyssesAttention", attention_sharding(query, key), query, key)
        if sharding is None:
            return blockwise_attention(given.queries, given.keys, given.by_head, given.terms)[0]
        if sharding.length != sharding.kv_length:  # a single query or key is not sharded, and scores are few
            return dot_product_attention(query, key, value, **options)
        head_axes = (*sharding.heads, *sharding.length)
        _check_heads(query.shape[2], sharding)
        exchange = Exchange(sharding.length, sharding.parts(sharding.length), given.terms)
        return on_shards(exchange, given, sharding, by_head=head_axes)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A `ShardKernel`: attention between two all-to-alls among `size` devices along mesh axes `axes`."""

    axes: tuple[str, ...]
    size: int
    terms: Terms

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Attends from all queries to all keys, in this device's share of the heads."""
        queries, keys = self._gather(queries), self._gather(keys)
        seen = attend(begin(queries, by_head), queries, keys, by_head, self.terms)
        out, logsumexp = end(seen, queries.query.dtype)
        return self._to_length(out), (queries, keys, by_head, out, logsumexp)

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Sends the output's gradient to the heads, and gradients of query, key and value back to the length."""
        queries, keys, by_head, out, logsumexp = saved
        received = receive(self._to_heads(gradient), out, logsumexp)
        sums = begin_backward(queries, keys, by_head, received)
        sums = attend_backward(sums, queries, keys, by_head, self.terms, received)
        query, key, heads = as_cotangents(sums, queries, keys)
        return *jax.tree.map(self._to_length, (query, key)), heads

    def _to_heads(self, x: jax.Array) -> jax.Array:
        """[rows, length / size, heads, ...] -> [rows, length, heads / size, ...]."""
        return x if self.size == 1 else lax.all_to_all(x, self.axes, split_axis=2, concat_axis=1, tiled=True)

    def _to_length(self, x: jax.Array) -> jax.Array:
        """Undoes `_to_heads`."""
        return x if self.size == 1 else lax.all_to_all(x, self.axes, split_axis=1, concat_axis=2, tiled=True)

    def _gather(self, side: Any) -> Any:
        """Returns queries or keys of the whole length: of arrays with heads a share of these, of the others all."""

        def whole(path: Any, x: jax.Array) -> jax.Array:
            if path[0].name in ("query", "key", "value", "kept"):
                return self._to_heads(x)
            return x if self.size == 1 else lax.all_gather(x, self.axes, axis=1, tiled=True)

        return jax.tree_util.tree_map_with_path(whole, side)


def _check_heads(heads: int, sharding: AttentionSharding) -> None:
    parts, mine = sharding.parts(sharding.length), heads // sharding.parts(sharding.heads)
    if mine % parts:
        over = " x ".join(f"{axis}={sharding.sizes[axis]}" for axis in sharding.length)
        raise ValueError(
            f"UlyssesAttention: {heads} query heads leave {mine} a device"
            f"{f' on {sharding.heads}' if sharding.heads else ''}, which are not divisible by {over}; "
            "use fewer devices there, or ring_attention.RingAttention, which shards no heads"
        )
