"""Positions in attention scores: T5's relative bias, ALiBi, and Transformer-XL's relative scores."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.masks import row_positions
from meshway.models.layers.mlp import fan_in_init
from meshway.models.module import param


def relative_position_bucket(
    relative_position: jax.Array, bidirectional: bool, num_buckets: int, max_distance: int
) -> jax.Array:
    """Maps key position - query position to a bucket (Raffel et al. 2020, section 2.1 and its code).

    Half of the buckets hold exact distances, the other half grow logarithmically up to `max_distance`, past which
    all share the last; a bidirectional bias keeps separate halves for keys before and after the query.
    """
    distance = -relative_position
    offset = jnp.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(distance < 0, num_buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(distance, 0)
    max_exact = num_buckets // 2
    # eps keeps log(0) out of the branch that `where` throws away.
    ratio = jnp.log(distance.astype(jnp.float32) / max_exact + np.finfo(np.float32).eps)
    far = max_exact + (ratio / np.log(max_distance / max_exact) * (num_buckets - max_exact)).astype(jnp.int32)
    far = jnp.minimum(far, num_buckets - 1)
    return offset + jnp.where(distance < max_exact, distance, far)


@dataclasses.dataclass(frozen=True)
class PositionBias:
    """A bias on attention scores: a dense array for kernels that hold all scores; a table, slopes or their sum for
    blockwise kernels. What a kernel does not read is removed by the compiler.

    Attributes:
      dense: float32 [rows, heads, queries, keys].
      table: float32 [heads, buckets]; None: no table.
      query_positions, kv_positions: int32 [rows, queries] and [rows, keys], positions in the row (slots of a cache).
      bucket: maps key position - query position, int32 of any shape, to a bucket of the table.
      slopes: float32 [heads], times the distance of query and key, subtracted from scores; None: none.
    """

    dense: jax.Array
    table: jax.Array | None
    query_positions: jax.Array
    kv_positions: jax.Array
    bucket: Callable[[jax.Array], jax.Array] | None
    slopes: jax.Array | None = None


jax.tree_util.register_dataclass(
    PositionBias, ["dense", "table", "query_positions", "kv_positions", "slopes"], ["bucket"]
)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns float32 [num_heads], how fast each head's bias falls with distance (Press et al. 2022, section 3).

    For n heads, n a power of two, 2^(-8/n), 2^(-16/n) ... 2^-8; for other numbers those of the power below, then every
    second one of the power above, as the paper's code has it.
    """
    power = 2 ** (num_heads.bit_length() - 1)

    def of(number: int) -> np.ndarray:
        return 2.0 ** (-8.0 / number * np.arange(1, number + 1))

    return np.concatenate([of(power), of(2 * power)[::2][: num_heads - power]]).astype(np.float32)


def with_alibi(
    bias: PositionBias | None, num_heads: int, query_positions: jax.Array | None, kv_positions: jax.Array | None
) -> PositionBias:
    """Returns `bias` plus ALiBi's, -slope |key position - query position| (Press et al. 2022, section 3); nothing is
    learned.

    Args:
      bias: None or another bias, whose positions are then used.
      num_heads: number of query heads.
      query_positions, kv_positions: int32 [rows, queries] and [rows, keys], positions in the row (slots of a cache).
    """
    if bias is not None:
        query_positions, kv_positions = bias.query_positions, bias.kv_positions
    assert query_positions is not None and kv_positions is not None
    slopes = jnp.asarray(alibi_slopes(num_heads))
    distance = jnp.abs(kv_positions[:, None, :] - query_positions[:, :, None]).astype(jnp.float32)
    dense = -slopes[:, None, None] * distance[:, None]
    if bias is None:
        return PositionBias(dense, None, query_positions, kv_positions, None, slopes)
    return dataclasses.replace(bias, dense=bias.dense + dense, slopes=slopes)


class RelativePositionBias(nnx.Module):
    """T5's bias on attention scores: one learned number for each head and distance bucket (Raffel et al. 2020, 2.1)."""

    def __init__(
        self,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        bidirectional: bool,
        num_buckets: int = 32,
        max_distance: int = 128,
    ):
        init = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=1, out_axis=0)
        table = init(rngs.params(), (num_heads, num_buckets), jnp.float32)
        self.embedding = param(table, ("heads", "relpos_buckets"))
        self.bucket = functools.partial(
            relative_position_bucket,
            bidirectional=bidirectional,
            num_buckets=num_buckets,
            max_distance=max_distance,
        )

    def __call__(self, query_positions: jax.Array, kv_positions: jax.Array) -> PositionBias:
        """Returns the bias for any positions [rows, queries] and [rows, keys]."""
        table = jnp.asarray(self.embedding[...])
        relative = kv_positions[:, None, :] - query_positions[:, :, None]
        dense = jnp.moveaxis(table[:, self.bucket(relative)], 0, 1)
        return PositionBias(dense, table, query_positions, kv_positions, self.bucket)

    def square(self, length: int) -> PositionBias:
        """Returns the bias for queries and keys at positions 0 .. length-1 of a row.

        It depends on key - query only, so 2 length - 1 values are looked up and then arranged in rows, each
        shifted by one against the next. A look-up for every pair costs 9 % of a CPU step in its gradient.
        """
        width = 2 * length - 1
        table = jnp.asarray(self.embedding[...])
        values = table[:, self.bucket(jnp.arange(width) - (length - 1))]
        heads = values.shape[0]
        # Rows of width + 1 read back as rows of width: row q begins q values earlier than row 0.
        rows = jnp.broadcast_to(jnp.pad(values, ((0, 0), (0, 1)))[:, None], (heads, length, width + 1))
        flat = rows.reshape(heads, -1)[:, length - 1 : length - 1 + length * width]
        dense = flat.reshape(1, heads, length, width)[..., :length]
        positions = row_positions(length)
        return PositionBias(dense, table, positions, positions, self.bucket)


class BiasFactory(Protocol):
    """A gin-configured `RelativePositionBias`."""

    def __call__(self, *, bidirectional: bool, rngs: nnx.Rngs) -> RelativePositionBias: ...


SCORES = ("batch", "heads", "length", None)  # keys are not sharded: layouts may map both lengths to the same mesh axes


class RelativeScores(nnx.Module):
    """The terms that Transformer-XL adds to the scores q k (Dai et al. 2019, section 3.3), as Gopher and Chinchilla do.

    The terms (b), (c) and (d) of its equation for a key j positions before the query: q W r_j + u k + v W r_j, with r_j
    the fixed sines and cosines of j. Parameters: kernel W [embed, heads, head_dim], content_bias u and position_bias v
    [heads, head_dim], both added to queries after they are scaled.
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int, *, rngs: nnx.Rngs, base: float = 10_000.0):
        """`base` is the longest wavelength of the sines over 2 pi.

        Raises:
          ValueError: d_model is odd.
        """
        if d_model % 2:
            raise ValueError(f"RelativeScores: sines and cosines come in pairs; d_model={d_model} is odd")
        kernel = fan_in_init("normal")(1)(rngs.params(), (d_model, num_heads, head_dim), jnp.float32)
        self.kernel = param(kernel, ("embed", "heads", "head_dim"))
        self.content_bias = param(jnp.zeros((num_heads, head_dim)), ("heads", "head_dim"))
        self.position_bias = param(jnp.zeros((num_heads, head_dim)), ("heads", "head_dim"))
        self.base = base

    def scores(self, query: jax.Array, key: jax.Array, positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        """Returns what is added to attention scores, float32 [batch, heads, length, kv_length].

        Args:
          query: [batch, length, heads, head_dim], scaled.
          key: [batch, kv_length, kv_heads, head_dim].
          positions: int32 [rows, length], those of queries in the row; rows is 1 only if they are 0 .. length - 1.
          kv_positions: int32 [1, kv_length], 0 .. kv_length - 1.
        """
        length, kv_length, dtype = query.shape[1], key.shape[1], query.dtype
        query = query + self.position_bias[...].astype(dtype)
        distances = kv_length - 1 - jnp.arange(2 * kv_length - 1)  # of the latest query to the first key, and on
        sines = self._sines(distances).astype(dtype)
        # The order of the two products is left to einsum: a single query is cheaper projected to d_model features
        # first.
        by_distance = jnp.einsum(
            "blhd,ehd,re->bhlr",
            query,
            self.kernel[...].astype(dtype),
            sines,
            preferred_element_type=jnp.float32,
        )
        if positions.shape[0] == 1 and length == kv_length:
            by_position = _shifted(by_distance)
        else:
            column = kv_positions[:, None, :] - positions[:, :, None] + kv_length - 1
            by_position = jnp.take_along_axis(by_distance, column[:, None], axis=-1)
        groups = query.shape[2] // key.shape[2]
        content = self.content_bias[...].astype(dtype).reshape(key.shape[2], groups, -1)
        by_key = jnp.einsum("hgd,bkhd->bhgk", content, key, preferred_element_type=jnp.float32)
        by_key = by_key.reshape(by_key.shape[0], query.shape[2], 1, kv_length)
        return constrain(by_position + by_key, SCORES)

    def _sines(self, distances: jax.Array) -> jax.Array:
        """Returns float32 [distances, d_model]: sines, then cosines."""
        d_model = self.kernel.shape[0]
        frequencies = self.base ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
        angles = distances[:, None].astype(jnp.float32) * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _shifted(by_distance: jax.Array) -> jax.Array:
    """[..., length, 2 length - 1] -> [..., length, length], by key; column c of the former is of the key length - 1 - c
    positions before the query.

    Rows padded by one column and read back as rows of 2 length - 1 begin one column earlier each: the gradient of a
    look-up for every pair is far more expensive.
    """
    *lead, length, width = by_distance.shape
    wider = jnp.pad(by_distance, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
    flat = wider.reshape(*lead, length * (width + 1))[..., length - 1 : length - 1 + length * width]
    return flat.reshape(*lead, length, width)[..., :length]
