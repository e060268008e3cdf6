"""Products of activations and weights on shards: what is gathered before, and summed after (Pope et al. 2022, section
3.2 and figure 2), from nothing but where operands and result lie."""

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.axes import DimAxes, Product, of_several


def product_of(mesh: Mesh, x: DimAxes, kernel: DimAxes, output: DimAxes) -> Product:
    """Returns how devices multiply x [tokens ..., inputs ...] by a kernel [inputs ..., outputs ...].

    The kernel is used as it is stored, except along the axes that shard tokens: over these it is gathered (weight-
    gathered layouts). x is gathered over the axes that shard the kernel's outputs. Where axes shard the kernel's
    inputs, devices hold partial sums. If the output is to be sharded by the same axes, within the shards of the
    product, the sums are scattered there; else every device gets them, and keeps what is its own.

    An example: on a mesh x, y, z, with d_model of the residual stream over x, y, z, and a kernel with d_model over x
    and d_ff over y, z, the residual stream is gathered over y, z, and sums over x are scattered to hidden units over
    y, z, x (2D weight-stationary).

    Args:
      mesh: whose axes of one device are passed over.
      x, output: the axes that shard each dimension of the activations, at rest.
      kernel: those of the stored weights.
    """
    x, kernel, output = (of_several(mesh.shape, each) for each in (x, kernel, output))
    num_inputs = (len(x) + len(kernel) - len(output)) // 2
    lead = len(x) - num_inputs
    tokens = {axis for axes in x[:lead] for axis in axes}
    used = tuple(tuple(axis for axis in axes if axis not in tokens) for axes in kernel)
    produced = used[num_inputs:]
    summed = tuple(axis for axes in used[:num_inputs] for axis in axes)
    scattered = None
    if summed and output[:lead] == x[:lead]:
        rest = [dim for dim, axes in enumerate(produced) if output[lead + dim] != axes]
        more = output[lead + rest[0]][len(produced[rest[0]]) :] if len(rest) == 1 else ()
        if set(more) == set(summed) and output[lead + rest[0]] == produced[rest[0]] + more:
            scattered, summed = lead + rest[0], more
    partial = (*x[:lead], *produced)

    def sharding(axes: DimAxes) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[each or None for each in axes]))

    return Product(
        operand=sharding((*x[:lead], *used[:num_inputs])),
        kernel=sharding(used),
        partial=sharding(partial),
        output=sharding(partial if scattered is None else output),
        summed=summed,
        scattered=scattered,
    )
