"""Products, and exchanges of attention's shards, whose collectives are written down instead of left to the compiler.

Layouts of inference ask for them (`Layout.products`): XLA forms reduce-scatters on some backends only, and knows no
exchange of heads for batch over one of several axes that shard the heads.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from meshway.framework.axes import Names, Product, moved, of_several, product, sharded_by

Multiply = Callable[[jax.Array, jax.Array], jax.Array]  # (x, kernel) -> their product, of arrays or of shards


@dataclasses.dataclass(frozen=True)
class PartialSums:
    """A product before its sums over devices: `parts` [devices, ...] holds a term from each."""

    parts: jax.Array
    how: Product

    def goes_with(self, other: "PartialSums") -> bool:
        """Returns whether the other's sums are over the same axes and go to the same places."""
        return (self.how.summed, self.how.output) == (other.how.summed, other.how.output)

    def total(self) -> jax.Array:
        """Returns the sums."""
        how = self.how
        return jax.shard_map(
            lambda part: _sum(part[0], how),
            mesh=how.output.mesh,
            in_specs=_stacked(how).spec,
            out_specs=how.output.spec,
            check_vma=False,
        )(self.parts)


def sum_of(first: jax.Array | PartialSums, second: jax.Array | PartialSums) -> jax.Array:
    """Returns the sum of two products, whose terms are added first if their sums go the same way."""
    if isinstance(first, PartialSums) and isinstance(second, PartialSums) and first.goes_with(second):
        return PartialSums(first.parts + second.parts, first.how).total()
    one, other = (each.total() if isinstance(each, PartialSums) else each for each in (first, second))
    return one + other


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    multiply_shards: Multiply,
    names: tuple[Names, Names, Names],
    sum_later: bool = False,
) -> jax.Array | PartialSums:
    """Returns multiply_shards(x, kernel), computed on shards where the layout asks for it.

    Args:
      x: [tokens ..., inputs ...].
      kernel: [inputs ..., outputs ...], a parameter.
      multiply_shards: contracts the inputs, of whole arrays or of shards.
      names: the logical axes of x, of the kernel, and of the product.
      sum_later: return `PartialSums` if devices hold only terms of the product.
    """
    x_names, kernel_names, output_names = names
    output_shape = (*x.shape[: len(x_names) - _inputs(names)], *kernel.shape[_inputs(names) :])
    how = product((x_names, x.shape), (kernel_names, kernel.shape), (output_names, output_shape))
    if how is None:
        return multiply_shards(x, kernel)
    later = sum_later and bool(how.summed)

    def local(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = multiply_shards(x, kernel)
        return y[None] if later else _sum(y, how)

    y = jax.shard_map(
        local,
        mesh=how.output.mesh,
        in_specs=(how.operand.spec, how.kernel.spec),
        out_specs=_stacked(how).spec if later else how.output.spec,
        check_vma=False,
    )(x, kernel)
    return PartialSums(y, how) if later else y


def _inputs(names: tuple[Names, Names, Names]) -> int:
    x, kernel, output = map(len, names)
    return (x + kernel - output) // 2


def _stacked(how: Product) -> NamedSharding:
    return NamedSharding(how.partial.mesh, PartitionSpec(how.summed, *how.partial.spec))


def _sum(y: jax.Array, how: Product) -> jax.Array:
    if not how.summed:
        return y
    if how.scattered is None:
        return lax.psum(y, how.summed)
    return lax.psum_scatter(y, how.summed, scatter_dimension=how.scattered, tiled=True)


BATCH, HEADS = 0, 2  # dimensions of [batch, length, heads, head_dim]


@dataclasses.dataclass(frozen=True)
class HeadExchange:
    """Queries (or keys, values, outputs) [batch, length, heads, head_dim] on their way between the shards of the
    projections and those of attention: where one has a part of the heads of many examples and the other many heads of
    fewer examples, an all-to-all over the axes in question.

    Over axes that do not shard the heads innermost, a device receives heads that are not adjacent. `order` says which:
    attention then sees all heads, reordered, and keys and biases must be reordered alike.

    Devices along axes that shard neither before (where there are fewer heads than devices) hold the same: each takes
    its own part of the examples, or of the heads, and they gather what they hold on the way back. Along axes that shard
    the examples before and nothing after, it is the other way about.

    Attributes:
      before, after: where the projections have them, and attention.
      to_batch: the axes that shard heads before, and the batch after.
      to_heads: those that shard the batch before, and heads after.
      order: sizes of the blocks (kept, moved) of heads that change places, each (outer moved, kept); None: as before.
      taken: the axes that shard nothing before, and the batch after, innermost.
      halved: those that shard nothing before, and heads after, innermost.
      joined: those that shard the batch before, innermost, and nothing after.
    """

    before: NamedSharding
    after: NamedSharding
    to_batch: tuple[str, ...]
    to_heads: tuple[str, ...]
    order: tuple[int, int] | None
    taken: tuple[str, ...] = ()
    halved: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def there(self, x: jax.Array) -> jax.Array:
        """Returns x as attention has it."""

        def local(x: jax.Array) -> jax.Array:
            x = self._take(x, BATCH, self.taken, self.to_batch)
            x = _exchanged(x, self.to_batch, BATCH, HEADS)
            x = _exchanged(x, self.to_heads, HEADS, BATCH)
            x = self._join(x, BATCH, self.joined, self.to_heads)
            return self._take(x, HEADS, self.halved, ())

        return self._mapped(local, x, self.before, self.after)

    def back(self, x: jax.Array) -> jax.Array:
        """Returns x as the projections have it, heads in their own order."""

        def local(x: jax.Array) -> jax.Array:
            x = self._join(x, HEADS, self.halved, ())
            x = self._take(x, BATCH, self.joined, self.to_heads)
            x = _exchanged(x, self.to_heads, BATCH, HEADS)
            x = _exchanged(x, self.to_batch, HEADS, BATCH)
            return self._join(x, BATCH, self.taken, self.to_batch)

        return self._mapped(local, x, self.after, self.before)

    def _mapped(
        self, local: Callable[[jax.Array], jax.Array], x: jax.Array, start: NamedSharding, end: NamedSharding
    ) -> jax.Array:
        return jax.shard_map(local, mesh=start.mesh, in_specs=start.spec, out_specs=end.spec, check_vma=False)(x)

    def _take(self, x: jax.Array, dim: int, axes: tuple[str, ...], outer: tuple[str, ...]) -> jax.Array:
        """Returns a device's own part along `axes` of each of the blocks of a dimension, one for each device along
        `outer`."""
        if not axes:
            return x
        blocks = x.reshape(*x.shape[:dim], self._size(outer), self._size(axes), -1, *x.shape[dim + 1 :])
        own = lax.dynamic_index_in_dim(blocks, lax.axis_index(axes), dim + 1, keepdims=False)
        return own.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])

    def _join(self, x: jax.Array, dim: int, axes: tuple[str, ...], outer: tuple[str, ...]) -> jax.Array:
        """Returns the parts of all devices along `axes`: undoes `_take`."""
        if not axes:
            return x
        blocks = x.reshape(*x.shape[:dim], self._size(outer), -1, *x.shape[dim + 1 :])
        whole = lax.all_gather(blocks, axes, axis=dim + 1, tiled=True)
        return whole.reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.before.mesh.shape[axis] for axis in axes)

    def reordered(self, x: jax.Array, axis: int) -> jax.Array:
        """Returns x with its heads, along `axis`, in the order in which attention has them."""
        if self.order is None:
            return x
        outer, kept = self.order
        blocks = x.reshape(*x.shape[:axis], outer, kept, -1, *x.shape[axis + 1 :])
        return jnp.swapaxes(blocks, axis, axis + 1).reshape(x.shape)


def _exchanged(x: jax.Array, axes: tuple[str, ...], split: int, concat: int) -> jax.Array:
    return lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True) if axes else x


def head_exchange(before: Names, after: Names, shape: tuple[int, ...]) -> HeadExchange | None:
    """Returns how an array [batch, length, heads, head_dim] goes from shards by the names `before` to those by `after`;
    None where that is no exchange of heads for examples along whole axes, outermost or innermost of the heads': a
    constraint then says all."""
    pair = moved(before, after, shape)
    if pair is None:
        return None
    sizes = pair[0].mesh.shape
    (batch, _, heads, _), (new_batch, _, new_heads, _) = (of_several(sizes, sharded_by(each.spec, 4)) for each in pair)
    to_batch = tuple(axis for axis in heads if axis in new_batch)
    to_heads = tuple(axis for axis in batch if axis in new_heads)
    if not to_batch and not to_heads:
        return None
    kept = tuple(axis for axis in heads if axis not in to_batch)
    held = tuple(axis for axis in batch if axis in new_batch)
    joined = tuple(axis for axis in batch if axis not in (*held, *to_heads))
    taken, halved = (tuple(axis for axis in axes if axis not in (*batch, *heads)) for axes in (new_batch, new_heads))
    found = (held + to_heads + joined, held + to_batch + taken, kept + to_heads + halved)
    if found != (batch, new_batch, new_heads) or (joined and held):
        return None
    outer, inner = math.prod(sizes[axis] for axis in to_batch), math.prod(sizes[axis] for axis in kept)
    order = None if outer == 1 or inner == 1 or heads == kept + to_batch else (outer, inner)
    if order is not None and heads != to_batch + kept:
        return None
    return HeadExchange(*pair, to_batch, to_heads, order, taken, halved, joined)
