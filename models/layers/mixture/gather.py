"""Moving rows by index, forwards and backwards by gathers alone."""

import functools

import jax
import jax.numpy as jnp


@jax.custom_vjp
def gather_rows(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Returns y[i] = x[index[i]], zeros where `index` is past the end.

    The gradient of a gather is a scatter, which runs row after row; who knows where each row went gathers instead.

    Args:
      x: [rows, features].
      index: int32 [taken].
      inverse: int32 [rows, copies]: every i with index[i] == row, past the end for the rest.
    """
    del inverse
    return _take(x, index)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _forward(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _take(x, index), inverse


def _backward(inverse: jax.Array, g: jax.Array) -> tuple[jax.Array, None, None]:
    copies = [_take(g, inverse[:, i]) for i in range(inverse.shape[1])]
    return functools.reduce(jnp.add, copies), None, None


gather_rows.defvjp(_forward, _backward)
