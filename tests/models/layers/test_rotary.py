"""Rotary positions and their scalings, against the definitions in their papers, feature pair by feature pair."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from meshway.models.layers.rotary import NTK, Linear, Llama3, ReRoPE, Rotary, YaRN, frequencies

BASE, DIM = 10_000.0, 16
RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 5, 3, DIM)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 0, 300, 5, 1]], np.int32)


def rotated(x, angles):
    """Turns each pair (x[i], x[i + dim / 2]) as a complex number."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)


def test_pairs_turn_by_their_frequency():
    theta = np.array([BASE ** (-2 * i / DIM) for i in range(DIM // 2)])
    np.testing.assert_allclose(frequencies(BASE, DIM), theta)
    expected = rotated(X, POSITIONS[:, :, None, None] * theta)
    np.testing.assert_allclose(Rotary(BASE)(X, POSITIONS), expected, atol=2e-4)
    small = POSITIONS % 8
    np.testing.assert_allclose(Rotary(BASE)(X, small), rotated(X, small[:, :, None, None] * theta), atol=2e-6)


def test_a_fraction_of_the_features_turns():
    found = np.asarray(Rotary(BASE, fraction=0.5)(X, POSITIONS))
    np.testing.assert_array_equal(found[..., DIM // 2 :], X[..., DIM // 2 :])
    np.testing.assert_array_equal(found[..., : DIM // 2], Rotary(BASE)(X[..., : DIM // 2], POSITIONS))
    with pytest.raises(ValueError, match="fraction=0.3 of head_dim=10 is 3"):
        Rotary(fraction=0.3)(jnp.zeros((1, 1, 1, 10)), jnp.zeros((1, 1), jnp.int32))


def test_linear_divides_positions():
    far = Rotary(BASE, scaling=Linear(4.0))(X, 4 * POSITIONS)
    np.testing.assert_allclose(far, Rotary(BASE)(X, POSITIONS), atol=2e-4)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_keeps_the_fastest():
    found, attention = NTK(8.0)(BASE, DIM)
    plain = frequencies(BASE, DIM)
    np.testing.assert_allclose(found[[0, -1]], [plain[0], plain[-1] / 8])
    np.testing.assert_allclose(found, [(BASE * 8 ** (DIM / (DIM - 2))) ** (-2 * i / DIM) for i in range(DIM // 2)])
    assert attention == 1.0


@pytest.mark.parametrize("factor, length, fast, slow", [(4.0, 2048, 32.0, 1.0), (40.0, 4096, 16.0, 2.0)])
def test_yarn_by_parts(factor, length, fast, slow):
    """Definition 2: a pair is kept where it turns often, interpolated where it turns seldom; the ramp between is linear
    in the pair, its ends the whole pairs around those that turn `fast` and `slow` times (the authors' code)."""
    dim = 128
    found, attention = YaRN(factor, length, fast, slow)(BASE, dim)
    theta = [BASE ** (-2 * i / dim) for i in range(dim // 2)]
    turns = [length * t / (2 * math.pi) for t in theta]
    low = max(i for i in range(dim // 2) if turns[i] >= fast)
    high = min(i for i in range(dim // 2) if turns[i] <= slow)
    for i in range(dim // 2):
        gamma = 1 - min(max((i - low) / (high - low), 0), 1)
        assert math.isclose(found[i], (1 - gamma) * theta[i] / factor + gamma * theta[i], rel_tol=1e-9), i
    assert found[0] == theta[0] and math.isclose(found[-1], theta[-1] / factor)
    assert math.isclose(attention, 0.1 * math.log(factor) + 1)
    assert YaRN(factor, length, attention_factor=1.5)(BASE, dim)[1] == 1.5


def test_yarn_raises_scores_by_the_square_of_its_factor():
    yarn = YaRN(4.0, 64, attention_factor=1.25)
    plain = Rotary(BASE, scaling=YaRN(4.0, 64, attention_factor=1.0))
    np.testing.assert_allclose(Rotary(BASE, scaling=yarn)(X, POSITIONS), 1.25 * plain(X, POSITIONS), rtol=1e-5)


def test_llama3_by_wavelength():
    """Grattafiori et al. 2024, released code: by wavelength against the original length over two factors."""
    factor, low, high, length, dim, base = 8.0, 1.0, 4.0, 8192, 128, 500_000.0
    found, attention = Llama3(factor, low, high, length)(base, dim)
    seen = set()
    for i, got in enumerate(found):
        theta = base ** (-2 * i / dim)
        wavelength = 2 * math.pi / theta
        if wavelength < length / high:
            kind, expected = "kept", theta
        elif wavelength > length / low:
            kind, expected = "interpolated", theta / factor
        else:
            smooth = (length / wavelength - low) / (high - low)
            kind, expected = "between", (1 - smooth) * theta / factor + smooth * theta
        seen.add(kind)
        assert math.isclose(got, expected, rel_tol=1e-9), (i, kind)
    assert seen == {"kept", "interpolated", "between"} and attention == 1.0


def test_numbers_that_mean_nothing():
    for wrong in (lambda: Linear(0.0), lambda: NTK(-1.0), lambda: YaRN(4.0, 0), lambda: Llama3(8.0, 4.0, 1.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(ValueError, match="at least 4"):
        NTK(2.0)(BASE, 2)


def attended(layer, length):
    """Scores as attention makes them, [batch, heads, queries, keys], of random queries and fewer key heads."""
    query = RANDOM.standard_normal((2, length, 4, DIM)).astype(np.float32)
    key = RANDOM.standard_normal((2, length, 2, DIM)).astype(np.float32)
    places = np.arange(length, dtype=np.int32)[None]
    near = np.einsum("bqhd,bkhd->bhqk", layer(query, places), np.repeat(layer(key, places), 2, axis=2))
    return query, key, near + layer.scores(layer(query, places), layer(key, places), places, places)


@pytest.mark.parametrize("slope", [0.0, 0.25])
@pytest.mark.parametrize("scaling, fraction", [(None, 1.0), (YaRN(4.0, 8), 0.5)])
def test_rerope_sees_what_is_far_at_the_distance_of_its_window(slope, scaling, fraction):
    """Brute force: the score of each pair from rotary positions that are its own."""
    window, length = 3, 9
    plain = Rotary(100.0, fraction, scaling)
    layer = ReRoPE(100.0, fraction, scaling, window=window, slope=slope)
    query, key, found = attended(layer, length)
    for i in range(length):
        for j in range(i + 1):
            distance = i - j if i - j <= window else window + slope * (i - j - window)
            turned = np.asarray(plain(query[:, i : i + 1], np.array([[distance]])))[:, 0]
            still = np.repeat(np.asarray(plain(key[:, j : j + 1], np.array([[0]])))[:, 0], 2, axis=1)
            np.testing.assert_allclose(found[:, :, i, j], (turned * still).sum(-1), atol=3e-5)


def test_rerope_has_a_window():
    with pytest.raises(ValueError, match="window must be at least 1"):
        ReRoPE(window=0)
    with pytest.raises(ValueError, match="slope must be at least 0 and below 1"):
        ReRoPE(slope=1.0)
