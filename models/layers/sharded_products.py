"""Products, and exchanges of attention's shards, whose collectives are written down instead of left to the compiler.

Layouts of inference ask for them, and any layout may (`Layout.products`): XLA forms reduce-scatters on some backends
only, and knows no exchange of heads for batch over one of several axes that shard the heads. Collectives come before
and after products, or go around rings beside them (`collective_matmul.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from meshway.framework.axes import Names, Product, Ring, moved, of_several, product, sharded_by
from meshway.models.layers.collective_matmul import (
    Multiply,
    Operand,
    Output,
    Steps,
    ring_kernel_product,
    ring_products,
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """x [tokens ..., inputs ...], a kernel [inputs ..., outputs ...], the function that multiplies them, whole or in
    shards, and how devices do."""

    x: jax.Array
    kernel: jax.Array
    multiply_shards: Multiply
    how: Product

    @property
    def lead(self) -> int:
        """Dimensions of tokens."""
        return (self.x.ndim + len(self.how.output.spec) - self.kernel.ndim) // 2


@dataclasses.dataclass(frozen=True)
class PartialSums:
    """A sum of products before the sums over devices: what these add up is not computed yet."""

    terms: tuple[Factors, ...]

    def goes_with(self, other: "PartialSums") -> bool:
        """Returns whether the other's sums are over the same axes and go to the same places."""
        (how, *_), (others, *_) = ([each.how for each in sums.terms] for sums in (self, other))
        return (how.summed, how.output) == (others.summed, others.output)

    def total(self) -> jax.Array:
        """Returns the sums."""
        return _on_shards([self.terms])[0]


def sum_of(first: jax.Array | PartialSums, second: jax.Array | PartialSums) -> jax.Array:
    """Returns the sum of two products, whose terms are added first if their sums go the same way."""
    if isinstance(first, PartialSums) and isinstance(second, PartialSums) and first.goes_with(second):
        return PartialSums((*first.terms, *second.terms)).total()
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
    factors = _factors(x, kernel, multiply_shards, names)
    if factors is None:
        return multiply_shards(x, kernel)
    sums = PartialSums((factors,))
    return sums if sum_later and factors.how.summed else sums.total()


def multiply_all(
    x: jax.Array, kernels: Sequence[tuple[jax.Array, Multiply, tuple[Names, Names, Names]]]
) -> list[jax.Array]:
    """Returns the products of one x with several (kernel, multiply_shards, names), see `multiply`: where x is gathered
    in rings beside them, it goes around once."""
    all_factors = [_factors(x, kernel, multiply_shards, names) for kernel, multiply_shards, names in kernels]
    found: dict[int, jax.Array] = {}
    groups: dict[Any, list[int]] = {}
    for number, (factors, (kernel, multiply_shards, _)) in enumerate(zip(all_factors, kernels, strict=True)):
        if factors is None:
            found[number] = multiply_shards(x, kernel)
        else:
            groups.setdefault((factors.how.x, factors.how.operand), []).append(number)
    for numbers in groups.values():
        products = _on_shards([[factors] for number in numbers if (factors := all_factors[number])])
        found |= dict(zip(numbers, products, strict=True))
    return [found[number] for number in range(len(kernels))]


def _factors(
    x: jax.Array, kernel: jax.Array, multiply_shards: Multiply, names: tuple[Names, Names, Names]
) -> Factors | None:
    """Returns what is multiplied on shards; None where the compiler is to decide."""
    x_names, kernel_names, output_names = names
    inputs = (len(x_names) + len(kernel_names) - len(output_names)) // 2
    output_shape = (*x.shape[: len(x_names) - inputs], *kernel.shape[inputs:])
    how = product((x_names, x.shape), (kernel_names, kernel.shape), (output_names, output_shape))
    return None if how is None else Factors(x, kernel, multiply_shards, how)


@dataclasses.dataclass(frozen=True)
class _Gather:
    """How an array comes to a product: its shards before, and the steps in which devices gather it."""

    start: NamedSharding
    steps: Steps

    def whole(self, shard: jax.Array) -> jax.Array:
        """Returns what is multiplied, gathered at once."""
        dims = dict.fromkeys(dim for _, dim in self.steps)
        for dim in dims:
            axes = tuple(axis for axis, along in reversed(self.steps) if along == dim)
            shard = lax.all_gather(shard, axes, axis=dim, tiled=True)
        return shard

    def received(self, shape: tuple[int, ...]) -> int:
        """Returns the elements of an array of this shape that a device gets from others."""
        sizes = self.start.mesh.shape
        return math.prod(self.start.shard_shape(shape)) * (math.prod(sizes[axis] for axis, _ in self.steps) - 1)


def _gather(rest: NamedSharding, used: NamedSharding, rank: int, ring: Ring | None) -> _Gather:
    """Returns how an array goes from where it rests to where it is used: in steps where there is a ring and devices
    only add to what they have, along the innermost axes of its dimensions; else by the compiler."""
    before, after = sharded_by(rest.spec, rank), sharded_by(used.spec, rank)
    if ring is None or any(own[: len(axes)] != axes for own, axes in zip(before, after, strict=True)):
        return _Gather(used, ())
    steps = [
        (axis, dim)
        for dim, (own, axes) in enumerate(zip(before, after, strict=True))
        for axis in reversed(own[len(axes) :])
    ]
    return _Gather(rest, steps)


def _on_shards(outputs: Sequence[Sequence[Factors]]) -> list[jax.Array]:
    """Returns sums of products: those of an output have sums over devices in common, those of one x its gathering."""
    flat = [each for terms in outputs for each in terms]
    how, xs = flat[0].how, {id(each.x): each for each in flat}
    group = _Group(
        outputs,
        list(xs.values()),
        [_gather(each.how.x, each.how.operand, each.x.ndim, how.ring) for each in xs.values()],
        [
            [_gather(each.how.stored, each.how.kernel, each.kernel.ndim, how.ring) for each in terms]
            for terms in outputs
        ],
    )
    mapped = jax.shard_map(
        group.by_kernels if how.ring is None or group.sends_more_of_kernels else group.by_activations,
        mesh=how.output.mesh,
        in_specs=(
            [gather.start.spec for gather in group.x_gathers],
            [[gather.start.spec for gather in several] for several in group.gathers],
        ),
        out_specs=[terms[0].how.output.spec for terms in outputs],
        check_vma=False,
    )
    made: list[jax.Array] = mapped(
        [each.x for each in group.xs], [[each.kernel for each in terms] for terms in outputs]
    )
    return made


@dataclasses.dataclass(frozen=True)
class _Group:
    """Products that are computed together. In rings, either operands and sums go around beside them, or kernels do,
    whichever has more to send; the others are gathered before, or summed after, all at once.

    Attributes:
      outputs: the terms of each sum.
      xs: one with each x.
      x_gathers: how these come.
      gathers: how the kernels of `outputs` come.
    """

    outputs: Sequence[Sequence[Factors]]
    xs: Sequence[Factors]
    x_gathers: Sequence[_Gather]
    gathers: Sequence[Sequence[_Gather]]

    @property
    def sends_more_of_kernels(self) -> bool:
        """Whether devices get more elements of kernels from others than of operands and sums."""
        activations = sum(gather.received(each.x.shape) for gather, each in zip(self.x_gathers, self.xs, strict=True))
        activations += sum(_scattered(terms[0]) for terms in self.outputs)
        kernels = sum(
            gather.received(each.kernel.shape)
            for terms, several in zip(self.outputs, self.gathers, strict=True)
            for each, gather in zip(terms, several, strict=True)
        )
        return kernels > activations

    def by_kernels(self, shards: list[jax.Array], kernels: list[list[jax.Array]]) -> list[jax.Array]:
        """Multiplies shards on a device, with kernels that go around rings if they come in steps."""
        whole = [gather.whole(shard) for gather, shard in zip(self.x_gathers, shards, strict=True)]
        sums = []
        for terms, several, gathers in zip(self.outputs, kernels, self.gathers, strict=True):
            parts = [
                ring_kernel_product(
                    whole[self._number(each)], kernel, gather.steps, each.multiply_shards, each.lead, each.how.ring
                )
                for each, kernel, gather in zip(terms, several, gathers, strict=True)
            ]
            sums.append(_sum(sum(parts[1:], parts[0]), terms[0].how))
        return sums

    def by_activations(self, shards: list[jax.Array], kernels: list[list[jax.Array]]) -> list[jax.Array]:
        """Multiplies shards on a device, with operands and sums that go around rings."""
        operands = [
            Operand(shard, gather.steps, each.lead)
            for shard, gather, each in zip(shards, self.x_gathers, self.xs, strict=True)
        ]
        outputs = []
        for terms, several, gathers in zip(self.outputs, kernels, self.gathers, strict=True):
            whole = [gather.whole(kernel) for gather, kernel in zip(gathers, several, strict=True)]
            numbered = [
                (self._number(each), kernel, each.multiply_shards) for each, kernel in zip(terms, whole, strict=True)
            ]
            outputs.append(Output(numbered, terms[0].how.scattered, terms[0].how.summed))
        ring = self.xs[0].how.ring
        assert ring is not None
        products = ring_products(operands, outputs, ring)
        hows = [terms[0].how for terms in self.outputs]
        return [y if how.scattered is not None else _sum(y, how) for y, how in zip(products, hows, strict=True)]

    def _number(self, factors: Factors) -> int:
        return next(number for number, each in enumerate(self.xs) if each.x is factors.x)


def _scattered(factors: Factors) -> int:
    """Returns the elements of sums that a device gets from others."""
    how = factors.how
    if how.scattered is None:
        return 0
    shape = (*factors.x.shape[: factors.lead], *factors.kernel.shape[factors.x.ndim - factors.lead :])
    sizes = how.output.mesh.shape
    return math.prod(how.output.shard_shape(shape)) * (math.prod(sizes[axis] for axis in how.summed) - 1)


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

    def adjacent(self, num_heads: int) -> int:
        """Returns the length of runs of adjacent heads, of `num_heads`, that no device has a part of, before or
        after."""
        parts = (sharded_by(each.spec, 4)[HEADS] for each in (self.before, self.after))
        return math.gcd(*(num_heads // self._size(axes) for axes in parts))

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
