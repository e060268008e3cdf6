"""What attention kernels that run on shards share: their operands, and how these are sharded over the mesh."""

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

QUERY = ("attention_batch", "length", "attention_heads", "head_dim")
# Keys are sharded by the rule of the query heads, so that each device has the keys of its own queries.
KEY = ("attention_batch", "kv_length", "attention_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class Operands:
    """The operands of a kernel: three pytrees of arrays, and what is static."""

    queries: Queries
    keys: Keys
    by_head: ByHead
    terms: Terms


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """How the mesh shards attention.

    Attributes:
      mesh: the whole mesh; kernels are manual over every axis.
      sizes: devices along each mesh axis.
      heads, length, kv_length, head_dim: the mesh axes of more than one device that shard each dimension.
    """

    mesh: Mesh
    sizes: dict[str, int]
    heads: tuple[str, ...]
    length: tuple[str, ...]
    kv_length: tuple[str, ...]
    head_dim: tuple[str, ...]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Returns into how many shards `axes` split a dimension."""
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
    """Returns the arguments of an `AttentionKernel` in blockwise form: nothing of size length x kv_length.

    Args:
      kernel: its name, for messages.
      blocks: most queries and keys of one block of scores.

    Raises:
      ValueError: a bias or a mask given as a dense array only.
    """
    if bias is not None and not by_blocks(bias, None):
        shape = jnp.shape(bias.dense if isinstance(bias, PositionBias) else bias)
        raise ValueError(
            f"{kernel} takes a bias as positions.PositionBias (a table or slopes, known block by block), not a dense "
            f"array of shape {shape}; use reference.dot_product_attention as attention.Attention.kernel for others"
        )
    if not by_blocks(None, mask):
        raise ValueError(
            f"{kernel} needs a mask made by masks.make_attention_mask, which keeps the metadata of queries and keys; "
            "this one is a dense array only: use reference.dot_product_attention for it"
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
    """Returns whether bias and mask can be computed for any block of queries and keys, rather than read from a dense
    array."""
    if bias is not None and (not isinstance(bias, PositionBias) or (bias.table is None and bias.slopes is None)):
        return False
    return mask is None or (mask.queries is not None and mask.keys is not None)


def attention_sharding(query: jax.Array, key: jax.Array) -> AttentionSharding | None:
    """Returns how the ambient layout shards query and key, None outside any mesh."""
    found = placement(QUERY, query.shape)
    if found is None:
        return None
    # Key heads may still be repeated; how the length is sharded does not depend on their number.
    key_spec = placement(("attention_batch", "kv_length"), key.shape[:2])
    assert key_spec is not None
    mesh = found.mesh
    assert isinstance(mesh, Mesh)
    sizes = dict(mesh.shape)
    _, length, heads, head_dim = sharded_by(found.spec, 4)
    _, kv_length = sharded_by(key_spec.spec, 2)
    parts = heads, length, kv_length, head_dim
    return AttentionSharding(mesh, sizes, *(tuple(axis for axis in axes if sizes[axis] > 1) for axes in parts))


def check_sharding(
    kernel: str, sharding: AttentionSharding | None, query: jax.Array, key: jax.Array, gathers: bool = False
) -> AttentionSharding | None:
    """Returns `sharding` if a kernel supports it.

    Args:
      gathers: whether the kernel gathers keys, so that their length need not be sharded.

    Raises:
      ValueError: it shards head_dim, or the queries' length by other axes than the keys' (a length of one is allowed,
        since rules do not shard it).
    """
    if sharding is None:
        return None
    if sharding.head_dim:
        raise ValueError(
            f"{kernel}: the layout shards head_dim over {sharding.head_dim}; "
            "map 'head_dim' to None in Layout.activations"
        )
    apart = sharding.length != sharding.kv_length and not (gathers and not sharding.kv_length)
    if apart and 1 not in (query.shape[1], key.shape[1]):
        raise ValueError(
            f"{kernel}: Layout.activations maps 'length' to {sharding.length} and 'kv_length' to {sharding.kv_length}; "
            f"map both to the same mesh axes{', or kv_length to None' if gathers else ''} "
            "(keys are sent between the devices that hold queries)"
        )
    return sharding


class ShardKernel(Protocol):
    """Attention on one device's shards, forward and backward; hashable."""

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Returns (the output of these queries, what `backward` needs)."""
        ...

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Returns the gradients of these queries and keys, and this device's part of those of `by_head`."""
        ...


def on_shards(kernel: ShardKernel, given: Operands, sharding: AttentionSharding, by_head: tuple[str, ...]) -> jax.Array:
    """Runs a kernel on each device's shards; returns the global output, sharded as the query is.

    Key heads too few to be sharded over `by_head` are repeated the fewest times that suffice.

    Args:
      by_head: the mesh axes that shard the heads of `given.by_head`.
    """
    keys = _repeated(given.keys, given.queries.query.shape[2], sharding.parts(by_head))
    given = dataclasses.replace(given, keys=keys)
    specs = _specs(given, by_head)
    query_spec, key_spec, head_spec = specs
    gradients = Gradients(query_spec.query, key_spec.key, key_spec.value, head_spec._replace(slopes=None))
    shards = _Shards(sharding.mesh, tuple(jax.tree.leaves(specs)), gradients, by_head)
    return _sharded(kernel, shards, given.queries, given.keys, given.by_head)


def _repeated(keys: Keys, heads: int, parts: int) -> Keys:
    """Repeats key and value heads the fewest times that make `parts`, a divisor of the query heads, divide them."""
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
        """The mesh axes, of more than one device, that shard anything."""
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
        found = placement(tuple(None if n == QUERY[0] and x.shape[0] == 1 else n for n in names), x.shape)
        assert found is not None
        return found.spec

    def row_spec(length: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: spec((QUERY[0], length), x), tree)

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
