"""Dropout: what it keeps and scales, and that every place of a network draws for itself."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import tiers
from tiny import program

from meshway.models.layers.blocks import CrossAttentionBlock, SelfAttentionBlock
from meshway.models.layers.norm import dropout
from meshway.models.layers.side_outputs import add_metric, capture
from meshway.models.layers.stack import Stack
from meshway.models.module import Network, param


def test_a_share_is_dropped_and_the_rest_scaled():
    x = jnp.ones((8, 16, 256))
    y = np.asarray(dropout(x, 0.25, jax.random.key(0), shared_axis=None))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    assert abs(np.mean(y == 0) - 0.25) < 0.01
    assert abs(np.mean(y) - 1) < 0.02, "the mean stays"


def test_a_mask_is_shared_along_the_length_and_nothing_else():
    y = np.asarray(dropout(jnp.ones((8, 16, 256)), 0.25, jax.random.key(0)))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert np.any(y[0] != y[1])


def test_without_a_key_or_a_rate_nothing_is_dropped():
    x = jnp.ones((2, 3, 4))
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, jax.random.key(0)) is x


class Drawn(nnx.Module):
    """A block, or a part of one, that says what its key draws and returns `size` everywhere."""

    def __init__(self, d_model, *, rngs, size=1.0):
        self.kernel, self.size = param(jnp.zeros((d_model,)), ("embed",)), size

    def __call__(self, x, *, rng, cache=None, **_):
        add_metric(f"draw_{self.size:g}", jax.random.uniform(rng))
        return jnp.full_like(x, self.size), cache

    def keys_values(self, encoded):
        return encoded, encoded


class DrawnMlp(Drawn):
    def __call__(self, x, *, rng):
        return super().__call__(x, rng=rng)[0]


@pytest.mark.parametrize("scan", [True, False])
def test_every_layer_draws_for_itself(scan):
    made = Network(lambda rngs: Stack(5, 4, rngs=rngs, blocks=[Drawn, Drawn], scan=scan))
    with capture() as found:
        made.bind(made.init(jax.random.key(0)))(jnp.ones((1, 2, 4)), rng=jax.random.key(1))
    assert len(set(np.asarray(found.metrics["draw_1"]).tolist())) == 5


@pytest.mark.parametrize("cross", [False, True])
def test_every_part_of_a_block_draws_for_itself(cross):
    """Parts return 1, 10 (and 100) everywhere, so the sum tells which of them each feature kept."""
    width, x, sizes = 256, jnp.zeros((1, 2, 256)), [1.0, 10.0]

    def part(kind, size):
        return lambda d_model, rngs: kind(d_model, rngs=rngs, size=size)

    if cross:
        sizes.append(100.0)
        attentions = iter(sizes)
        block = CrossAttentionBlock(
            width,
            lambda d_model, rngs: Drawn(d_model, rngs=rngs, size=next(attentions)),
            part(DrawnMlp, 100.0),
            rngs=nnx.Rngs(0),
            dropout_rate=0.5,
        )
        context = {"encoded": x}
    else:
        block = SelfAttentionBlock(width, part(Drawn, 1.0), part(DrawnMlp, 10.0), rngs=nnx.Rngs(0), dropout_rate=0.5)
        context = {}
    with capture() as found:
        y, _ = block(x, rng=jax.random.key(0), **context)
    kept = np.array([np.asarray(y[0, 0] / 2).astype(int) // int(size) % 10 for size in sizes])
    assert set(kept.ravel().tolist()) == {0, 1}, "each is dropped or doubled"
    agree = np.mean(kept[:, None] == kept[None], axis=-1)[~np.eye(len(sizes), dtype=bool)]
    assert np.all(abs(agree - 0.5) < 0.2), "no two of them are dropped together"
    assert len({float(value) for value in found.metrics.values()}) == len(found.metrics) == len(sizes)


T5, LM = ("t5_1_1", 2 + 4 + 2 + 6), ("lm", 2 + 4 * 2)


@pytest.mark.parametrize("family, places", tiers([T5, LM], slow=[T5, LM]))
def test_all_places_of_a_network_draw_each_by_its_own_key(family, places, monkeypatch):
    """Embeddings and outputs of each stack; of each layer the weights and the result of each attention, what is inside
    the MLP, and its result."""
    layers = ["NUM_LAYERS=2"] if family == "lm" else []
    made = program(family, *layers, "DROPOUT_RATE=0.3", "SCAN=False", "REMAT='none'", "BATCH_SIZE=2")
    params, batch = made.model.init(jax.random.key(0)), made.synthetic_batch()
    draw, keys = jax.random.bernoulli, collections.Counter()

    def bernoulli(key, p, shape):
        assert p == pytest.approx(0.7)
        keys[tuple(np.asarray(jax.random.key_data(key)).tolist())] += 1
        return draw(key, p, shape)

    monkeypatch.setattr(jax.random, "bernoulli", bernoulli)
    made.model.loss(params, batch, jax.random.key(0))
    assert set(keys.values()) == {1} and len(keys) == places
    keys.clear()
    made.model.loss(params, batch, None)
    assert not keys
