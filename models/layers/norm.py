"""Normalisation layers, and dropout keyed by an explicit key."""

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.module import param


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation without mean or bias (Zhang & Sennrich 2019, eq. 4), as in T5 and Llama."""

    def __init__(
        self,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-6,
        unit_offset: bool = False,
        axis: str = "embed",
    ):
        """`unit_offset` stores scale - 1, as Gemma does; `axis` is the logical axis that is normalised."""
        del rngs  # the scale starts at one
        self.scale = param(jnp.zeros((d_model,)) if unit_offset else jnp.ones((d_model,)), (axis,))
        self.epsilon, self.unit_offset = epsilon, unit_offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d_model] -> the same shape and dtype; the statistics are float32."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...]
        return (y * (1.0 + scale if self.unit_offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 (Ba et al. 2016, eq. 4), then a scale and a bias."""

    def __init__(
        self,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        axis: str = "embed",
    ):
        """`axis` is the logical axis that is normalised."""
        del rngs  # the scale starts at one, the bias at zero
        self.scale = param(jnp.ones((d_model,)), (axis,))
        self.bias = param(jnp.zeros((d_model,)), (axis,)) if use_bias else None
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., d_model] -> the same shape and dtype; the statistics are float32."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon) * self.scale[...]
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)


def split_key(rng: jax.Array | None, num: int) -> list[jax.Array | None]:
    """Splits a dropout key into `num` keys; None into `num` times None."""
    return [None] * num if rng is None else list(jax.random.split(rng, num))


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, shared_axis: int | None = -2) -> jax.Array:
    """Zeroes features with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      x: any array.
      rate: probability to drop, in [0, 1).
      rng: key; None leaves x as it is.
      shared_axis: the axis along which one mask is shared. T5 shares it over the length, which draws far
        fewer random numbers; None draws for every element.
    """
    if rng is None or rate == 0.0:
        return x
    shape = list(x.shape)
    if shared_axis is not None:
        shape[shared_axis] = 1
    keep = jax.random.bernoulli(rng, 1.0 - rate, tuple(shape))
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
