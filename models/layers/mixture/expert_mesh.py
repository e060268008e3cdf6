"""How the ambient layout cuts a mixture of experts: what a manual kernel must know of the mesh."""

import dataclasses
import functools
import math

import jax
from jax.sharding import Mesh, PartitionSpec

from meshway.framework.axes import placement, sharded_by

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ExpertMesh:
    """The mesh axes, of more than one device, that cut each dimension.

    Attributes:
      mesh: all of it.
      batch, length: what cuts tokens, while they pass through experts.
      expert, mlp: what cuts the experts' weights.
      exchange: `expert` where it cuts tokens too, so that tokens must travel; else empty: each device has its own
        experts see all its tokens.
      out: the spec of the layer's output; where possible sums over devices leave each its part of that.
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
        """Over what devices' parts of an output are added."""
        return (*self.mlp, *(axis for axis in self.expert if axis not in self.exchange))

    @property
    def scattered(self) -> int | None:
        """The dimension of the output along which `summed` cuts it, or None where it does not."""
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
        """Returns the number of parts that `axes` cut a dimension in."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def own_experts(self, num_experts: int) -> tuple[jax.Array | int, int]:
        """Returns (first, number) of this device's experts. Inside the kernel only."""
        if not self.expert:
            return 0, num_experts
        count = num_experts // self.size(self.expert)
        return jax.lax.axis_index(self.expert) * count, count

    def reduce(self, y: jax.Array) -> jax.Array:
        """Adds up the devices' parts of an output [batch, length, d_model]. Inside the kernel only."""
        if not self.summed:
            return y
        if self.scattered is None:
            return _psum(y, self.summed, self.size(self.summed))
        return jax.lax.psum_scatter(y, self.summed, scatter_dimension=self.scattered, tiled=True)

    def spread(self, masks: jax.Array) -> tuple[jax.Array, PartitionSpec]:
        """Lays out masks [a, b, mlp] of units of tokens, `a` along the batch and `b` along the length, so that each
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
          masks: what `spread` laid out.
          whole_rows: whether `b` was 1: the devices that cut a row share its mask.
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
    """The sum over devices of y, whole on each.

    To the gradient, jax hands each device the `size`-th part, as the result lies on that many; left to itself it would
    add these up again over the mesh.
    """
    return jax.lax.psum(y, axes)


_psum.defvjp(lambda y, axes, size: (jax.lax.psum(y, axes), None), lambda axes, size, _, g: (size * g,))


def expert_mesh(x: tuple[int, ...], wi: tuple[int, ...]) -> ExpertMesh | None:
    """Reads the ambient layout.

    Args:
      x: the shape of the tokens, [batch, length, d_model].
      wi: that of the experts' input weights, [experts, d_model, d_ff].

    Returns:
      what it says; None outside any mesh, or on one device.

    Raises:
      ValueError: "expert" is cut over mesh axes of which some cut tokens and some do not; a size does not divide.
    """
    weights = placement(("expert", None, "mlp"), wi)
    if weights is None or weights.mesh.size == 1:
        return None
    mesh = weights.mesh
    assert isinstance(mesh, Mesh)
    expert, mlp = _axes(weights.spec, 0, mesh), _axes(weights.spec, 2, mesh)
    # Where hidden units are cut, tokens lie as in a dense layer's hidden activations.
    hidden = placement(("batch", "length", "mlp" if mlp else None), (x[0], x[1], wi[2]))
    out = placement(("batch", "length", "embed"), x)
    assert hidden is not None and out is not None
    batch, length = _axes(hidden.spec, 0, mesh), _axes(hidden.spec, 1, mesh)
    cutting = [axis for axis in expert if axis in (*batch, *length)]
    if cutting and len(cutting) < len(expert):
        raise ValueError(
            f"'expert' is mapped to mesh axes {expert}, of which {cutting} also cut the tokens (batch {batch}, length "
            f"{length}) and the others do not; map 'expert' to axes that all do, or that none does"
        )
    return ExpertMesh(mesh, batch, length, expert, mlp, expert if cutting else (), out.spec)


def _axes(spec: PartitionSpec, dimension: int, mesh: Mesh) -> Axes:
    """Returns the mesh axes, of more than one device, that shard a dimension."""
    return tuple(axis for axis in sharded_by(spec, dimension + 1)[dimension] if mesh.shape[axis] > 1)
