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
    """A bias on attention scores: in full for kernels that hold all scores, as a table, slopes or their sum for those
    that work in blocks. What a kernel leaves unread costs nothing once compiled.

    Attributes:
      dense: float32 [rows, heads, queries, keys].
      table: float32 [heads, buckets]; None: no table.
      query_positions, kv_positions: int32 [rows, queries] and [rows, keys].
      bucket: maps key position - query position, int32 of any shape, to a bucket of the table.
      slopes: float32 [heads], taken off a score for each place between query and key; None: nothing is.
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
    bias: PositionBias | None, num_heads: int, query_places: jax.Array | None, kv_places: jax.Array | None
) -> PositionBias:
    """Returns `bias` plus ALiBi's, -slope |key place - query place| (Press et al. 2022): nothing is learned.

    Args:
      query_places, kv_places: [rows, queries] and [rows, keys], where tokens stand in the row (slots of a cache). A
        bias that is given has its own.
    """
    if bias is not None:
        query_places, kv_places = bias.query_positions, bias.kv_positions
    assert query_places is not None and kv_places is not None
    slopes = jnp.asarray(alibi_slopes(num_heads))
    distance = jnp.abs(kv_places[:, None, :] - query_places[:, :, None]).astype(jnp.float32)
    dense = -slopes[:, None, None] * distance[:, None]
    if bias is None:
        return PositionBias(dense, None, query_places, kv_places, None, slopes)
    return dataclasses.replace(bias, dense=bias.dense + dense, slopes=slopes)


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
