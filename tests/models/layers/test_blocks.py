"""Where a block normalises: each order against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshway.models.layers.blocks import SelfAttentionBlock
from meshway.models.layers.norm import RMSNorm

X = np.random.default_rng(0).standard_normal((1, 2, 4)).astype(np.float32)


class Attention(nnx.Module):
    def __init__(self, d_model, *, rngs):
        pass

    def __call__(self, x, **_):
        return jnp.sin(3 * x), "cache"


class Mlp(Attention):
    def __call__(self, x, **_):
        return jnp.cos(2 * x)


def block(**options):
    made = SelfAttentionBlock(4, Attention, Mlp, rngs=nnx.Rngs(0), **options)
    for i, name in enumerate(("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")):
        if getattr(made, name) is not None:
            getattr(made, name).scale[...] = jnp.arange(4) + 1.0 + i
    return made


def norm(i):
    made = RMSNorm(4, rngs=nnx.Rngs(0))
    made.scale[...] = jnp.arange(4) + 1.0 + i
    return made


def test_norms_before_each_part():
    y, cache = block()(X)
    h = X + jnp.sin(3 * norm(0)(X))
    np.testing.assert_allclose(y, h + jnp.cos(2 * norm(2)(h)), rtol=1e-5)
    assert cache == "cache"


def test_norms_after_each_part():
    y, _ = block(norms="post")(X)
    h = norm(0)(X + jnp.sin(3 * X))
    np.testing.assert_allclose(y, norm(2)(h + jnp.cos(2 * h)), rtol=1e-5)


def test_norms_before_and_after_each_part():
    y, _ = block(norms="both")(X)
    h = X + norm(1)(jnp.sin(3 * norm(0)(X)))
    np.testing.assert_allclose(y, h + norm(3)(jnp.cos(2 * norm(2)(h))), rtol=1e-5)


def test_parts_in_parallel_share_a_norm():
    made = block(parallel=True)
    n = norm(0)(X)
    np.testing.assert_allclose(made(X)[0], X + jnp.sin(3 * n) + jnp.cos(2 * n), rtol=1e-5)
    assert made.mlp_norm is None and made.attention_post_norm is None


def test_orders_that_are_none():
    with pytest.raises(ValueError, match="'pre', 'post' or 'both', not 'sandwich'"):
        block(norms="sandwich")
    with pytest.raises(ValueError, match="parallel block has norms='pre', not 'both'"):
        block(norms="both", parallel=True)
