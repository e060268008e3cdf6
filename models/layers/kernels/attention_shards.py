"""What attention kernels that work on shards have in common: their operands, and how those are cut over the mesh."""

import dataclasses
import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from meshway.framework.axes import placement, sharded_by
from meshway.models.layers.kernels.blockwise import Gradients
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms
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
    by_head: ByHead
    terms: Terms


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the mesh cuts attention.

    Attributes:
      mesh: all of it; kernels are manual over every axis.
      sizes: of its axes.
      heads, length, kv_length, head_dim: the mesh axes of those dimensions, without those of one device.
    """

    mesh: Mesh
    sizes: dict[str, int]
    heads: tuple[str, ...]
    length: tuple[str, ...]
    kv_length: tuple[str, ...]
    head_dim: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Returns in how many parts `axes` cut a dimension."""
        return math.prod(self.sizes[axis] for axis in axes)


def operands(
    kernel: str,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    blocks: tuple[int, int],
    bias: PositionBias | None = None,
    mask: Mask | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> Operands:
    """Returns the arguments of a `Kernel` in the form that works in blocks: nothing of size length x kv_length.

    Args:
      kernel: its name, for messages.
      blocks: most queries and keys of one block of scores.

    Raises:
      ValueError: a bias or a mask that is known in full only.
    """
    if bias is not None and not by_blocks(bias, None):
        shape = jnp.shape(bias.dense if isinstance(bias, PositionBias) else bias)
        raise ValueError(
            f"{kernel} takes a bias as positions.PositionBias (a table or slopes, known by blocks), not an array of "
            f"shape {shape}; use attention.dot_product_attention as attention.Attention.kernel for others"
        )
    if not by_blocks(None, mask):
        raise ValueError(
            f"{kernel} needs a mask made by masks.visible, which says what queries and keys know of themselves; "
            "this one is known in full only: use attention.dot_product_attention for it"
        )
    queries, keys = Queries(query), Keys(key, value)
    by_head, terms = ByHead(sinks=sinks), Terms(False, None, *blocks, soft_cap=soft_cap)
    if mask is not None:
        queries, keys = queries._replace(metadata=mask.queries), keys._replace(metadata=mask.keys)
        terms = dataclasses.replace(terms, causal=mask.causal, window=mask.window)
    if bias is not None:
        queries, keys = queries._replace(positions=bias.query_positions), keys._replace(positions=bias.kv_positions)
        by_head, terms = ByHead(bias.table, bias.slopes, sinks), dataclasses.replace(terms, bucket=bias.bucket)
    if rng is not None and dropout_rate > 0.0:
        # The same draw as the reference's: one mask for all queries of a row, so it belongs to the keys.
        kept = jax.random.bernoulli(rng, 1.0 - dropout_rate, (query.shape[0], query.shape[2], 1, key.shape[1]))
        keys = keys._replace(kept=kept[:, :, 0].swapaxes(1, 2).astype(jnp.float32) / (1.0 - dropout_rate))
    return Operands(queries, keys, by_head, terms)


def by_blocks(bias: PositionBias | None, mask: Mask | None) -> bool:
    """Returns whether bias and mask can be computed for any block of queries and keys, not only looked up in full."""
    if bias is not None and (not isinstance(bias, PositionBias) or (bias.table is None and bias.slopes is None)):
        return False
    return mask is None or (mask.queries is not None and mask.keys is not None)


def cut_of(query: jax.Array, key: jax.Array) -> Cut | None:
    """Returns how the ambient layout cuts query and key, None outside any mesh."""
    found = placement(QUERY, query.shape)
    if found is None:
        return None
    # The number of key heads may change yet; where its length lies does not depend on it.
    key_spec = placement(("batch", "kv_length"), key.shape[:2])
    assert key_spec is not None
    mesh = found.mesh
    assert isinstance(mesh, Mesh)
    sizes = dict(mesh.shape)
    _, length, heads, head_dim = sharded_by(found.spec, 4)
    _, kv_length = sharded_by(key_spec.spec, 2)
    parts = heads, length, kv_length, head_dim
    return Cut(mesh, sizes, *(tuple(axis for axis in axes if sizes[axis] > 1) for axes in parts))


def checked(kernel: str, cut: Cut | None, query: jax.Array, key: jax.Array, gathers: bool = False) -> Cut | None:
    """Returns `cut` if a kernel can work under it.

    Args:
      gathers: whether the kernel gathers keys, so that nothing need cut their length.

    Raises:
      ValueError: it cuts head_dim, or the queries' length by other axes than the keys' (but for a length of one, which
        rules leave whole).
    """
    if cut is None:
        return None
    if cut.head_dim:
        raise ValueError(
            f"{kernel}: the layout cuts head_dim over {cut.head_dim}; map 'head_dim' to None in Layout.activations"
        )
    apart = cut.length != cut.kv_length and not (gathers and not cut.kv_length)
    if apart and 1 not in (query.shape[1], key.shape[1]):
        raise ValueError(
            f"{kernel}: Layout.activations maps 'length' to {cut.length} and 'kv_length' to {cut.kv_length}; "
            f"map both to the same mesh axes{', or kv_length to None' if gathers else ''} "
            "(keys travel between the devices that hold queries)"
        )
    return cut


class ShardKernel(Protocol):
    """Attention of one device's shards, forward and backward; hashable."""

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Returns (the output of these queries, what `backward` needs)."""
        ...

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Returns the gradients of these queries and keys, and this device's share of those by head."""
        ...


def on_shards(kernel: ShardKernel, given: Operands, cut: Cut, by_head: tuple[str, ...]) -> jax.Array:
    """Runs a kernel on each device's shards; returns the global output, cut as the query is.

    Key heads too few for `by_head` to cut are repeated, as little as lets it.

    Args:
      by_head: the mesh axes that cut the heads of `given.by_head`.
    """
    keys = _repeated(given.keys, given.queries.query.shape[2], cut.parts(by_head))
    given = dataclasses.replace(given, keys=keys)
    specs = _specs(given, by_head)
    query_spec, key_spec, head_spec = specs
    gradients = Gradients(query_spec.query, key_spec.key, key_spec.value, head_spec._replace(slopes=None))
    shards = _Shards(cut.mesh, tuple(jax.tree.leaves(specs)), gradients, by_head)
    return _sharded(kernel, shards, given.queries, given.keys, given.by_head)


def _repeated(keys: Keys, heads: int, parts: int) -> Keys:
    """Repeats key and value heads as little as lets them be cut in `parts`, a divisor of the query heads."""
    kv_heads = keys.key.shape[2]
    groups = heads // kv_heads
    times = next(n for n in range(1, groups + 1) if not groups % n and not kv_heads * n % parts)
    if times == 1:
        return keys
    return keys._replace(key=jnp.repeat(keys.key, times, axis=2), value=jnp.repeat(keys.value, times, axis=2))


@dataclasses.dataclass(frozen=True)
class _Shards:
    """The mesh, the specs of the arrays of (queries, keys, by_head), and those of what has gradients."""

    mesh: Mesh
    specs: tuple[PartitionSpec, ...]
    gradients: Gradients
    by_head: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes, of more than one device, that cut anything."""
        axes = (axis for spec in self.specs for axes in sharded_by(spec) for axis in axes)
        return tuple(dict.fromkeys(axis for axis in axes if self.mesh.shape[axis] > 1))


# Both passes are `shard_map`s of their own, and gradients are summed by hand. Left to differentiate a `shard_map`, jax
# either tracks what varies over which mesh axes (`check_vma`), and then fails under `vmap` with `spmd_axis_name` where
# some operands have no batch (a pipeline's stages share the bias table), or sums every gradient over all mesh axes that
# its operand does not name.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sharded(kernel: ShardKernel, shards: _Shards, queries: Queries, keys: Keys, by_head: ByHead) -> jax.Array:
    return _sharded_forward(kernel, shards, queries, keys, by_head)[0]


def _sharded_forward(
    kernel: ShardKernel, shards: _Shards, queries: Queries, keys: Keys, by_head: ByHead
) -> tuple[jax.Array, Any]:
    leaves, structure = jax.tree.flatten((queries, keys, by_head))

    def local(*leaves: jax.Array) -> tuple[jax.Array, Any]:
        out, saved = kernel.forward(*jax.tree.unflatten(structure, leaves))
        return out, jax.tree.map(lambda x: x[None], saved)

    out_specs = (shards.specs[0], PartitionSpec(shards.axes or None))
    return jax.shard_map(local, mesh=shards.mesh, in_specs=shards.specs, out_specs=out_specs, check_vma=False)(*leaves)


def _sharded_backward(
    kernel: ShardKernel, shards: _Shards, saved: Any, gradient: jax.Array
) -> tuple[Queries, Keys, ByHead]:
    elsewhere = tuple(axis for axis in shards.axes if axis not in shards.by_head)

    def local(saved: Any, gradient: jax.Array) -> Gradients:
        queries, keys, by_head = kernel.backward(jax.tree.map(lambda x: x[0], saved), gradient)
        return Gradients(queries.query, keys.key, keys.value, jax.tree.map(lambda x: lax.psum(x, elsewhere), by_head))

    found = jax.shard_map(
        local,
        mesh=shards.mesh,
        in_specs=(PartitionSpec(shards.axes or None), shards.specs[0]),
        out_specs=shards.gradients,
        check_vma=False,
    )(saved, gradient)
    return Queries(found.query), Keys(found.key, found.value), found.by_head


_sharded.defvjp(_sharded_forward, _sharded_backward)


def _specs(given: Operands, by_head: tuple[str, ...]) -> Any:
    """Returns the tree of (queries, keys, by_head) with a PartitionSpec for each array."""

    def spec(names: tuple[str, ...], x: jax.Array) -> PartitionSpec:
        found = placement(tuple(None if n == "batch" and x.shape[0] == 1 else n for n in names), x.shape)
        assert found is not None
        return found.spec

    def row_spec(length: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: spec(("batch", length), x), tree)

    queries, keys = given.queries, given.keys
    return (
        Queries(spec(QUERY, queries.query), *row_spec("length", (queries.metadata, queries.positions))),
        Keys(
            spec(KEY, keys.key),
            spec(KEY, keys.value),
            row_spec("kv_length", keys.metadata),
            row_spec("kv_length", keys.positions),
            row_spec("kv_length", keys.real),
            None if keys.kept is None else spec(KEY[:3], keys.kept),
        ),
        jax.tree.map(lambda _: PartitionSpec(by_head or None), given.by_head),
    )
