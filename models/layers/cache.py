"""The key-value cache of attention: how it is stored, sharded, written and read.

Positions of a head lie beside each other, [batch, kv_heads, kv_length, head_dim]: attention multiplies them as they
lie. In the order of activations, [batch, kv_length, kv_heads, head_dim], they were copied first, and the attention of a
step took ten times as long on XLA:CPU.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import qwix

from meshway.framework.axes import constrain, mesh_axes
from meshway.models.layers.integer_products import rounded

KeysValues = tuple[jax.Array, jax.Array]  # each [batch, kv_length, kv_heads, head_dim]
DTYPES = ("float32", "bfloat16", "int8")


# [batch, kv_heads, kv_length, head_dim]. Of int8 with a float32 scale of each position and head, [batch, kv_heads,
# kv_length, 1]; the error is half a scale at most, 1/254 of the head's largest entry.
Stored: TypeAlias = jax.Array | qwix.QArray
Cache = tuple[Stored, Stored]  # of keys, and of values


@dataclasses.dataclass(frozen=True)
class DecodingCache:
    """What decoding of a batch remembers between two tokens.

    Attributes:
      layers: the caches of a network's layers, as `Stack.empty_cache` has them: a list of pytrees of [layers, rows,
        ...], or a tuple of each layer's own, of [rows, ...].
      length: how many tokens a row has room for; static, so that `jit` compiles for each.
      encoder_segments: int32 [batch, length], of the inputs; None without an encoder.
    """

    layers: Any
    length: int
    encoder_segments: jax.Array | None = None

    @property
    def row_axis(self) -> int:
        """Which axis of the leaves of `layers` is that of rows."""
        return 0 if isinstance(self.layers, tuple) else 1


jax.tree_util.register_dataclass(DecodingCache, ["layers", "encoder_segments"], ["length"])


def check_cache_dtype(dtype: str | None) -> None:
    """Raises ValueError unless a cache may have this dtype; None is the dtype of activations."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"Attention.cache_dtype must be None or one of {', '.join(map(repr, DTYPES))}, not {dtype!r}")


def empty_cache(shape: tuple[int, ...], dtype: str | jnp.dtype) -> Cache:
    """Returns an empty cache for keys and values of `shape` [batch, kv_length, kv_heads, head_dim]."""
    x = jnp.zeros(shape, jnp.float32)
    keys, values = (_constrained(store(x, dtype)) for _ in range(2))
    return keys, values


def store(x: jax.Array, dtype: str | jnp.dtype) -> Stored:
    """Returns x [batch, kv_length, kv_heads, head_dim] as a cache of this dtype stores it."""
    x = jnp.swapaxes(x, 1, 2)
    if jnp.dtype(dtype) != jnp.int8:
        return x.astype(dtype)
    return rounded(x, (3,), "int8")


def store_all(both: KeysValues, dtype: str | jnp.dtype) -> Cache:
    """Returns a cache filled with keys and values.

    It lies in memory as attention reads it: without the barrier XLA moves the swap of axes into a loop that only reads
    the cache, and copies all of it in each step.
    """
    keys, values = (_constrained(jax.lax.optimization_barrier(store(x, dtype))) for x in both)
    return keys, values


def write(cache: Cache, new: KeysValues, index: jax.Array) -> Cache:
    """Returns the cache with new keys and values, of `length` positions, in its slots `index` [batch, length]."""
    # Row by row: with an index that includes the row, XLA would gather the new entries of all of the batch's devices.
    by_row = jax.vmap(lambda old, new, index: old.at[:, index].set(new))

    def written(old: Stored, x: jax.Array) -> Stored:
        entries = store(x, jnp.int8 if isinstance(old, qwix.QArray) else old.dtype)
        return _constrained(jax.tree.map(lambda old, new: by_row(old, new, index), old, entries))

    return written(cache[0], new[0]), written(cache[1], new[1])


def read(cache: Cache, dtype: jnp.dtype) -> KeysValues:
    """Returns the keys and values of a cache in `dtype`, [batch, kv_length, kv_heads, head_dim] each."""

    def one(stored: Stored) -> jax.Array:
        values = qwix.dequantize(stored) if isinstance(stored, qwix.QArray) else stored
        return jnp.swapaxes(values.astype(dtype), 1, 2)

    return one(cache[0]), one(cache[1])


def take_copies(x: jax.Array, chosen: jax.Array, axis: int) -> jax.Array:
    """Returns x with copy `chosen[i, j]` of each row i in place of its copy j, where `axis` is that of rows, of size
    batch * copies.

    The copies of a row are adjacent, so that the devices that shard the batch exchange nothing.
    """
    index = chosen.reshape(*[1] * axis, *chosen.shape, *[1] * (x.ndim - axis - 1))
    copies = x.reshape(*x.shape[:axis], *chosen.shape, *x.shape[axis + 1 :])
    return jnp.take_along_axis(copies, index, axis=axis + 1).reshape(x.shape)


def _constrained(stored: Stored) -> Stored:
    """Shards a cache as the layout shards keys and values; a length that its mesh axes do not divide is replicated."""

    def one(x: jax.Array) -> jax.Array:
        sizes = jax.sharding.get_abstract_mesh().shape
        parts = math.prod(sizes[axis] for axis in mesh_axes("kv_length"))
        length = None if x.shape[2] % parts else "kv_length"
        head_dim = "head_dim" if x.shape[3] > 1 else None  # a scale has none
        return constrain(x, ("attention_batch", "attention_kv_heads", length, head_dim))

    return jax.tree.map(one, stored)
