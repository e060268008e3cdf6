"""Ring attention: queries stay, keys and values are passed once around the devices that shard the length."""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from meshway.models.layers.kernels.attention_shards import (
    Operands,
    attention_sharding,
    check_sharding,
    on_shards,
    operands,
)
from meshway.models.layers.kernels.blockwise import (
    Gradients,
    Softmax,
    as_cotangents,
    attend,
    attend_backward,
    begin,
    begin_backward,
    blockwise_attention,
    end,
    fill_up,
    filled,
    receive,
)
from meshway.models.layers.kernels.reference import Options, dot_product_attention
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms


@dataclasses.dataclass(frozen=True)
class RingAttention:
    """An `AttentionKernel` for layouts that shard `length` and `kv_length` over the same mesh axes (Liu et al. 2023,
    section 3).

    Each device holds the keys and values of one shard of the row at a time, with their own number of heads, and one
    block of scores; the backward pass recomputes scores while keys, values and their gradients go around once more.
    Where the layout does not shard the length, or without a mesh, it is blockwise attention on each device's own rows
    and heads. Dropout of attention weights makes the reference's random draws.

    With `balanced`, causal self-attention without a prefix first exchanges halves of shards among devices, so that
    device j of n works on halves j and 2n-1-j of the row's 2n (as in Llama 3, Grattafiori et al. 2024, section 3.3.2):
    each step then computes two half-by-half blocks on every device, where the plain ring makes some devices compute
    four and others none. It relies on `AttentionMetadata.row_positions` growing along the row. Prefixes, which see
    later tokens of their own, and cross-attention take the plain ring; fully masked blocks are skipped in either.
    """

    balanced: bool = True
    query_block: int = 512
    kv_block: int = 512

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`; a query that sees no key gets 0 instead of the mean of all values.

        Raises:
          ValueError: a bias that is not a `PositionBias`, a mask given as a dense array only, or a layout that shards
            queries by other mesh axes than keys.
        """
        given = operands("RingAttention", query, key, value, **options, blocks=(self.query_block, self.kv_block))
        sharding = check_sharding("RingAttention", attention_sharding(query, key), query, key)
        if sharding is None:
            return blockwise_attention(given.queries, given.keys, given.by_head, given.terms)[0]
        if sharding.length != sharding.kv_length:  # a single query or key is not sharded, and scores are few
            return dot_product_attention(query, key, value, **options)
        size = sharding.parts(sharding.length)
        ring = Ring(sharding.length, size, size > 1 and self.balanced and _is_triangle(given), given.terms)
        return on_shards(ring, given, sharding, by_head=sharding.heads)


@dataclasses.dataclass(frozen=True)
class Ring:
    """A `ShardKernel`: the ring over mesh axes `axes`, of `size` devices together; `zigzag` balances causal work by
    halves."""

    axes: tuple[str, ...]
    size: int
    zigzag: bool
    terms: Terms

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Attends from this device's queries to the keys of all devices."""
        dtype, length = queries.query.dtype, queries.query.shape[1]
        queries, keys = _parts((queries, filled(keys, 2) if self.zigzag else keys), self)

        def step(turn: Any, softmax: Softmax, keys: Keys) -> Softmax:
            def see(softmax: Softmax, pair: jax.Array) -> tuple[Softmax, None]:
                mine, theirs = pair
                new = attend(_take(softmax, mine), _take(queries, mine), _take(keys, theirs), by_head, self.terms)
                return _put(softmax, mine, new), None

            return lax.scan(see, softmax, _pairs(turn, self))[0]

        def turn(carry: tuple[Softmax, Keys], turn: Any) -> tuple[tuple[Softmax, Keys], None]:
            softmax, keys = carry
            arriving = _pass_on(keys, self)  # overlaps with attention to this turn's keys
            return (step(turn, softmax, keys), arriving), None

        carry = (jax.vmap(lambda part: begin(part, by_head))(queries), keys)
        if self.size > 1:
            carry = _middle(turn, turn(carry, 0)[0], self)
        softmax = step(self.size - 1, *carry)
        out, logsumexp = _whole(end(softmax, dtype), self, length)
        return out, (queries, keys, by_head, out, logsumexp)

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Sends keys, values and the sums of their gradients around once more."""
        queries, keys, by_head, out, logsumexp = saved
        received = _parts(receive(gradient, out, logsumexp), self)
        zeros = begin_backward(queries, keys, by_head, received)

        def step(turn: Any, sums: Gradients, keys: Keys) -> Gradients:
            def see(sums: Gradients, pair: jax.Array) -> tuple[Gradients, None]:
                mine, theirs = pair
                key, value = _take((sums.key, sums.value), theirs)
                part = Gradients(_take(sums.query, mine), key, value, sums.by_head)
                side = (_take(queries, mine), _take(keys, theirs), by_head, self.terms, _take(received, mine))
                new = attend_backward(part, *side)
                key, value = _put((sums.key, sums.value), theirs, (new.key, new.value))
                return Gradients(_put(sums.query, mine, new.query), key, value, new.by_head), None

            return lax.scan(see, sums, _pairs(turn, self))[0]

        def turn(carry: tuple[Gradients, Keys], turn: Any, last: bool = False) -> tuple[tuple[Gradients, Keys], None]:
            sums, keys = carry
            # Both are sent while this turn is computed; its gradients are added to the sums once these have arrived.
            arriving = keys if last else _pass_on(keys, self)
            key_sums = _pass_on((sums.key, sums.value), self)
            sums = step(turn, sums._replace(key=zeros.key, value=zeros.value), keys)
            key, value = jax.tree.map(jnp.add, key_sums, (sums.key, sums.value))
            return (sums._replace(key=key, value=value), arriving), None

        sums = step(0, zeros, keys)
        if self.size > 1:
            carry = _middle(turn, (sums, _pass_on(keys, self)), self)
            sums = turn(carry, self.size - 1, last=True)[0][0]
        found = as_cotangents(sums, queries, keys)
        if self.size > 1:
            found = (found[0], _pass_on(found[1], self), found[2])  # back to the keys' own devices
        length = out.shape[1]
        kv_length = length if self.zigzag else keys.key.shape[2]  # without the padding of halves
        return _whole(found[0], self, length), _whole(found[1], self, kv_length), found[2]


def _is_triangle(given: Operands) -> bool:
    """Whether a query sees keys up to its own row position at most, with queries and keys in the same order."""
    queries, keys = given.queries, given.keys
    if not given.terms.causal or queries.query.shape[1] != keys.key.shape[1]:
        return False
    assert queries.metadata is not None and keys.metadata is not None
    ordered = all(
        metadata.row_positions is not None and metadata.row_positions.shape[0] == 1
        for metadata in (queries.metadata, keys.metadata)
    )
    return ordered and (queries.metadata.prefix is None or keys.metadata.prefix is None)


def _pairs(turn: Any, ring: Ring) -> jax.Array:
    """Returns which part of the queries sees which part of the keys at a turn, int32 [pairs, 2].

    In halves: the later half of the queries sees the earlier half of any keys. The earlier half of keys from an earlier
    device is also seen by the earlier half of the queries, the later half of keys from a later device by the later half
    of the queries: halves 0 .. n-1 and n .. 2n-1 are in opposite orders. A device's own keys are seen in all three
    ways.
    """
    if not ring.zigzag:
        return jnp.zeros((1, 2), jnp.int32)
    if isinstance(turn, int) and turn == 0:
        return jnp.array([(1, 0), (0, 0), (1, 1)], jnp.int32)
    later = (turn > lax.axis_index(ring.axes)).astype(jnp.int32)  # the keys' device is index - turn, modulo n
    return jnp.stack([jnp.stack([jnp.ones_like(later), jnp.zeros_like(later)]), jnp.stack([later, later])])


def _middle(turn: Callable[[Any, Any], Any], carry: Any, ring: Ring) -> Any:
    """Runs the turns between the first and the last."""
    return carry if ring.size == 2 else lax.scan(turn, carry, jnp.arange(1, ring.size - 1))[0]


def _pass_on(tree: Any, ring: Ring) -> Any:
    """Sends arrays to the next device of the ring and returns those of the one before."""
    to_next = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, ring.axes, to_next), tree)


def _parts(tree: Any, ring: Ring) -> Any:
    """Returns what this device works on, [parts, rows, length / parts, ...]: its own, or its two halves of the zigzag.

    Half i of the row's 2n goes to device min(i, 2n-1-i). So the first halves of all devices go to different devices,
    and so do the second: even devices receive their earlier half with the first, odd ones with the second.
    """
    if not ring.zigzag:
        return jax.tree.map(lambda x: x[None], tree)
    even = lax.axis_index(ring.axes) % 2 == 0

    def exchange(x: jax.Array) -> jax.Array:
        halves = jnp.stack(jnp.split(x, 2, axis=1))
        first, second = (lax.ppermute(halves[i], ring.axes, _zigzag(ring, i)) for i in range(2))
        return jnp.stack([jnp.where(even, first, second), jnp.where(even, second, first)])

    return jax.tree.map(exchange, fill_up(tree, 2))


def _whole(tree: Any, ring: Ring, length: int) -> Any:
    """Undoes `_parts`, and drops the padding of halves."""
    if not ring.zigzag:
        return jax.tree.map(lambda x: x[0], tree)
    even = lax.axis_index(ring.axes) % 2 == 0

    def restore(x: jax.Array) -> jax.Array:
        first, second = jnp.where(even, x[0], x[1]), jnp.where(even, x[1], x[0])
        halves = [
            lax.ppermute(h, ring.axes, [(b, a) for a, b in _zigzag(ring, i)]) for i, h in enumerate((first, second))
        ]
        return jnp.concatenate(halves, axis=1)[:, :length]

    return jax.tree.map(restore, tree)


def _zigzag(ring: Ring, which: int) -> list[tuple[int, int]]:
    """Returns (from, to) for the first or the second half of every device."""
    halves = range(which, 2 * ring.size, 2)
    return [(device, min(half, 2 * ring.size - 1 - half)) for device, half in enumerate(halves)]


def _take(tree: Any, part: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, part, 0, keepdims=False), tree)


def _put(tree: Any, part: jax.Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, part, 0), tree, new)
