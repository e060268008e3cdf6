"""The attention layer with each of its options, against sums written out query by query, and over a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.attention import Attention
from meshway.models.layers.masks import (
    AttentionMetadata,
    Mask,
    causal_mask,
    make_attention_mask,
    row_metadata,
    row_positions,
)
from meshway.models.layers.norm import RMSNorm
from meshway.models.layers.positions import RelativePositionBias, alibi_slopes, with_alibi
from meshway.models.module import Network

D_MODEL, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 12, 6, 2, 4, 9
OPTIONS = dict(
    biases=("query", "key", "value", "out"),
    qk_norm=RMSNorm,
    query_scale=0.6,
    alibi=True,
    window=4,
    soft_cap=1.2,
    sinks=True,
)


@functools.cache
def network(**options):
    return Network(functools.partial(Attention, D_MODEL, HEADS, HEAD_DIM, num_kv_heads=KV_HEADS, **options))


@functools.cache
def parameters():
    """Returns parameters of a layer with all options, none at its start of zeros or ones."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(network(**OPTIONS).init, jax.random.key(0))
    return jax.tree.map(lambda x: np.asarray(0.5 + 0.5 * random.normal(size=x.shape), np.float32), shapes)


def attend_by_hand(params, x, seen):
    """What the layer with all options makes of x [length, d_model], where seen [length, length] has no window."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def projected(name):
        return np.einsum("le,ehd->lhd", x, p[name]["kernel"]) + p[name]["bias"]

    def normal(y, scale):
        return y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * scale

    query, key = (normal(projected(name), p[f"{name}_norm"]["scale"]) for name in ("query", "key"))
    value, out = projected("value"), np.zeros((LENGTH, HEADS, HEAD_DIM))
    for head in range(HEADS):
        for place in range(LENGTH):
            near = [k for k in range(LENGTH) if seen[place, k] and abs(k - place) < OPTIONS["window"]]
            scores = [0.6 * query[place, head] @ key[k, head // 3] for k in near]
            scores = [s - alibi_slopes(HEADS)[head] * abs(k - place) for s, k in zip(scores, near)]
            weights = np.exp([1.2 * np.tanh(s / 1.2) for s in scores])
            total = weights.sum() + np.exp(p["sinks"][head])
            out[place, head] = sum(w / total * value[k, head // 3] for w, k in zip(weights, near))
    return np.einsum("lhd,hde->le", out, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.fixture(scope="module")
def inputs():
    x = jax.random.normal(jax.random.key(2), (2, LENGTH, D_MODEL))
    segments = jnp.array([[1] * LENGTH, [1, 1, 1, 1, 2, 2, 2, 2, 2]])
    return x, segments


@pytest.mark.parametrize("causal", [True, False])
def test_all_options_together_are_the_sums_written_out(inputs, causal):
    x, segments = inputs
    metadata = row_metadata(LENGTH, segments) if causal else AttentionMetadata(segments)
    mask = make_attention_mask(metadata, metadata, causal)
    found, _ = jax.jit(lambda params: network(**OPTIONS).bind(params)(x, mask=mask))(parameters())
    for row in range(2):
        seen = np.equal.outer(segments[row], segments[row]) & (np.tri(LENGTH, dtype=bool) if causal else True)
        np.testing.assert_allclose(found[row], attend_by_hand(parameters(), x[row], seen), atol=2e-5)


def test_a_cache_filled_token_by_token_gives_what_the_whole_row_gives(inputs):
    x, _ = inputs

    def both(params):
        layer, metadata = network(**OPTIONS).bind(params), row_metadata(LENGTH)

        def step(cache, token):
            place, x = token
            positions = jnp.full((2, 1), place)
            mask = Mask(causal_mask(positions, row_positions(LENGTH + 3)))
            y, cache = layer(x[:, None], mask=mask, cache=cache, cache_index=positions)
            return cache, y[:, 0]

        cache = layer.empty_cache(2, LENGTH + 3, jnp.float32)
        _, found = jax.lax.scan(step, cache, (jnp.arange(LENGTH), x.swapaxes(0, 1)))
        return found.swapaxes(0, 1), layer(x, mask=make_attention_mask(metadata, metadata, causal=True))[0]

    found, wanted = jax.jit(both)(parameters())
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_parameters_and_their_axes():
    axes = network(**OPTIONS).axes()
    assert axes["sinks"] == ("heads",) and axes["key_norm"] == {"scale": ("head_dim",)}
    assert axes["query"]["bias"] == ("heads", "head_dim") and axes["out"]["bias"] == ("embed",)
    plain = network(biases=("key",)).init(jax.random.key(0))
    assert {name: sorted(leaves) for name, leaves in plain.items()} == {
        "key": ["bias", "kernel"],
        **{name: ["kernel"] for name in ("query", "value", "out")},
    }


def test_a_row_without_a_mask_may_have_a_window(inputs):
    x, _ = inputs
    narrow = network(window=1).bind(network().init(jax.random.key(0)))
    attend = jax.jit(lambda x: narrow(x)[0])
    y, changed = attend(x), attend(x.at[:, 3].add(1.0))
    assert np.argwhere(np.abs(changed - y).max(axis=(0, 2)) > 1e-6).tolist() == [[3]]


@pytest.mark.parametrize(
    "heads, slopes",
    [
        (1, [2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [*(2**-n for n in range(1, 9)), *(2 ** -(n / 2) for n in (1, 3, 5, 7))]),
    ],
)
def test_slopes_for_any_number_of_heads(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes, rtol=1e-6)


def test_alibi_adds_to_a_bias_among_its_own_positions():
    bias = RelativePositionBias(2, rngs=nnx.Rngs(0), bidirectional=True)(row_positions(3), row_positions(5))
    both = with_alibi(bias, 2, row_positions(99), row_positions(99))
    distance = np.abs(np.subtract.outer(np.arange(3), np.arange(5)))
    np.testing.assert_allclose(
        both.dense - bias.dense, -np.multiply.outer([1 / 16, 1 / 256], distance)[None], atol=1e-6
    )
    assert both.table is bias.table and both.kv_positions is bias.kv_positions


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_kv_heads": 4}, "num_heads=6 is not a multiple of num_kv_heads=4"),
        ({"biases": ["querry"]}, r"some of \['query', 'key', 'value', 'out'\], not \['querry'\]"),
        ({"biases": "query"}, "not 'query'"),
        ({"window": 0}, "window must be at least 1"),
        ({"soft_cap": -1.0}, "soft_cap must be above 0"),
        ({"query_scale": 0.5, "scale_logits": False}, "query_scale=0.5 scales queries"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Attention(D_MODEL, HEADS, HEAD_DIM, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("options", [{"window": 3}, {"alibi": True}])
def test_places_are_of_self_attention(inputs, options):
    x, _ = inputs
    layer = network(**options).bind(network(**options).init(jax.random.key(0)))
    with pytest.raises(ValueError, match="are for self-attention"):
        layer(x, attended=layer.keys_values(x))
