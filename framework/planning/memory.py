"""The device memory that a training step needs: estimated from its trace under the layout, without compiling it.

Arrays are allocated and freed in the order in which the step was traced, each sharded as the layout shards it. As in a
compiled program, results of elementwise operations are computed where they are read (fused), or reuse the buffer of an
operand that is not read again. Other scheduling, padding and communication buffers of a compiler are not modelled.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding

from meshway.framework.axes import DimAxes, sharded_by
from meshway.framework.planning.shard_sizes import (
    ELEMENTWISE,
    REDUCTIONS,
    Array,
    Function,
    Operation,
    Propagation,
    local_bytes,
    made_whole,
    replicated,
    scan_counts,
)
from meshway.framework.terminal import format_bytes

_ALIASES = frozenset(
    ["copy", "expand_dims", "name", "optimization_barrier", "reshape", "sharding_constraint", "squeeze"]
)
_FUSED = ELEMENTWISE | _ALIASES | {"broadcast_in_dim", "iota", "random_bits", "threefry2x32", "transpose"}
_IN_PLACE = _FUSED | {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scan", "while"}
_PINNING = (_IN_PLACE | {"transpose", "pad"}) - {"broadcast_in_dim", "iota", "while"}
_FOREVER = 2**60
TOLERANCE = 2  # XLA's buffers were observed to take between half and twice the estimate


class Program(Protocol):
    """The attributes of a `training.program.TrainProgram` that are used here."""

    @property
    def state_shapes(self) -> Any: ...

    @property
    def state_shardings(self) -> Any: ...

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]: ...

    @property
    def batch_shardings(self) -> dict[str, NamedSharding]: ...

    def trace_gradients(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step.

    Attributes:
      parameters, optimizer, batch: the arguments of a step; an average of parameters counts as the optimizer's.
      gradients: of all parameters, as the optimizer gets them.
      activations: everything else at the peak: activations saved for the backward pass, sums of microbatches, and
        temporary arrays.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))

    def fits(self, name: str, capacity: int) -> str:
        """Returns a sentence on whether it fits into a device `name` of `capacity` bytes."""
        share = f"{format_bytes(self.total)}, {100 * self.total / capacity:.0f} % of {name}'s {format_bytes(capacity)}"
        if self.total > capacity:
            return f"does not fit: {share}"
        if self.total + (TOLERANCE - 1) * self.activations > capacity:
            return f"may or may not fit: {share}, and the compiled step may need {TOLERANCE} times the activations"
        return f"fits: {share}"


def step_memory(program: Program, closed: Any = None) -> Memory:
    """Estimates the memory of a program's step, with its remat policy and microbatches.

    Args:
      closed: what `program.trace_gradients` returned; None to trace.

    Raises:
      UserError: the model does not fit the layout.
    """
    closed = program.trace_gradients() if closed is None else closed
    shapes, shardings = program.state_shapes, program.state_shardings
    params, dim_axes = jax.tree.leaves(shapes.params), _dim_axes_of(shapes.params, shardings.params)
    batch = _dim_axes_of(program.abstract_batch, program.batch_shardings)
    mesh = jax.tree.leaves(shardings.params)[0].mesh.shape
    # Results are the gradients, as many and in the order of the parameters, then metrics.
    used = [number < len(params) for number in range(len(closed.jaxpr.outvars))]
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    liveness = _Liveness(mesh)
    function = liveness.propagation.function(live)
    peak = liveness.peak(function, [*dim_axes, *batch, ()], dim_axes)
    gradients = sum(local_bytes(array, each, mesh) for array, each in zip(function.gives, dim_axes, strict=True))
    return Memory(
        device_bytes(shapes.params, shardings.params),
        device_bytes((shapes.opt_state, shapes.average), (shardings.opt_state, shardings.average)),
        gradients,
        max(0, peak - gradients),
        device_bytes(program.abstract_batch, program.batch_shardings),
    )


def _dim_axes_of(shapes: Any, shardings: Any) -> list[DimAxes]:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return [sharded_by(sharding.spec, len(leaf.shape)) for leaf, sharding in pairs]


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes on a device of a tree of arrays, given as shapes, under a tree of shardings."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


class _Liveness:
    """Computes the peak memory of functions from the lifetimes of their arrays.

    Args:
      mesh: sizes of the mesh's axes.
    """

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.propagation = Propagation(mesh)
        self._mesh = self.propagation.mesh

    def peak(
        self,
        function: Function,
        given: Sequence[DimAxes],
        wanted: Sequence[DimAxes | None],
        slices: Sequence[Array] = (),
    ) -> int:
        """Returns the most bytes allocated at a time, without arguments.

        Args:
          function: the function.
          given: the mesh axes that shard each of its arguments.
          wanted: those of its results, None for as they are computed.
          slices: arguments that are slices of arrays outside, and take memory only once they are read.
        """
        dim_axes = self.propagation.dim_axes(function, given)
        dim_axes |= {array: each for array, each in zip(function.takes, given, strict=True)}
        pins = self._pins(function, dim_axes, wanted)
        lives = _Lifetimes(function, slices, lambda array: self._bytes(array, dim_axes, pins))
        live = peak = 0
        for number, operation in enumerate(function.operations):
            made = [array for array in (*operation.makes, *lives.sliced.get(number, ())) if array in lives.held]
            if operation.name in _FUSED and not made:
                continue
            sizes = [self._bytes(array, dim_axes, pins) for array in made]
            ends = [self._bytes(array, dim_axes, pins) for array in lives.ending.get(number, ())]
            under_way = self._under_way(operation, dim_axes, pins)
            reused = _reused(sizes, ends) if operation.name in _IN_PLACE else 0
            peak = max(peak, live + sum(sizes) - reused + under_way)
            live += sum(sizes) - sum(ends)
        return peak

    def _bytes(self, array: Array, dim_axes: Mapping[Array, DimAxes], pins: Mapping[Array, DimAxes]) -> int:
        return local_bytes(array, pins.get(array, dim_axes.get(array, replicated(array))), self._mesh)

    def _under_way(self, operation: Operation, dim_axes: Mapping[Array, DimAxes], pins: Mapping[Array, DimAxes]) -> int:
        """Returns the bytes that are allocated only while an operation runs."""
        operands = [dim_axes.get(array, replicated(array)) for array in operation.reads]
        name, params = operation.name, operation.params
        if name == "dot_general":
            # A product whose result is reduce-scattered is first allocated as partial sums, sharded less.
            made = operation.makes[0]
            more = (
                local_bytes(made, dim_axes[made], self._mesh) if pins.get(made, dim_axes[made]) != dim_axes[made] else 0
            )
            for number, axes in made_whole(operation, operands, dim_axes[operation.makes[0]]):
                times = math.prod(self._mesh[axis] for axis in axes)
                more += times * local_bytes(operation.reads[number], operands[number], self._mesh)
            return more
        if name == "scan":
            body = self.propagation.function(params["jaxpr"])
            given = self.propagation.body_inputs(operation, operands)
            fixed, carried = scan_counts(params)
            outside = [pins.get(array) for array in operation.makes]
            wanted = [*outside[:carried], *[each and each[1:] for each in outside[carried:]]]
            given[fixed : fixed + carried] = [
                each or own for each, own in zip(wanted, given[fixed : fixed + carried], strict=False)
            ]
            inside = self.peak(body, given, wanted, body.takes[fixed + carried :])
            # A scan of length 1 is not a loop: its results are the body's.
            once = operation.makes[carried:] if params["length"] == 1 else ()
            return max(0, inside - sum(self._bytes(array, dim_axes, pins) for array in once))
        if name == "while":
            given = operands[params["cond_nconsts"] :]
            body = self.propagation.function(params["body_jaxpr"])
            return self.peak(
                body, self.propagation.loop(body, given, params["body_nconsts"])[0], [None] * len(body.gives)
            )
        if name == "cond":
            branches = [self.propagation.function(each) for each in params["branches"]]
            return max(self.peak(each, operands[1:], [None] * len(each.gives)) for each in branches)
        if name == "shard_map":
            body = self.propagation.function(params["jaxpr"])
            return _Liveness({}).peak(body, [replicated(array) for array in body.takes], [None] * len(body.gives))
        return 0

    def _pins(
        self, function: Function, dim_axes: Mapping[Array, DimAxes], wanted: Sequence[DimAxes | None]
    ) -> dict[Array, DimAxes]:
        """Returns the mesh axes of values that results or the state of loops require to be sharded further than they
        are computed."""
        pins: dict[Array, DimAxes] = {}

        def pin(array: Array, asked: DimAxes | None) -> None:
            own = dim_axes.get(array, replicated(array))
            if asked is not None and len(asked) == len(own) and _parts(asked, self._mesh) > _parts(own, self._mesh):
                pins[array] = asked

        for array, asked in zip(function.gives, wanted, strict=True):
            pin(array, asked)
        for operation in reversed(function.operations):
            if operation.name == "scan":
                fixed, carried = scan_counts(operation.params)
                state = zip(operation.reads[fixed : fixed + carried], operation.makes[:carried], strict=True)
                for before, after in state:
                    pin(before, pins.get(after, dim_axes[after]))
                continue
            if operation.name not in _PINNING:
                continue
            made = operation.makes[0]
            asked = pins.get(made, dim_axes[made])  # operands of one shape are sharded as the one that is sharded most
            if operation.name == "transpose":
                inverse = sorted(range(len(asked)), key=operation.params["permutation"].__getitem__)
                pin(operation.reads[0], tuple(asked[dim] for dim in inverse))
            elif operation.name in ("reshape", "squeeze", "expand_dims"):
                pin(operation.reads[0], self.propagation.reshaped(made.shape, asked, operation.reads[0].shape))
            else:
                for array in operation.reads:
                    if array.shape == made.shape:
                        pin(array, asked)
        return pins


class _Lifetimes:
    """Which of a function's values are arrays in memory, and until when.

    Attributes:
      held: values in memory; the others are computed where they are read.
      ending: number of an operation -> the arrays that no later one reads.
      sliced: number of an operation -> the slices that it is the first to read.
    """

    def __init__(self, function: Function, slices: Sequence[Array], size: Any) -> None:
        maker = {array: operation for operation in function.operations for array in operation.makes}
        readers = _readers(function)
        self.held = {array for array in [*maker, *slices] if _is_held(array, maker.get(array), readers.get(array, []))}
        behind: dict[Array, frozenset[Array]] = {}
        for operation in function.operations:
            for array in operation.makes:
                if array not in self.held:
                    roots = frozenset().union(*(self._roots(each, behind) for each in operation.reads))
                    redone = len(roots) <= 1 and sum(map(size, roots)) <= size(array)
                    if operation.name in _ALIASES or redone or len(readers.get(array, [])) <= 1:
                        behind[array] = roots
                    else:  # read several times: not recomputed each time
                        self.held.add(array)
        last: dict[Array, int] = {}
        self.sliced: dict[int, list[Array]] = {}
        new = set(slices)
        for number, operation in enumerate(function.operations):
            if operation.name in _FUSED and not any(array in self.held for array in operation.makes):
                continue
            for array in operation.reads:
                for root in self._roots(array, behind):
                    last[root] = number
                    if root in new:
                        self.sliced.setdefault(number, []).append(root)
                        new.discard(root)
            last.update({array: number for array in operation.makes if array in self.held})
        for array in function.gives:
            last.update(dict.fromkeys(self._roots(array, behind), _FOREVER))
        self.ending: dict[int, list[Array]] = {}
        for array, number in last.items():
            self.ending.setdefault(number, []).append(array)

    def _roots(self, array: Array, behind: Mapping[Array, frozenset[Array]]) -> frozenset[Array]:
        """Returns the arrays in memory that a value is computed from."""
        return frozenset([array]) if array in self.held else behind.get(array, frozenset())


def _readers(function: Function) -> dict[Array, list[Operation | None]]:
    """Returns the operations that read each value, through aliases; None stands for the function's result."""
    readers: dict[Array, list[Operation | None]] = {}
    for array in function.gives:
        readers.setdefault(array, []).append(None)
    for operation in reversed(function.operations):
        through = operation.name in _ALIASES
        found = [each for made in operation.makes for each in readers.get(made, [])] if through else [operation]
        for array in operation.reads:
            readers.setdefault(array, []).extend(found)
    return readers


def _is_held(array: Array, maker: Operation | None, readers: Iterable[Operation | None]) -> bool:
    """Whether a value must be in memory: the result or operand of an operation that cannot be fused, or a result of
    the function."""
    if maker is not None and maker.name in _ALIASES:
        return False
    if maker is not None and maker.name not in _FUSED:
        return True
    filled = maker is not None and not any(each.shape for each in maker.reads)  # with one number
    return any(not _can_fuse(each, array, filled) for each in readers)


def _can_fuse(reader: Operation | None, array: Array, filled: bool) -> bool:
    """Whether an operation that reads a value can compute it on the fly."""
    if reader is None:
        return False
    if reader.name == "scan" and filled:  # within the loop, unless it is its state
        return array not in reader.reads[scan_counts(reader.params)[0] :]
    return reader.name in _FUSED or reader.name in REDUCTIONS


def _reused(sizes: Sequence[int], ends: Sequence[int]) -> int:
    """Returns the bytes of results that reuse the buffers of operands which are not read again."""
    free, total = sorted(ends), 0
    for size in sorted(sizes, reverse=True):
        if size in free:
            free.remove(size)
            total += size
    return total


def _parts(dim_axes: DimAxes, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axes in dim_axes for axis in axes)
