"""What attention kernels that work on shards have in common: their operands, and how those are cut over the mesh."""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from meshway.framework.axes import placement
from meshway.models.layers.kernels.blockwise import Keys, Queries, Terms
from meshway.models.layers.masks import Mask
from meshway.models.layers.positions import PositionBias

QUERY = ("batch", "length", "heads", "head_dim")
# Keys follow the cut of the query heads, so that each device has the keys of its own queries.
KEY = ("batch", "kv_length", "heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class Operands:
    """What a kernel computes from: three pytrees of arrays, and how."""

    queries: Queries
    keys: Keys
    table: jax.Array | None
    terms: Terms


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the mesh cuts attention.

    Attributes:
      mesh: all of it; kernels are manual over every axis.
      sizes: of its axes.
      heads, length, kv_length: the mesh axes of those dimensions.
    """

    mesh: Mesh
    sizes: dict[str, int]
    heads: tuple[str, ...]
    length: tuple[str, ...]
    kv_length: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Returns in how many parts `axes` cut a dimension."""
        return math.prod(self.sizes[axis] for axis in axes)


def operands(
    kernel: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: PositionBias | None,
    mask: Mask | None,
    dropout_rate: float,
    rng: jax.Array | None,
    blocks: tuple[int, int],
) -> Operands:
    """Returns the arguments of a `Kernel` in the form that works in blocks: nothing of size length x kv_length.

    Args:
      kernel: its name, for messages.
      blocks: most queries and keys of one block of scores.

    Raises:
      ValueError: a bias or a mask that is known in full only.
    """
    if bias is not None and not isinstance(bias, PositionBias):
        raise ValueError(
            f"{kernel} takes a bias as positions.PositionBias (a table it can look up block by block), not an array of "
            f"shape {jnp.shape(bias)}; use attention.dot_product_attention as attention.Attention.kernel for others"
        )
    if mask is not None and (mask.queries is None or mask.keys is None):
        raise ValueError(
            f"{kernel} needs a mask made by masks.visible, which says what queries and keys know of themselves; "
            "this one is known in full only: use attention.dot_product_attention for it"
        )
    queries, keys = Queries(query), Keys(key, value)
    causal, bucket, table = False, None, None
    if mask is not None:
        queries, keys, causal = queries._replace(sight=mask.queries), keys._replace(sight=mask.keys), mask.causal
    if bias is not None:
        queries = queries._replace(positions=bias.query_positions)
        keys, bucket, table = keys._replace(positions=bias.kv_positions), bias.bucket, bias.table
    if rng is not None and dropout_rate > 0.0:
        # The same draw as the reference's: one mask for all queries of a row, so it belongs to the keys.
        kept = jax.random.bernoulli(rng, 1.0 - dropout_rate, (query.shape[0], query.shape[2], 1, key.shape[1]))
        keys = keys._replace(kept=kept[:, :, 0].swapaxes(1, 2).astype(jnp.float32) / (1.0 - dropout_rate))
    return Operands(queries, keys, table, Terms(causal, bucket, *blocks))


def cut_of(kernel: str, query: jax.Array, key: jax.Array) -> Cut | None:
    """Returns how the ambient layout cuts query and key, None outside any mesh.

    Raises:
      ValueError: it cuts head_dim, or the queries' length by other axes than the keys' (but for a length of one, which
        rules leave whole).
    """
    found = placement(QUERY, query.shape)
    if found is None:
        return None
    # The number of key heads may change yet; where its length lies does not depend on it.
    key_spec = placement(("batch", "kv_length"), key.shape[:2])
    assert key_spec is not None
    length, heads, head_dim = (_axes(found.spec, dimension) for dimension in (1, 2, 3))
    kv_length = _axes(key_spec.spec, 1)
    if head_dim:
        raise ValueError(
            f"{kernel}: the layout cuts head_dim over {head_dim}; map 'head_dim' to None in Layout.activations"
        )
    if length != kv_length and 1 not in (query.shape[1], key.shape[1]):
        raise ValueError(
            f"{kernel}: Layout.activations maps 'length' to {length} and 'kv_length' to {kv_length}; "
            "map both to the same mesh axes (keys travel between the devices that hold queries)"
        )
    mesh = found.mesh
    assert isinstance(mesh, Mesh)
    return Cut(mesh, dict(mesh.shape), heads, length, kv_length)


def repeated(keys: Keys, heads: int, parts: int) -> Keys:
    """Repeats key and value heads as little as lets them be cut in `parts`, a divisor of the query heads."""
    kv_heads = keys.key.shape[2]
    groups = heads // kv_heads
    times = next(n for n in range(1, groups + 1) if not groups % n and not kv_heads * n % parts)
    if times == 1:
        return keys
    return keys._replace(key=jnp.repeat(keys.key, times, axis=2), value=jnp.repeat(keys.value, times, axis=2))


class ShardKernel(Protocol):
    """Attention of one device's shards, forward and backward; hashable."""

    def forward(self, queries: Queries, keys: Keys, table: jax.Array | None) -> tuple[jax.Array, Any]:
        """Returns (the output of these queries, what `backward` needs)."""
        ...

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, jax.Array | None]:
        """Returns the gradients of these queries and keys, and this device's share of the table's."""
        ...


def on_shards(kernel: ShardKernel, given: Operands, cut: Cut, table_heads: tuple[str, ...]) -> jax.Array:
    """Runs a kernel on each device's shards; returns the global output, cut as the query is.

    Args:
      table_heads: the mesh axes that cut the heads of the bias table.
    """
    specs = _specs(given, table_heads)
    queries, keys, table = specs
    gradients = (queries.query, keys.key, keys.value) + (() if table is None else (table,))
    shards = _Shards(cut.mesh, tuple(jax.tree.leaves(specs)), gradients, table_heads)
    return _sharded(kernel, shards, given.queries, given.keys, given.table)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The mesh, and the specs of the arrays of (queries, keys, table), of all and of those that have gradients."""

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]
    gradients: tuple[PartitionSpec, ...]
    table_heads: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that cut anything."""
        return tuple(dict.fromkeys(axis for spec in self.specs for i in range(len(spec)) for axis in _axes(spec, i)))


# Both passes are `shard_map`s of their own, and gradients are summed by hand. Left to differentiate a `shard_map`, jax
# either tracks what varies over which mesh axes (`check_vma`), and then fails under `vmap` with `spmd_axis_name` where
# some operands have no batch (a pipeline's stages share the bias table), or sums every gradient over all mesh axes that
# its operand does not name.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(kernel: ShardKernel, shards: _Shards, queries: Queries, keys: Keys, table: jax.Array | None) -> jax.Array:
    return _sharded_forward(kernel, shards, queries, keys, table)[0]


def _sharded_forward(
    kernel: ShardKernel, shards: _Shards, queries: Queries, keys: Keys, table: jax.Array | None
) -> tuple[jax.Array, Any]:
    leaves, structure = jax.tree.flatten((queries, keys, table))

    def local(*leaves: jax.Array) -> tuple[jax.Array, Any]:
        out, saved = kernel.forward(*jax.tree.unflatten(structure, leaves))
        return out, jax.tree.map(lambda x: x[None], saved)

    out_specs = (shards.specs[0], PartitionSpec(shards.axes or None))
    return jax.shard_map(local, mesh=shards.mesh, in_specs=shards.specs, out_specs=out_specs, check_vma=False)(*leaves)


def _sharded_backward(
    kernel: ShardKernel, shards: _Shards, saved: Any, gradient: jax.Array
) -> tuple[Queries, Keys, jax.Array | None]:
    def local(saved: Any, gradient: jax.Array) -> tuple[jax.Array, ...]:
        queries, keys, table = kernel.backward(jax.tree.map(lambda x: x[0], saved), gradient)
        found = (queries.query, keys.key, keys.value)
        if table is None:
            return found
        return *found, lax.psum(table, tuple(axis for axis in shards.axes if axis not in shards.table_heads))

    gradients = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(PartitionSpec(shards.axes or None), shards.specs[0]),
        out_specs=shards.gradients,
        check_vma=False,
    )(saved, gradient)
    return Queries(gradients[0]), Keys(gradients[1], gradients[2]), gradients[3] if len(gradients) == 4 else None


_sharded.defvjp(_sharded_forward, _sharded_backward)


def _specs(given: Operands, table_heads: tuple[str, ...]) -> Any:
    """Returns the tree of (queries, keys, table) with a PartitionSpec for each array."""

    def spec(names: tuple[str, ...], x: jax.Array) -> PartitionSpec:
        found = placement(tuple(None if n == "batch" and x.shape[0] == 1 else n for n in names), x.shape)
        assert found is not None
        return found.spec

    def row_spec(length: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: spec(("batch", length), x), tree)

    queries, keys = given.queries, given.keys
    return (
        Queries(spec(QUERY, queries.query), *row_spec("length", (queries.sight, queries.positions))),
        Keys(
            spec(KEY, keys.key),
            spec(KEY, keys.value),
            row_spec("kv_length", keys.sight),
            row_spec("kv_length", keys.positions),
            row_spec("kv_length", keys.real),
            None if keys.kept is None else spec(KEY[:3], keys.kept),
        ),
        None if given.table is None else PartitionSpec(table_heads or None, None),
    )


def _axes(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    """Returns the mesh axes that cut a dimension."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
