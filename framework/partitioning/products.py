"""Products of activations and weights on shards: what is gathered before, and summed after (Pope et al. 2022, section
3.2 and figure 2), from nothing but where operands and result lie."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.axes import DimAxes, Product, Ring, of_several


def product_of(mesh: Mesh, x: DimAxes, kernel: DimAxes, output: DimAxes, ring: Ring | None = None) -> Product:
    """Returns how devices multiply x [tokens ..., inputs ...] by a kernel [inputs ..., outputs ...].

    The kernel is used as it is stored, except along the axes that shard tokens: over these it is gathered (weight-
    gathered layouts). x is gathered over the axes that shard the kernel's outputs, also where they shard tokens of x
    and not of the product (Megatron's sequence parallelism). Where axes shard the kernel's
    inputs, devices hold partial sums. If the output is to be sharded by the same axes, within the shards of the
    product, the sums are scattered there; else every device gets them, and keeps what is its own.

    An example: on a mesh x, y, z, with d_model of the residual stream over x, y, z, and a kernel with d_model over x
    and d_ff over y, z, the residual stream is gathered over y, z, and sums over x are scattered to hidden units over
    y, z, x (2D weight-stationary).

    Args:
      mesh: whose axes of one device are passed over.
      x, output: the axes that shard each dimension of the activations, at rest.
      kernel: those of the stored weights.
      ring: see `Product`.
    """
    x, kernel, output = (of_several(mesh.shape, each) for each in (x, kernel, output))
    num_inputs = (len(x) + len(kernel) - len(output)) // 2
    lead = len(x) - num_inputs
    outputs = {axis for axes in kernel[num_inputs:] for axis in axes}
    rows = tuple(
        tuple(axis for axis in axes if axis in output[dim] or axis not in outputs) for dim, axes in enumerate(x[:lead])
    )
    tokens = {axis for axes in rows for axis in axes}
    used = tuple(tuple(axis for axis in axes if axis not in tokens) for axes in kernel)
    summed = tuple(axis for axes in used[:num_inputs] for axis in axes)
    partial = (*rows, *used[num_inputs:])
    scattered = None
    differ = [dim for dim, axes in enumerate(partial) if output[dim] != axes]
    if summed and len(differ) == 1:
        (dim,) = differ
        more = output[dim][len(partial[dim]) :]
        if set(more) == set(summed) and output[dim] == partial[dim] + more:
            scattered, summed = dim, more

    def sharding(axes: DimAxes) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[each or None for each in axes]))

    return Product(
        x=sharding(x),
        operand=sharding((*rows, *used[:num_inputs])),
        stored=sharding(kernel),
        kernel=sharding(used),
        output=sharding(partial if scattered is None else output),
        summed=summed,
        scattered=scattered,
        ring=ring,
    )
