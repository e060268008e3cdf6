"""Blockwise attention is attention, and touches only the blocks in which something is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, assert_equals_reference

from meshway.models.layers.kernels.blockwise import blockwise_attention
from meshway.models.layers.kernels.ring_attention import RingAttention
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms
from meshway.models.layers.masks import AttentionMetadata, row_positions


@pytest.mark.parametrize(
    "case",
    [
        Case(length=17, causal=True, segments=True, bias=True, dropout_rate=0.25),
        pytest.param(Case(length=7, kv_length=19, kv_heads=1), marks=pytest.mark.slow),
        pytest.param(Case(kv_heads=4, causal=True, segments=True, prefix=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_equals_the_reference_whatever_the_blocks(case):
    # Without a mesh the ring is one device: blockwise attention. 17 and 7 divide by neither block.
    assert_equals_reference(RingAttention(query_block=4, kv_block=5), case)


def test_logsumexp_joins_parts_and_has_a_gradient():
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(1, 6, 2, 4)), jnp.float32) for _ in range(3))
    terms = Terms(query_block=4, kv_block=4)

    def joined(query, key, value):
        parts = [
            blockwise_attention(Queries(query), Keys(key[:, at], value[:, at]), ByHead(), terms)
            for at in (slice(0, 2), slice(2, 6))
        ]
        shares = jax.nn.softmax(jnp.stack([logsumexp for _, logsumexp in parts]), axis=0)
        return sum(share[..., None] * out for share, (out, _) in zip(shares, parts))

    def whole(query, key, value):
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    def of(function):
        weight = jnp.cos(jnp.arange(query.size).reshape(query.shape))
        return jax.jit(jax.grad(lambda *x: jnp.sum(weight * function(*x)), argnums=(0, 1, 2)))(query, key, value)

    for found, wanted in zip(of(joined), of(whole)):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_blocks_that_nobody_sees_are_not_computed():
    # What is computed and multiplied by zero would leave a trace of NaN; what is skipped leaves none.
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0]])
    query = jnp.ones((1, 8, 1, 2))
    poison = query.at[:, 6:].set(jnp.nan)
    keys = Keys(poison, poison, AttentionMetadata(segments, row_positions(8)))
    queries = Queries(query, AttentionMetadata(segments, row_positions(8)))
    terms = Terms(causal=True, query_block=2, kv_block=2)
    out, logsumexp = jax.jit(blockwise_attention, static_argnums=3)(queries, keys, ByHead(), terms)
    np.testing.assert_allclose(out[:, :6], 1.0, atol=1e-6)
    np.testing.assert_array_equal(out[:, 6:], 0.0)  # padding sees nothing
    np.testing.assert_array_equal(np.isneginf(logsumexp[0, :, 0]), segments[0] == 0)


def test_blocks_have_a_size():
    with pytest.raises(ValueError, match="a size of 1 or more, not 512 x 0"):
        Terms(kv_block=0)
