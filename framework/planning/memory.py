"""The device memory that a training step needs: estimated from its trace under the layout, without compiling it.

Arrays are allocated and freed in the order in which the step was traced, each sharded as the layout shards it. As in a
compiled program, results of elementwise operations are computed where they are read (`lifetimes.py`), or reuse the
buffer of an operand that is not read again; what a loop collects twice is held once; a weight that products gather is
gathered once, and a result that is scattered is computed in windows; what is computed on shards is planned among the
rest; what kernels write is padded to the lanes of a register. Holes between arrays, other scheduling and communication
buffers of a compiler are not modelled.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding

from meshway.framework.axes import DimAxes, sharded_by
from meshway.framework.planning.lifetimes import (
    FUSED,
    IN_PLACE,
    SAME_VALUE,
    Lifetimes,
    in_place,
    is_one_hot,
    reused_bytes,
    written_by_kernels,
)
from meshway.framework.planning.shard_sizes import (
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

_PINNING = (IN_PLACE | {"transpose", "pad"}) - {"broadcast_in_dim", "iota", "while"}
_LANES, _SUBLANES = 128, 8  # of a TPU's registers, in which arrays lie
_WINDOWS = 4
# By `jax.Device.device_kind`: chips whose SparseCores gather the chosen logits, from an array; a v5e has none.
_SPARSE_CORES = frozenset(["TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x"])
TOLERANCE = (
    2  # XLA's buffers were observed to take between half and twice the estimate; of TPUs docs/planning.md has more
)


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
      parameters, optimizer, batch: the arguments of a step; what else the state has, an average of parameters and what
        is counted, is the optimizer's.
      gradients: of all parameters, as the optimizer gets them.
      activations: everything else at the peak: activations saved for the backward pass, sums of microbatches, and
        temporary arrays.
      padding: of the arguments, as TPUs lay them out; 0 elsewhere.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    batch: int
    padding: int = 0

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
    mesh = jax.tree.leaves(shardings.params)[0].mesh
    # Results are the gradients, as many and in the order of the parameters, then metrics.
    used = [True] * len(closed.jaxpr.outvars)
    _, read = partial_eval.dce_jaxpr(closed.jaxpr, used)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, used, instantiate=True)
    # Compiled programs take only what they read: positions that are merely counted, say, are not.
    pairs = zip(jax.tree.leaves(program.abstract_batch), jax.tree.leaves(program.batch_shardings), strict=True)
    kept = [pair for pair, is_read in zip(pairs, read[len(params) :]) if is_read]
    features, placed = [feature for feature, _ in kept], [sharding for _, sharding in kept]
    liveness = _Liveness(mesh.shape, sparse_cores=mesh.devices.flat[0].device_kind in _SPARSE_CORES)
    function = liveness.propagation.function(live)
    wanted = [*dim_axes, *[None] * (len(function.gives) - len(dim_axes))]
    peak = liveness.peak(function, [*dim_axes, *batch, ()], wanted)
    gradients = sum(local_bytes(array, each, mesh.shape) for array, each in zip(function.gives, dim_axes, strict=False))
    return Memory(
        device_bytes(shapes.params, shardings.params),
        device_bytes(shapes, shardings) - device_bytes(shapes.params, shardings.params),
        gradients,
        max(0, peak - gradients),
        device_bytes(features, placed),
        _padding((shapes, features), (shardings, placed)),
    )


def _dim_axes_of(shapes: Any, shardings: Any) -> list[DimAxes]:
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return [sharded_by(sharding.spec, len(leaf.shape)) for leaf, sharding in pairs]


def device_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes on a device of a tree of arrays, given as shapes, under a tree of shardings."""
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, sharding in pairs)


def _padding(shapes: Any, shardings: Any) -> int:
    """Returns the bytes that TPUs pad arrays with: two dimensions lie along the lanes and sublanes of registers, those
    two of each array that take least. 0 on other platforms."""
    placed = jax.tree.leaves(shardings)
    if placed[0].mesh.devices.flat[0].platform != "tpu":
        return 0
    pairs = zip(jax.tree.leaves(shapes), placed, strict=True)
    shards = [(sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf, sharding in pairs]
    return sum((_tiled(shape) - math.prod(shape)) * itemsize for shape, itemsize in shards)


def _tiled(shape: Sequence[int]) -> int:
    """Returns the elements of an array with its padding."""
    if len(shape) < 2:
        size = math.prod(shape)
        whole = next((lanes for lanes in (128, 256, 512) if lanes >= size), _LANES * _SUBLANES)
        return -(-size // whole) * whole
    best = 0
    for lane, sub in itertools.permutations(range(len(shape)), 2):
        rows = next((rows for rows in (1, 2, 4) if rows >= shape[sub]), _SUBLANES)
        rest = math.prod(size for dim, size in enumerate(shape) if dim not in (lane, sub))
        size = rest * -(-shape[lane] // _LANES) * _LANES * -(-shape[sub] // rows) * rows
        best = min(best, size) if best else size
    return best


class _Liveness:
    """Computes the peak memory of functions from the lifetimes of their arrays.

    Args:
      mesh: sizes of the mesh's axes.
      sizes: bytes of arrays that are sharded otherwise than their operations say.
      sparse_cores: whether these take one element of each row, from an array that is made for them; else that is fused
        with what else reads the row.
    """

    def __init__(
        self, mesh: Mapping[str, int], sizes: Mapping[Array, int] | None = None, sparse_cores: bool = False
    ) -> None:
        self._sizes, self._sparse_cores = sizes or {}, sparse_cores
        self.propagation = Propagation(mesh)
        self._mesh = self.propagation.mesh
        self._twins: set[Array] = set()  # results of loops, and slices of them, that equal another one: held once
        self._remade: set[Array] = set()  # results of elementwise operations
        self._rows: set[Array] = set()  # what kernels read and write row by row: rows are padded to all lanes

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
        self._find_twins(function, dim_axes)
        self._rows |= written_by_kernels(function)
        self._remade |= {array for each in function.operations if each.name in FUSED for array in each.makes}
        pins = self._pins(function, dim_axes, wanted)
        lives = Lifetimes(function, slices, lambda array: self._bytes(array, dim_axes, pins))
        gathered, released = self._gathered(function, dim_axes)
        live = peak = 0
        for number, operation in enumerate(function.operations):
            made = [array for array in (*operation.makes, *lives.sliced.get(number, ())) if array in lives.held]
            if not made and (operation.name in FUSED or is_one_hot(operation)):
                if self._sparse_cores and operation.name == "gather" and operation.reads[0] not in lives.held:
                    peak = max(peak, live + self._bytes(operation.reads[0], dim_axes, pins))
                continue
            ending = lives.ending.get(number, ())
            sizes, ends = ([self._bytes(each, dim_axes, pins) for each in arrays] for arrays in (made, ending))
            passing = [array for array in lives.sliced.get(number, ()) if array in ending]
            under_way = self._under_way(operation, dim_axes, pins, passing)
            live += gathered.get(number, 0)
            shared = in_place(operation, made, ending)
            reused = reused_bytes(*([self._bytes(each, dim_axes, pins) for each in arrays] for arrays in shared))
            peak = max(peak, live + sum(sizes) - reused + under_way)
            live += sum(sizes) - sum(ends) - released.get(number, 0)
        return peak

    def _gathered(self, function: Function, dim_axes: Mapping[Array, DimAxes]) -> tuple[dict[int, int], dict[int, int]]:
        """Returns the bytes of operands that products gather, by the numbers of the first and of the last product that
        reads each: it is gathered once."""
        first: dict[Array, tuple[int, int]] = {}
        last: dict[Array, int] = {}
        for number, operation in enumerate(function.operations):
            if operation.name != "dot_general":
                continue
            operands = [dim_axes.get(array, replicated(array)) for array in operation.reads]
            for which, axes in made_whole(operation, operands, dim_axes[operation.makes[0]]):
                array, parts = operation.reads[which], math.prod(self._mesh[axis] for axis in axes)
                first.setdefault(array, (number, parts * local_bytes(array, operands[which], self._mesh)))
            last |= {array: number for array in operation.reads if array in first}
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for array, (number, size) in first.items():
            begins[number] = begins.get(number, 0) + size
            ends[last[array]] = ends.get(last[array], 0) + size
        return begins, ends

    def _find_twins(self, function: Function, dim_axes: Mapping[Array, DimAxes]) -> None:
        """Finds the arrays that a loop collects twice: once by one name, once by another that means the same."""
        for operation in function.operations:
            if operation.name != "scan":
                continue
            body, (fixed, carried) = self.propagation.function(operation.params["jaxpr"]), scan_counts(operation.params)
            same = {each.makes[0]: each.reads[0] for each in body.operations if each.name in SAME_VALUE}
            seen, written = set(), written_by_kernels(body)
            for made, array in zip(operation.makes[carried:], body.gives[carried:], strict=True):
                while array in same:
                    array = same[array]
                if array in written:
                    self._rows.add(made)
                if (array, dim_axes.get(made)) in seen:
                    self._twins.add(made)
                seen.add((array, dim_axes.get(made)))
            taken = zip(operation.reads[fixed + carried :], body.takes[fixed + carried :], strict=True)
            self._twins |= {inside for outside, inside in taken if outside in self._twins}

    def _bytes(self, array: Array, dim_axes: Mapping[Array, DimAxes], pins: Mapping[Array, DimAxes]) -> int:
        if array in self._twins:
            return 0
        if array in self._sizes:
            return self._sizes[array]
        size = local_bytes(array, pins.get(array, dim_axes.get(array, replicated(array))), self._mesh)
        if array in self._rows and array.shape[-1] % _LANES:
            return size // array.shape[-1] * (-(-array.shape[-1] // _LANES) * _LANES)
        return size

    def _under_way(
        self,
        operation: Operation,
        dim_axes: Mapping[Array, DimAxes],
        pins: Mapping[Array, DimAxes],
        passing: Sequence[Array],
    ) -> int:
        """Returns the bytes that are allocated only while an operation runs, less those of its operands and results
        that are not there all the time; `passing`: slices of arrays outside that it alone reads."""
        operands = [dim_axes.get(array, replicated(array)) for array in operation.reads]
        name, params = operation.name, operation.params
        if name == "dot_general":
            made = operation.makes[0]
            if pins.get(made, dim_axes[made]) == dim_axes[made]:
                return 0
            # A product whose result is reduce-scattered is computed in windows, of which two travel each way, from an
            # operand that is laid out anew for them. If that was made element by element it is made again, so that
            # what it was made of is still there.
            sizes = [
                local_bytes(array, each, self._mesh) for array, each in zip(operation.reads, operands, strict=True)
            ]
            operand = max(range(len(sizes)), key=sizes.__getitem__)
            times = 2 if operation.reads[operand] in self._remade else 1
            return times * sizes[operand] + _WINDOWS * local_bytes(made, pins[made], self._mesh)
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
            held = {array: self._bytes(array, dim_axes, pins) for array in (*operation.reads, *operation.makes)}
            return self._under_way_on_shards(operation, held, passing)
        return 0

    def _under_way_on_shards(self, operation: Operation, outside: Mapping[Array, int], passing: Sequence[Array]) -> int:
        """As `_under_way`, of a `shard_map`, whose operands and results take so many bytes outside.

        Compiled programs have its operations among their others: a slice is made where it is first read inside, an
        operand that is sharded further outside is gathered there, and results are sharded as they are outside.
        """
        body = self.propagation.function(operation.params["jaxpr"])
        given = [replicated(array) for array in body.takes]
        takes = list(zip(operation.reads, body.takes, strict=True))
        gathered = {inner for array, inner in takes if local_bytes(inner, replicated(inner), {}) > outside[array]}
        late = [inner for array, inner in takes if inner in gathered or array in passing]
        results = {inner: array for array, inner in zip(operation.makes, body.gives, strict=True)}
        made = {inner: outside[array] for inner, array in results.items() if inner not in body.takes}
        inside = _Liveness({}, made).peak(body, given, [None] * len(body.gives), late)
        again = {array for array, inner in takes if array in passing and inner not in gathered}
        return inside - sum(outside[array] for array in again) - sum(made.values())

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


def _parts(dim_axes: DimAxes, mesh: Mapping[str, int]) -> int:
    return math.prod(mesh[axis] for axes in dim_axes for axis in axes)
