"""Collective matmuls: what a product needs of other devices arrives in steps beside parts of the product, and so do its
sums leave (Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models"; Pope et al. 2022, section 3.5).

An all-gather, or a reduce-scatter, of n chunks is n-1 steps in which devices pass a chunk to a neighbour
(`lax.ppermute`) while they multiply the one that they have: the same bytes, in more and smaller messages. In one
direction a ring has n-1 hops. In both, a device gets the chunks of its nearer half of the ring from either side, and a
half of the farthest one from each: n // 2 hops, with both directions of a link in use.

Over several mesh axes the rings are nested: chunks go around the innermost axis, then what was gathered there around
the next one (sums the other way, the outermost first). Every hop is then to a neighbour along one axis, as a torus has
them, and there are the sum of n-1 hops over the axes instead of their product; the bytes are the same, since chunks
grow as hops get fewer. A single ring over the product of the axes would jump back at each row's end.

Steps are unrolled: the compiler sees that a step's permute and product do not wait for each other. All functions are
called inside `shard_map`; their gradients are loops of the same kind, the other way around.
"""

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from meshway.framework.axes import KERNEL_RING, Ring

Multiply = Callable[[jax.Array, jax.Array], jax.Array]  # (x, kernel) -> their product, of arrays or of shards
Steps = Sequence[tuple[str, int]]  # (mesh axis, dimension along which devices of it hold chunks), the innermost first
Starts = Mapping[int, jax.Array]  # dimension -> where a chunk begins in the whole array
Block = tuple[jax.Array | int, int]  # where a block of a dimension begins, and its size


@dataclasses.dataclass(frozen=True)
class Operand:
    """x [tokens ..., inputs ...] of products, with `lead` dimensions of tokens, in chunks of which the others are
    gathered by `steps`."""

    x: jax.Array
    steps: Steps
    lead: int


@dataclasses.dataclass(frozen=True)
class Output:
    """A sum of products, and where it is to be.

    Attributes:
      terms: (number of an operand, kernel [inputs ..., outputs ...], how they are multiplied).
      scattered: the dimension along which sums over devices are scattered; None: there are none to scatter.
      over: the mesh axes of these devices, the outermost first.
    """

    terms: Sequence[tuple[int, jax.Array, Multiply]]
    scattered: int | None
    over: Sequence[str]


def ring_products(operands: Sequence[Operand], outputs: Sequence[Output], ring: Ring) -> list[jax.Array]:
    """Returns sums of products whose operands are gathered, and whose sums over devices are scattered, in steps.

    Each operand goes around once for all products. Where sums are scattered too, the chunks of operands are multiplied
    as they arrive for the block of the sum that leaves first; the other blocks are multiplied while sums go around.
    """
    sizes = [_scattered_size(operands, output) for output in outputs]
    flows = [_scatter(size, each, ring) for size, each in zip(sizes, outputs, strict=True)]
    blocks = [next(flow) for flow in flows]
    firsts = [_Sum() for _ in outputs]
    whole = []
    for number, operand in enumerate(operands):

        def visit(chunk: jax.Array, starts: Starts, number: int = number, operand: Operand = operand) -> None:
            lead, sizes = operand.lead, _sizes(operand)
            inputs = {dim - lead: start for dim, start in starts.items() if dim >= lead}
            tokens = {dim: start for dim, start in starts.items() if dim < lead}
            for output, block, first in zip(outputs, blocks, firsts, strict=True):
                for index, kernel, multiply in output.terms:
                    if index == number:
                        part = _inputs_of(kernel, inputs, chunk.shape[lead:])
                        first.add(multiply(*_block(chunk, part, output.scattered, block, lead)), tokens, sizes)

        whole.append(gathered(operand.x, operand.steps, ring, visit))
    return [
        _finished(flow, first.value, operands, whole, output)
        for flow, first, output in zip(flows, firsts, outputs, strict=True)
    ]


def ring_kernel_product(
    x: jax.Array, kernel: jax.Array, steps: Steps, multiply: Multiply, lead: int, ring: Ring | None
) -> jax.Array:
    """Returns the product of x [tokens ..., inputs ...], with `lead` dimensions of tokens, and a kernel [inputs ...,
    outputs ...] in chunks, of which the others are gathered by `steps`; that of the arrays as they are without any."""
    inputs, total = x.ndim - lead, _Sum()
    sizes = {lead - inputs + dim: size for dim, size in _gathered_sizes(kernel, steps).items() if dim >= inputs}

    def visit(chunk: jax.Array, starts: Starts) -> None:
        part = x
        for dim, start in starts.items():
            if dim < inputs:
                part = lax.dynamic_slice_in_dim(part, start, chunk.shape[dim], lead + dim)
        produced = {lead - inputs + dim: start for dim, start in starts.items() if dim >= inputs}
        total.add(multiply(part, chunk), produced, sizes)

    with jax.named_scope(KERNEL_RING):
        gathered(kernel, steps, ring or "one_way", visit)
    return total.value


def gathered(array: jax.Array, steps: Steps, ring: Ring, visit: Callable[[jax.Array, Starts], None]) -> jax.Array:
    """Gathers an array; calls `visit` with each chunk, this device's own first, and where it begins in the whole."""
    own, size = [], dict(enumerate(array.shape))
    for axis, dim in steps:
        own.append(lax.axis_index(axis) * size[dim])
        size[dim] *= lax.axis_size(axis)
    visit(array, _starts(steps, own))
    for number, (axis, dim) in enumerate(steps):
        chunk = array.shape[dim]
        shape = (*array.shape[:dim], chunk * lax.axis_size(axis), *array.shape[dim + 1 :])
        whole = lax.dynamic_update_slice_in_dim(jnp.zeros(shape, array.dtype), array, own[number], dim)
        for source, arrived in _arrivals(array, axis, ring):
            # What inner axes hold has been gathered: it begins at their start.
            starts = [jnp.zeros_like(source)] * number + [source * chunk] + own[number + 1 :]
            visit(arrived, _starts(steps, starts))
            whole = lax.dynamic_update_slice_in_dim(whole, arrived, source * chunk, dim)
        array = whole
    return array


def _starts(steps: Steps, each: Sequence[jax.Array]) -> Starts:
    found: dict[int, jax.Array] = {}
    for (_, dim), start in zip(steps, each, strict=True):
        found[dim] = found[dim] + start if dim in found else start
    return found


def _arrivals(chunk: jax.Array, axis: str, ring: Ring) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields (number of a device along the axis, its chunk) for all others, as they arrive."""
    size, me = lax.axis_size(axis), lax.axis_index(axis)
    if ring == "one_way":
        for hops in range(1, size):
            chunk = _passed_on(chunk, axis, 1)
            yield (me - hops) % size, chunk
        return
    upwards = downwards = chunk
    for hops in range(1, (size + 1) // 2):
        upwards, downwards = _passed_on(upwards, axis, 1), _passed_on(downwards, axis, -1)
        yield (me - hops) % size, upwards
        yield (me + hops) % size, downwards
    if size % 2 == 0:
        (first, _), (_, second) = _halves(upwards), _halves(downwards)
        yield (me + size // 2) % size, _joined(_passed_on(first, axis, 1), _passed_on(second, axis, -1), chunk.shape)


Flow = Generator[Block, jax.Array, jax.Array]


def _scatter(size: int, output: Output, ring: Ring) -> Flow:
    """Asks for blocks (start, size) of this device's terms, one at a time; returns the sum over devices of its own
    block."""
    total: jax.Array | None = None
    dim, start = output.scattered, jnp.zeros((), jnp.int32)
    if dim is None:
        return (yield start, size)
    for axis in output.over:
        size //= lax.axis_size(axis)
        stage = _collect(axis, ring)
        block = next(stage)
        while True:
            term = yield start + block * size, size
            if total is not None:
                term = term + lax.dynamic_slice_in_dim(total, block * size, size, dim)
            try:
                block = stage.send(term)
            except StopIteration as end:
                others = end.value
                break
        own = lax.axis_index(axis) * size
        total = others if total is None else others + lax.dynamic_slice_in_dim(total, own, size, dim)
        start = start + own
    last = yield start, size
    return last if total is None else total + last


def _collect(axis: str, ring: Ring) -> Generator[jax.Array, jax.Array, jax.Array]:
    """Asks for this device's terms for each other device along the axis; returns the sum of the others' terms for this
    one. What it asks for first has farthest to go."""
    size, me = lax.axis_size(axis), lax.axis_index(axis)
    if ring == "one_way":
        total = yield (me + size - 1) % size
        for hops in range(size - 2, 0, -1):
            total = _passed_on(total, axis, 1) + (yield (me + hops) % size)
        return _passed_on(total, axis, 1)
    reach = (size - 1) // 2
    first: jax.Array | None = None
    second: jax.Array | None = None
    if size % 2 == 0:
        far = yield (me + size // 2) % size
        first, second = _halves(far)
        first, second = _passed_on(first, axis, 1), _passed_on(second, axis, -1)
        if not reach:
            return _joined(first, second, far.shape)
    upwards = yield (me + reach) % size
    downwards = yield (me - reach) % size
    if first is not None and second is not None:
        (head, tail), (other_head, other_tail) = _halves(upwards), _halves(downwards)
        upwards = _joined(head + first, tail, upwards.shape)
        downwards = _joined(other_head, other_tail + second, downwards.shape)
    for hops in range(reach - 1, 0, -1):
        upwards = _passed_on(upwards, axis, 1) + (yield (me + hops) % size)
        downwards = _passed_on(downwards, axis, -1) + (yield (me - hops) % size)
    return _passed_on(upwards, axis, 1) + _passed_on(downwards, axis, -1)


def _finished(
    flow: Flow, first: jax.Array, operands: Sequence[Operand], whole: Sequence[jax.Array], output: Output
) -> jax.Array:
    """Returns a flow's result, given its first block; the others are products of whole operands."""
    part = first
    while True:
        try:
            block = flow.send(part)
        except StopIteration as end:
            result: jax.Array = end.value
            return result
        parts = [
            multiply(*_block(whole[index], kernel, output.scattered, block, operands[index].lead))
            for index, kernel, multiply in output.terms
        ]
        part = sum(parts[1:], parts[0])


class _Sum:
    """A sum of parts of a product, in float32 where its dtype is narrower."""

    def __init__(self) -> None:
        self._total: jax.Array | None = None
        self._dtype: jnp.dtype | None = None

    def add(self, part: jax.Array, starts: Starts, sizes: Mapping[int, int]) -> None:
        """Adds a part that begins at `starts` in dimensions whose whole sizes are `sizes`."""
        self._dtype, wide = part.dtype, jnp.promote_types(part.dtype, jnp.float32)
        if not starts:
            self._total = part if self._total is None else self._total.astype(wide) + part
            return
        shape = [sizes[dim] if dim in starts else size for dim, size in enumerate(part.shape)]
        total = jnp.zeros(shape, wide) if self._total is None else self._total
        at = [starts.get(dim, 0) for dim in range(part.ndim)]
        self._total = lax.dynamic_update_slice(total, part + lax.dynamic_slice(total, at, part.shape), at)

    @property
    def value(self) -> jax.Array:
        """The sum."""
        assert self._total is not None and self._dtype is not None
        return self._total.astype(self._dtype)


def _passed_on(chunk: jax.Array, axis: str, by: int) -> jax.Array:
    """Returns the chunk of the device `by` places before this one along the axis."""
    size = lax.axis_size(axis)
    return chunk if not chunk.size else lax.ppermute(chunk, axis, [(i, (i + by) % size) for i in range(size)])


def _halves(chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
    dim = _longest(chunk.shape)
    return lax.slice_in_dim(chunk, 0, chunk.shape[dim] // 2, axis=dim), lax.slice_in_dim(
        chunk, chunk.shape[dim] // 2, None, axis=dim
    )


def _joined(first: jax.Array, second: jax.Array, shape: Sequence[int]) -> jax.Array:
    return lax.concatenate([first, second], _longest(shape))


def _longest(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda dim: shape[dim])


def _inputs_of(kernel: jax.Array, starts: Starts, sizes: Sequence[int]) -> jax.Array:
    for dim, start in starts.items():
        kernel = lax.dynamic_slice_in_dim(kernel, start, sizes[dim], dim)
    return kernel


def _block(x: jax.Array, kernel: jax.Array, dim: int | None, block: Block, lead: int) -> tuple[jax.Array, jax.Array]:
    """Returns what to multiply for a block of dimension `dim` of the product: rows of x, or columns of the kernel."""
    if dim is None:
        return x, kernel
    if dim < lead:
        return lax.dynamic_slice_in_dim(x, *block, dim), kernel
    return x, lax.dynamic_slice_in_dim(kernel, *block, dim - lead + x.ndim - lead)


def _scattered_size(operands: Sequence[Operand], output: Output) -> int:
    """Returns the size of the dimension along which a sum is scattered, as this device's terms have it."""
    if output.scattered is None:
        return 0
    index, kernel, _ = output.terms[0]
    operand, dim = operands[index], output.scattered
    if dim < operand.lead:
        return _sizes(operand)[dim]
    return kernel.shape[dim - operand.lead + operand.x.ndim - operand.lead]


def _sizes(operand: Operand) -> dict[int, int]:
    return _gathered_sizes(operand.x, operand.steps)


def _gathered_sizes(array: jax.Array, steps: Steps) -> dict[int, int]:
    """Returns dimension -> its size once the array is gathered."""
    sizes = dict(enumerate(array.shape))
    for axis, dim in steps:
        sizes[dim] *= lax.axis_size(axis)
    return sizes
