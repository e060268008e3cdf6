"""How the ambient layout shards a mixture of experts, for kernels inside a `shard_map`."""

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from meshway.framework.axes import placement, sharded_by

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExpertMesh:
    """The mesh axes of more than one device that shard each dimension.

    Attributes:
      mesh: the whole mesh.
      batch, length: axes of tokens while they pass through experts.
      expert, mlp: axes of the experts' weights.
      exchange: `expert` where it shards tokens too, so that tokens must be sent; else empty: each device passes all its
        tokens through its own experts.
      out: the spec of the layer's output; where possible, sums over devices are reduce-scattered to it.
    """

    mesh: Mesh
    batch: Axes
    length: Axes
    expert: Axes
    mlp: Axes
    exchange: Axes
    out: PartitionSpec

    @property
    def tokens(self) -> PartitionSpec:
        """The spec of [batch, length, ...]."""
        return PartitionSpec(self.batch or None, self.length or None)

    @property
    def summed(self) -> Axes:
        """The axes over which partial outputs are summed."""
        return (*self.mlp, *(axis for axis in self.expert if axis not in self.exchange))

    @property
    def scattered(self) -> int | None:
        """The dimension of the output that `summed` shards, or None where it shards none."""
        if self.summed:
            for dimension in (1, 2):
                if _axes(self.out, dimension, self.mesh) == self.summed:
                    return dimension
        return None

    @property
    def result(self) -> PartitionSpec:
        """The spec of what the kernel returns."""
        entries = [self.batch or None, self.length or None, None]
        if self.scattered is not None:
            entries[self.scattered] = self.summed
        return PartitionSpec(*entries)

    def size(self, axes: Axes) -> int:
        """Returns into how many shards `axes` split a dimension."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def own_experts(self, num_experts: int) -> tuple[jax.Array | int, int]:
        """Returns (first, number) of this device's experts. Inside the kernel only."""
        if not self.expert:
            return 0, num_experts
        count = num_experts // self.size(self.expert)
        return jax.lax.axis_index(self.expert) * count, count

    def reduce(self, y: jax.Array) -> jax.Array:
        """Sums partial outputs [batch, length, d_model] over devices. Inside the kernel only."""
        if not self.summed:
            return y
        if self.scattered is None:
            return _psum(y, self.summed, self.size(self.summed))
        return jax.lax.psum_scatter(y, self.summed, scatter_dimension=self.scattered, tiled=True)

    def spread(self, masks: jax.Array) -> tuple[jax.Array, PartitionSpec]:
        """Reshapes masks [a, b, mlp] of units of tokens, `a` along the batch and `b` along the length, so that each
        device gets those of the units it will work on, its own and those exchanged; returns the array and its spec."""
        a, b, width = masks.shape
        length = self.length if b > 1 else ()
        sizes = [[self.mesh.shape[axis] for axis in axes] for axes in (self.batch, length)]
        shape = (*sizes[0], a // math.prod(sizes[0]), *sizes[1], b // math.prod(sizes[1]), width)
        entries = [[None if axis in self.exchange else axis for axis in axes] for axes in (self.batch, length)]
        return masks.reshape(shape), PartitionSpec(*entries[0], None, *entries[1], None, self.mlp or None)

    def received(self, masks: jax.Array, whole_rows: bool) -> jax.Array:
        """Returns a device's masks [units, mlp] in the order in which an exchange brings the units. Inside the kernel.

        Args:
          masks: the device's shard of what `spread` returned.
          whole_rows: whether `b` was 1: the devices that shard a row share its mask.
        """
        length = () if whole_rows else self.length
        names = [*self.batch, "a", *length, "b"]
        order = [names.index(axis) for axis in self.exchange if axis in names]
        rest = [i for i, name in enumerate(names) if name not in self.exchange]
        width = masks.shape[-1]
        masks = masks.transpose(*order, *rest, len(names))
        units = math.prod(masks.shape[len(order) : -1])
        shape = [self.mesh.shape[axis] if axis in names else 1 for axis in self.exchange]
        sizes = [self.mesh.shape[axis] for axis in self.exchange]
        return jax.numpy.broadcast_to(masks.reshape(*shape, units, width), (*sizes, units, width)).reshape(-1, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _psum(y: jax.Array, axes: Axes, size: int) -> jax.Array:
    """The sum of y over devices, on each device.

    The backward pass gets 1 / `size` of the gradient on each device, as the result is replicated on that many, and
    multiplies it instead of summing over the mesh again, as jax would.
    """
    return jax.lax.psum(y, axes)


_psum.defvjp(lambda y, axes, size: (jax.lax.psum(y, axes), None), lambda axes, size, _, g: (size * g,))


def expert_mesh(x: tuple[int, ...], wi: tuple[int, ...]) -> ExpertMesh | None:
    """Returns how the ambient layout shards the layer; None outside any mesh, or on one device.

    Args:
      x: the shape of the tokens, [batch, length, d_model].
      wi: that of the experts' input weights, [experts, d_model, d_ff].

    Raises:
      ValueError: "expert" is mapped to mesh axes of which only some shard tokens; a size is not divisible.
    """
    weights = placement(("expert", None, "mlp"), wi)
    if weights is None or weights.mesh.size == 1:
        return None
    mesh = weights.mesh
    assert isinstance(mesh, Mesh)
    expert, mlp = _axes(weights.spec, 0, mesh), _axes(weights.spec, 2, mesh)
    # Where hidden units are sharded, tokens are sharded as in a dense layer's hidden activations.
    hidden = placement(("batch", "length", "mlp" if mlp else None), (x[0], x[1], wi[2]))
    out = placement(("batch", "length", "embed"), x)
    assert hidden is not None and out is not None
    batch, length = _axes(hidden.spec, 0, mesh), _axes(hidden.spec, 1, mesh)
    shared = [axis for axis in expert if axis in (*batch, *length)]
    if shared and len(shared) < len(expert):
        raise ValueError(
            f"'expert' is mapped to mesh axes {expert}, of which {shared} also shard the tokens (batch {batch}, length "
            f"{length}) and the others do not; map 'expert' to axes of which all do, or none"
        )
    return ExpertMesh(mesh, batch, length, expert, mlp, expert if shared else (), out.spec)


def _axes(spec: PartitionSpec, dimension: int, mesh: Mesh) -> Axes:
    """Returns the mesh axes, of more than one device, that shard a dimension."""
    return tuple(axis for axis in sharded_by(spec, dimension + 1)[dimension] if mesh.shape[axis] > 1)
