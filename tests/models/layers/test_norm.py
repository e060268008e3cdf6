"""Normalisation layers against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.norm import LayerNorm, RMSNorm

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32) * 3 + 1
SCALE, BIAS = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)


def test_rms_norm():
    made = RMSNorm(8, rngs=nnx.Rngs(0), epsilon=0.1)
    np.testing.assert_array_equal(made.scale[...], np.ones(8))
    made.scale[...] = SCALE
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 0.1) * SCALE
    np.testing.assert_allclose(made(X), expected, rtol=1e-5)


def test_a_unit_offset_stores_the_scale_less_one():
    made = RMSNorm(8, rngs=nnx.Rngs(0), unit_offset=True)
    np.testing.assert_array_equal(made.scale[...], np.zeros(8))
    made.scale[...] = SCALE
    plain = RMSNorm(8, rngs=nnx.Rngs(0))
    plain.scale[...] = 1 + SCALE
    np.testing.assert_allclose(made(X), plain(X), rtol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm(use_bias):
    made = LayerNorm(8, rngs=nnx.Rngs(0), epsilon=0.1, use_bias=use_bias)
    made.scale[...] = SCALE
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 0.1) * SCALE
    if use_bias:
        np.testing.assert_array_equal(made.bias[...], np.zeros(8))
        made.bias[...] = BIAS
        expected = expected + BIAS
    else:
        assert made.bias is None
    np.testing.assert_allclose(made(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_the_axis_is_named_and_the_dtype_kept(norm):
    made = norm(8, rngs=nnx.Rngs(0), axis="head_dim")
    assert made.scale.get_metadata("axes") == ("head_dim",)
    half = made(X.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), made(X), rtol=0.02, atol=0.02)
