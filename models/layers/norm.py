"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.module import param


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation without mean or bias (Zhang & Sennrich 2019, eq. 4), as in T5."""

    def __init__(self, d_model: int, *, rngs: nnx.Rngs, epsilon: float = 1e-6):
        del rngs  # the scale starts at one
        self.scale = param(jnp.ones((d_model,)), ("embed",))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d_model] -> the same shape and dtype; the statistics are float32."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...]).astype(x.dtype)
