"""Transformer-XL's scores against its equation, pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.positions import RelativeScores

WIDTH, HEADS, SIZE, LENGTH = 8, 4, 3, 5
RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def layer():
    made = RelativeScores(WIDTH, HEADS, SIZE, rngs=nnx.Rngs(0), base=100.0)
    made.kernel[...] = drawn(WIDTH, HEADS, SIZE)
    made.content_bias[...], made.position_bias[...] = drawn(HEADS, SIZE), drawn(HEADS, SIZE)
    return made


def expected(made, query, key, i, j, distance):
    """Terms (b), (c) and (d) of section 3.3 for one query and one key."""
    frequencies = 100.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
    sines = np.concatenate([np.sin(distance * frequencies), np.cos(distance * frequencies)])
    turned = np.einsum("e,ehd->hd", sines, made.kernel[...])
    q, k = query[:, i], np.repeat(key[:, j], HEADS // key.shape[2], axis=1)
    u, v = np.asarray(made.content_bias[...]), np.asarray(made.position_bias[...])
    return (q * turned).sum(-1) + (u * k).sum(-1) + (v * turned).sum(-1)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scores_of_a_row(kv_heads):
    made, query, key = layer(), drawn(2, LENGTH, HEADS, SIZE), drawn(2, LENGTH, kv_heads, SIZE)
    places = jnp.arange(LENGTH)[None]
    found = made.scores(query, key, places, places)
    for i in range(LENGTH):
        for j in range(LENGTH):
            np.testing.assert_allclose(found[:, :, i, j], expected(made, query, key, i, j, i - j), rtol=1e-4, atol=1e-4)


def test_scores_of_any_places_over_a_cache():
    made, query, key = layer(), drawn(2, 1, HEADS, SIZE), drawn(2, LENGTH, 2, SIZE)
    places = jnp.asarray([[3], [0]])
    found = made.scores(query, key, places, jnp.arange(LENGTH)[None])
    for row, place in enumerate((3, 0)):
        for j in range(LENGTH):
            wanted = expected(made, query, key, 0, j, place - j)[row]
            np.testing.assert_allclose(found[row, :, 0, j], wanted, rtol=1e-4, atol=1e-4)


def test_sines_come_in_pairs():
    with pytest.raises(ValueError, match="d_model=7 is odd"):
        RelativeScores(7, HEADS, SIZE, rngs=nnx.Rngs(0))
