"""How attention learns where tokens stand."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshway.models.layers.masks import row_positions
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
    """A bias on attention scores: in full for kernels that hold all scores, as a table for those that work in blocks.
    What a kernel leaves unread costs nothing once compiled.

    Attributes:
      dense: float32 [rows, heads, queries, keys].
      table: float32 [heads, buckets].
      query_positions, kv_positions: int32 [rows, queries] and [rows, keys].
      bucket: maps key position - query position, int32 of any shape, to a bucket.
    """

    dense: jax.Array
    table: jax.Array
    query_positions: jax.Array
    kv_positions: jax.Array
    bucket: Callable[[jax.Array], jax.Array]


jax.tree_util.register_dataclass(PositionBias, ["dense", "table", "query_positions", "kv_positions"], ["bucket"])


class RelativePositionBias(nnx.Module):
    """T5's bias on attention scores: one learned number a head and distance bucket."""

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
        """Returns the bias among any positions [rows, queries] and [rows, keys]."""
        table = jnp.asarray(self.embedding[...])
        relative = kv_positions[:, None, :] - query_positions[:, :, None]
        dense = jnp.moveaxis(table[:, self.bucket(relative)], 0, 1)
        return PositionBias(dense, table, query_positions, kv_positions, self.bucket)

    def square(self, length: int) -> PositionBias:
        """Returns the bias among positions 0 .. length-1 of a row.

        It depends on key - query only, so 2 length - 1 values are looked up and then laid out in rows, each
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


class Rotary:
    """Rotary position embedding (Su et al. 2021, eq. 34), halves rotated as in Llama: no parameters."""

    def __init__(self, base: float = 10_000.0):
        self.base = base

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates x [batch, length, heads, head_dim] by positions [batch, length]; angles are float32.

        Raises:
          ValueError: head_dim is odd.
        """
        head_dim = x.shape[-1]
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
        frequencies = self.base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
        angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
