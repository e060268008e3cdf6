"""What attention remembers of keys and values: how they are stored, where they lie, and how they are read again."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meshway.framework.axes import constrain, mesh_axes

KeysValues = tuple[jax.Array, jax.Array]  # each [batch, kv_length, kv_heads, head_dim]
DTYPES = ("float32", "bfloat16", "int8")
LARGEST = 127  # of int8, on both sides


class Quantized(NamedTuple):
    """Numbers as int8 `values` [batch, kv_length, kv_heads, head_dim] times a float32 `scale` [batch, kv_length,
    kv_heads] of each head at each place: off by half a scale at most, which is 1/254 of the head's largest entry."""

    values: jax.Array
    scale: jax.Array


Stored = jax.Array | Quantized
Cache = tuple[Stored, Stored]  # of keys, and of values


@dataclasses.dataclass(frozen=True)
class DecodingCache:
    """What decoding of a batch remembers between two tokens.

    Attributes:
      layers: the caches of a network's layers: a pytree of [layers, rows, ...].
      length: how many tokens a row has room for; static, so that `jit` compiles for each.
      encoder_segments: int32 [batch, length], of the inputs; None without an encoder.
    """

    layers: Any
    length: int
    encoder_segments: jax.Array | None = None


jax.tree_util.register_dataclass(DecodingCache, ["layers", "encoder_segments"], ["length"])


def check_cache_dtype(dtype: str | None) -> None:
    """Raises ValueError unless a cache may be of this dtype; None leaves it to what is computed in."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Attention.cache_dtype must be None or one of {', '.join(map(repr, DTYPES))}, not {dtype!r}")


def empty_cache(shape: tuple[int, ...], dtype: str | jnp.dtype) -> Cache:
    """Returns room for keys and values of `shape` [batch, kv_length, kv_heads, head_dim]."""
    x = jnp.zeros(shape, jnp.float32)
    keys, values = (_placed(store(x, dtype)) for _ in range(2))
    return keys, values


def store(x: jax.Array, dtype: str | jnp.dtype) -> Stored:
    """Returns x [batch, kv_length, kv_heads, head_dim] in the dtype of a cache."""
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / LARGEST
    # A head of zeros has no scale: it stays zeros.
    steps = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return Quantized(jnp.clip(steps, -LARGEST, LARGEST).astype(jnp.int8), scale)


def store_all(both: KeysValues, dtype: str | jnp.dtype) -> Cache:
    """Returns keys and values as a cache that holds nothing else."""
    keys, values = (_placed(store(x, dtype)) for x in both)
    return keys, values


def write(cache: Cache, new: KeysValues, index: jax.Array) -> Cache:
    """Returns the cache with new keys and values, of `length` places, in its slots `index` [batch, length]."""
    # Row by row: an index that tells the row too would have XLA gather what the batch's devices write.
    by_row = jax.vmap(lambda old, new, index: old.at[index].set(new))

    def written(old: Stored, x: jax.Array) -> Stored:
        entries = store(x, jnp.int8 if isinstance(old, Quantized) else old.dtype)
        return _placed(jax.tree.map(lambda old, new: by_row(old, new, index), old, entries))

    return written(cache[0], new[0]), written(cache[1], new[1])


def read(cache: Cache, dtype: jnp.dtype) -> KeysValues:
    """Returns what a cache holds in the dtype that attention computes in, [batch, kv_length, kv_heads, head_dim]."""

    def one(stored: Stored) -> jax.Array:
        if not isinstance(stored, Quantized):
            return stored.astype(dtype)
        return (stored.values.astype(jnp.float32) * stored.scale[..., None]).astype(dtype)

    return one(cache[0]), one(cache[1])


def take_copies(x: jax.Array, chosen: jax.Array) -> jax.Array:
    """Returns x [layers, batch * copies, ...] with copy `chosen[i, j]` of each row i in place of its copy j.

    A row's copies lie beside it, so that devices which the batch is cut over exchange nothing.
    """
    index = chosen.reshape(1, *chosen.shape, *[1] * (x.ndim - 2))
    copies = x.reshape(x.shape[0], *chosen.shape, *x.shape[2:])
    return jnp.take_along_axis(copies, index, axis=2).reshape(x.shape)


def _placed(stored: Stored) -> Stored:
    """Puts a cache where the layout has keys and values; a length that the layout would cut in unequal parts stays
    whole."""

    def one(x: jax.Array) -> jax.Array:
        sizes = jax.sharding.get_abstract_mesh().shape
        parts = math.prod(sizes[axis] for axis in mesh_axes("kv_length"))
        length = None if x.shape[1] % parts else "kv_length"
        return constrain(x, ("batch", length, "kv_heads", "head_dim")[: x.ndim])

    return jax.tree.map(one, stored)
