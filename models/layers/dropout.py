"""Dropout keyed by an explicit key: no key, no dropout."""

import jax
import jax.numpy as jnp


def split_key(rng: jax.Array | None, num: int) -> list[jax.Array | None]:
    """Splits a dropout key in `num`, or passes its absence on."""
    return [None] * num if rng is None else list(jax.random.split(rng, num))


def dropout(x: jax.Array, rate: float, rng: jax.Array | None, shared_axis: int | None = -2) -> jax.Array:
    """Zeroes a share `rate` of the features and scales the rest by 1 / (1 - rate).

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
