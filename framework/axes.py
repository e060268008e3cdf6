"""Logical axis names, and how models use them: `constrain` shards an activation, `placement` returns its sharding,
`product` says how to multiply it by a kernel.

A model names the axes of its arrays; a layout file (`gin/layouts/`) maps names to mesh axes. This file is the
vocabulary that both sides share, so it imports only jax. The list is open: a user's model may use a new name, if the
layout maps it.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, Protocol

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Axis name -> its elements. A layout may map any of these to None although a model lacks them.
VOCABULARY = {
    "batch": "examples of a batch",
    "length": "positions of a sequence (queries, in attention)",
    "kv_length": "positions of the keys and values that attention reads",
    "embed": "the residual stream, d_model wide",
    "mlp": "hidden units of a feed-forward layer",
    "heads": "query heads of attention",
    "kv_heads": "key and value heads of attention (fewer than heads in GQA and MQA)",
    "attention_batch": "examples, where attention computes and in its cache; as `batch` without a rule of its own",
    "attention_heads": "query heads, where attention computes; as `heads` without a rule of its own",
    "attention_kv_heads": "key and value heads there and in the cache; as `kv_heads` without a rule of its own",
    "head_dim": "features of one attention head",
    "vocab": "entries of a vocabulary",
    "relpos_buckets": "buckets of T5's relative position bias",
    "positions": "positions in a segment that have a learned vector",
    "layers": "layers stacked into one array",
    "expert": "experts of a mixture",
    "stage": "stages of a pipeline",
}

# Name -> the name whose rule it follows where a layout has none of its own for it: a layout may compute attention on
# other shards than the projections around it.
FOLLOWS = {"attention_batch": "batch", "attention_heads": "heads", "attention_kv_heads": "kv_heads"}

DimAxes = tuple[tuple[str, ...], ...]  # the mesh axes that shard each dimension of an array
Names = tuple[str | None, ...]
TOKENS = ("batch", "length")  # the dimensions that activations begin with
Ring = Literal["one_way", "bidirectional"]  # chunks go to one neighbour, or to both at once
KERNEL_RING = "kernel_ring"  # in the names of operations that pass on chunks of kernels, and of their gradients


@dataclasses.dataclass(frozen=True)
class Product:
    """How devices compute x times a kernel by hand: on shards, with sums of their own.

    Attributes:
      x: of x, at rest.
      operand: of x, where it is multiplied.
      stored: of the kernel, at rest.
      kernel: of the kernel, where it is multiplied: as it is stored, gathered over the axes that shard tokens.
      output: of the product, after sums.
      summed: the axes over which devices hold partial sums.
      scattered: the dimension of the product over which the sums are scattered; None: every device gets them all.
      ring: how what is gathered and scattered goes around rings beside the product; None: before and after it.
    """

    x: NamedSharding
    operand: NamedSharding
    stored: NamedSharding
    kernel: NamedSharding
    output: NamedSharding
    summed: tuple[str, ...]
    scattered: int | None
    ring: Ring | None = None


class Ambient(Protocol):
    """The layout that a model runs under, as far as activations are concerned."""

    def sharding(self, names: Names, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an activation with these axes; raises on unknown names and indivisible sizes."""
        ...

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes, of more than one device, that shard a logical axis; LookupError on an unknown name."""
        ...

    @property
    def by_hand(self) -> bool:
        """Whether layers write down the collectives of their products, or leave them to the compiler."""
        ...

    @property
    def ring(self) -> Ring | None:
        """How products gather and scatter beside themselves; None where they do it before and after."""
        ...

    def kernel_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes that shard logical axis `name` of parameters; LookupError on an unknown name."""
        ...

    def product(
        self,
        x: tuple[Names, tuple[int, ...]],
        kernel: tuple[Names, tuple[int, ...]],
        output: tuple[Names, tuple[int, ...]],
    ) -> Product:
        """Returns how to multiply arrays of these axes and sizes, of which the kernel is a parameter."""
        ...

    def lookup(
        self, names: Names, shape: tuple[int, ...], table_names: Names, table_shape: tuple[int, ...]
    ) -> list[NamedSharding]:
        """Returns the shardings of entries looked up in a parameter: first as they are found, then step by step, one
        mesh axis at a time, towards that of `sharding`; raises as `sharding` does."""
        ...


_ambient: ContextVar[Ambient | None] = ContextVar("meshway_ambient_layout", default=None)
_prefill: ContextVar[bool] = ContextVar("meshway_prefill", default=False)


@contextlib.contextmanager
def under(layout: Ambient) -> Iterator[None]:
    """Makes `layout` the ambient layout of a model's activations inside the `with` block."""
    token = _ambient.set(layout)
    try:
        yield
    finally:
        _ambient.reset(token)


@contextlib.contextmanager
def prefill() -> Iterator[None]:
    """Says that prompts are read inside the `with` block (or the function it decorates): a layout may shard these
    activations otherwise than those of other passes."""
    token = _prefill.set(True)
    try:
        yield
    finally:
        _prefill.reset(token)


def in_prefill() -> bool:
    """Returns whether prompts are read at the moment."""
    return _prefill.get()


def constrain(x: jax.Array, names: Names, free_for: str | None = None) -> jax.Array:
    """Constrains an activation's sharding by its logical axis names.

    Args:
      x: an array of rank ``len(names)``.
      names: one logical name for each dimension; None for a dimension that is not sharded.
      free_for: an axis of the product that x is an operand of: the mesh axes that shard it do not shard x. Where they
        shard the residual stream (Megatron's sequence parallelism, 2D layouts), x is gathered once here; left to
        itself, XLA gathers weights or reshards the product's output.

    Returns:
      x, constrained under the ambient layout; x itself outside any mesh (a plain, unpartitioned call).

    Raises:
      ValueError: the rank differs from the number of names, or a mesh is set without a layout. (flax's own helper
        ignores both; a missing constraint costs memory and raises no error.)
    """
    sharding = placement(names, x.shape)
    if sharding is None or sharding.mesh.size == 1:
        return x
    if free_for is not None:
        layout = _ambient_layout(names)
        if layout is not None and layout.by_hand:
            # Kernels are gathered over the axes that shard tokens, so these stay, but for those that shard the product
            # instead of a length. Tables are not gathered: indices are small.
            lead = 0 if len(names) == len(TOKENS) else len(TOKENS)
            sharding = _without(sharding, layout.kernel_axes(free_for), range(lead, len(names)))
            sharding = _without(sharding, mesh_axes(free_for), range(lead))
        else:
            sharding = _without(sharding, mesh_axes(free_for), range(len(names)))
    return jax.lax.with_sharding_constraint(x, sharding)


def constrain_operand(x: jax.Array, names: Names, free_for: str) -> jax.Array:
    """As `constrain`, for x that goes to `sharded_products` alone: where these gather it beside the product, it stays
    as it rests."""
    return constrain(x, names, None if in_rings() else free_for)


def in_rings() -> bool:
    """Returns whether products gather their operands, and scatter their sums, in steps beside themselves."""
    layout = _ambient.get()
    return layout is not None and layout.ring is not None


def constrain_lookup(x: jax.Array, names: Names, table: jax.Array, table_names: Names) -> jax.Array:
    """Constrains the result of a look-up in a parameter: first as it is found, then in steps to the sharding of
    `names`.

    Where mesh axes shard both the batch and the entries of the table (fsdp), each device looks up its part for the
    tokens of all devices along these axes, and the results are exchanged
    (`partitioner.Activations.lookup` has a drawing). Without the steps in between, XLA gathers the
    gradient of every token on every device if several axes shard the batch.

    Args:
      x: the result of the look-up, of rank ``len(names)``.
      names: its logical axes.
      table: the parameter, with the logical axes `table_names`; axes in both are those of an entry.

    Returns:
      x, constrained; x itself outside any mesh.
    """
    layout = _ambient_layout(names)
    for sharding in layout.lookup(names, x.shape, table_names, table.shape) if layout else ():
        if sharding.mesh.size > 1:
            x = jax.lax.with_sharding_constraint(x, sharding)
    return constrain(x, names)


def placement(names: Names, shape: tuple[int, ...]) -> NamedSharding | None:
    """Returns the ambient layout's sharding of an activation: what a kernel gives `shard_map` as mesh and specs.

    Args:
      names: one logical name for each dimension, or None.
      shape: its global shape.

    Returns:
      the sharding; None outside any mesh.

    Raises:
      ValueError: the rank differs from the number of names, or a mesh is set without a layout.
    """
    if len(shape) != len(names):
        raise ValueError(f"an array of shape {shape} was given {len(names)} axis names {names}")
    layout = _ambient_layout(names)
    return None if layout is None else layout.sharding(names, shape)


def product(
    x: tuple[Names, tuple[int, ...]], kernel: tuple[Names, tuple[int, ...]], output: tuple[Names, tuple[int, ...]]
) -> Product | None:
    """Returns how devices multiply x by a kernel, (logical axes, sizes) of each: the kernel's dimensions are those of x
    that are contracted, then those of the output that are produced; None where that is left to the compiler."""
    layout = _ambient_layout(x[0])
    return layout.product(x, kernel, output) if layout is not None and layout.by_hand else None


def moved(before: Names, after: Names, shape: tuple[int, ...]) -> tuple[NamedSharding, NamedSharding] | None:
    """Returns the shardings that an activation has by two lists of names, where they differ and layers are to exchange
    its shards by hand; None elsewhere."""
    layout = _ambient_layout(before)
    if layout is None or not layout.by_hand:
        return None
    first, second = layout.sharding(before, shape), layout.sharding(after, shape)
    return None if first.spec == second.spec else (first, second)


def mesh_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes, of more than one device, that shard logical axis `name` of activations; () without a mesh.

    Raises:
      ValueError: a mesh is set without a layout.
      LookupError: the layout does not map the name.
    """
    layout = _ambient_layout((name,))
    return () if layout is None else layout.mesh_axes(name)


def _ambient_layout(names: Names) -> Ambient | None:
    layout = _ambient.get()
    if layout is None and not jax.sharding.get_abstract_mesh().empty:
        raise ValueError(f"axes {names}: a mesh is set but no layout is; run inside Partitioner.activate()")
    return layout


def sharded_by(spec: Iterable[Any], rank: int = 0) -> DimAxes:
    """Returns the mesh axes that shard each dimension, as (('x',), (), ('y', 'z')) for P('x', None, ('y', 'z')).

    A spec (or its entries) may be shorter than the array's rank: dimensions up to `rank` are sharded by nothing, and so
    are those that it leaves to the compiler (PartitionSpec.UNCONSTRAINED).
    """
    named = [(entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else () for entry in spec]
    return (*named, *[()] * (rank - len(named)))


def of_several(sizes: Mapping[str, int], dim_axes: DimAxes) -> DimAxes:
    """Returns the axes that shard each dimension without those of one device; `sizes` are those of the mesh's axes."""
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in dim_axes)


def _without(sharding: NamedSharding, axes: tuple[str, ...], dims: range) -> NamedSharding:
    """Returns a sharding in which `axes` shard none of these dimensions."""
    kept = [
        tuple(axis for axis in named if dim not in dims or axis not in axes) or None
        for dim, named in enumerate(sharded_by(sharding.spec))
    ]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
