"""Feed-forward layers: activations against their formulas, and biases."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.mlp import ACTIVATIONS, Mlp

FORMULAS = {
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "linear": lambda x: x,
}


def test_every_activation_has_a_formula():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_are_their_formulas(name):
    points = np.linspace(-4, 4, 41, dtype=np.float32)
    expected = [FORMULAS[name](float(x)) for x in points]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(points)), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_is_added_to_each_product():
    random = np.random.default_rng(0)
    made = Mlp(4, 6, rngs=nnx.Rngs(0), activations=("relu", "linear"), use_bias=True)
    x = random.standard_normal((1, 2, 4)).astype(np.float32)
    for part in (made.wi_0, made.wi_1, made.wo):
        part.bias[...] = random.standard_normal(part.bias.shape).astype(np.float32)
    kernels = [np.asarray(part.kernel[...]) for part in (made.wi_0, made.wi_1, made.wo)]
    biases = [np.asarray(part.bias[...]) for part in (made.wi_0, made.wi_1, made.wo)]
    hidden = np.maximum(x @ kernels[0] + biases[0], 0) * (x @ kernels[1] + biases[1])
    np.testing.assert_allclose(made(x), hidden @ kernels[2] + biases[2], rtol=1e-4, atol=1e-5)
    assert Mlp(4, 6, rngs=nnx.Rngs(0)).wo.bias is None
