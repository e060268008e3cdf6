"""The size of each device's shard of a program's values, propagated operation by operation through its jaxpr."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from meshway.framework.axes import DimAxes, sharded_by

_SUMS = frozenset(["psum", "psum_invariant", "reduce_scatter"])
_NOT_CALLS = frozenset(["scan", "while", "cond", "shard_map", "pallas_call"])


@dataclasses.dataclass(frozen=True, eq=False)
class Array:
    """A value of the function; compared by identity. `on_host` is one that waits in the host's memory."""

    shape: tuple[int, ...]
    dtype: Any
    on_host: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element on its device."""
        if self.on_host:
            return 0
        return int(getattr(self.dtype, "itemsize", 8))  # keys of random numbers are two words


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One primitive.

    Attributes:
      name: the primitive's.
      params: the primitive's.
      reads: its operands, constants too.
      makes: its results.
    """

    name: str
    params: dict[str, Any]
    reads: tuple[Array, ...]
    makes: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """Operations in the order in which they were traced.

    Attributes:
      takes, gives: its arguments and results.
    """

    takes: tuple[Array, ...]
    operations: tuple[Operation, ...]
    gives: tuple[Array, ...]


def read_function(jaxpr: Any) -> Function:
    """Returns a jaxpr, closed or not, as a list of operations."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known: dict[Any, Array] = {}
    takes = tuple(_of(var, known) for var in jaxpr.invars)
    for var in jaxpr.constvars:
        _of(var, known)
    operations = tuple(_with_early_sums(list(_read(jaxpr, known, {}))))
    return Function(takes, operations, tuple(_of(atom, known) for atom in jaxpr.outvars))


def _with_early_sums(operations: Sequence[Operation]) -> Iterator[Operation]:
    """Yields operations, sums over devices as soon as there is what they add: compilers then scatter them, and need
    whole terms of one sum at a time."""
    makers = {array: number for number, operation in enumerate(operations) for array in operation.makes}
    early: dict[int, list[Operation]] = {}
    for number, operation in enumerate(operations):
        if operation.name in _SUMS:
            place = max((makers[array] for array in operation.reads if array in makers), default=number)
            early.setdefault(place, []).append(operation)
    for number, operation in enumerate(operations):
        if operation.name not in _SUMS:
            yield operation
        yield from early.get(number, ())


def _read(jaxpr: Any, known: dict[Any, Array], made: dict[Any, Array]) -> Iterator[Operation]:
    """Yields operations; `made` has what was computed before: as in compiled programs, nothing is computed twice."""
    for equation in jaxpr.eqns:
        reads = tuple(_of(atom, known) for atom in equation.invars)
        inner = None if equation.primitive.name in _NOT_CALLS else _called(equation)
        if inner is None:
            if (key := _expression(equation, known)) in made:
                known[equation.outvars[0]] = made[key]
                continue
            makes = tuple(_of(var, known) for var in equation.outvars)
            if key is not None:
                made[key] = makes[0]
            yield Operation(equation.primitive.name, equation.params, reads, makes)
            continue
        own: dict[Any, Array] = dict(zip(inner.invars, reads, strict=True))
        for var in inner.constvars:
            _of(var, own)
        yield from _read(inner, own, made)
        known.update((var, _of(atom, own)) for var, atom in zip(equation.outvars, inner.outvars, strict=True))


def _expression(equation: Any, known: Mapping[Any, Array]) -> Any:
    """Returns what tells the result of an elementwise operation or a move from others; None of other operations."""
    name = equation.primitive.name
    if name not in ELEMENTWISE and name not in _MOVES:
        return None
    operands = [(str(each.val), each.aval.dtype) if hasattr(each, "val") else known[each] for each in equation.invars]
    params = tuple((each, str(value)) for each, value in equation.params.items() if each != "name")
    return name, tuple(operands), params


def _called(equation: Any) -> Any:
    """Returns the jaxpr of the function that an equation calls with its own operands; None for any other equation."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(equation.invars):
            return inner
    return None


def _of(atom: Any, known: dict[Any, Array]) -> Array:
    if hasattr(atom, "val"):  # a literal
        return Array(tuple(atom.aval.shape), atom.aval.dtype)
    if atom not in known:
        aval = atom.aval
        on_host = getattr(aval, "memory_space", None) is jax.memory.Space.Host
        known[atom] = Array(tuple(getattr(aval, "shape", ())), getattr(aval, "dtype", None), on_host)
    return known[atom]


_NAMES = """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh device_put div eq erf erf_inv erfc
    exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter not
    optimization_barrier or pow reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())
REDUCTIONS = frozenset(f"reduce_{name}" for name in ("and", "max", "min", "or", "prod", "sum")) | {"argmax", "argmin"}
_MOVES = REDUCTIONS | {"broadcast_in_dim", "reshape", "sharding_constraint", "squeeze", "transpose"}
_SAME = ELEMENTWISE | {"cumsum", "cummax", "cummin", "cumprod", "cumlogsumexp", "rev", "sort", "dynamic_update_slice"}


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Returns how many of a scan's operands are constants and how many are its state, by its equation's parameters."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    constants, state, _ = params["ft_in"].unpack()  # jax 0.12
    return len(list(constants)), len(list(state))


def replicated(array: Array) -> DimAxes:
    """Returns the `DimAxes` of a replicated value."""
    return ((),) * len(array.shape)


def local_bytes(array: Array, dim_axes: DimAxes, mesh: Mapping[str, int]) -> int:
    """Returns the bytes of a value on one device."""
    parts = [math.prod(mesh[axis] for axis in axes) for axes in dim_axes]
    return array.itemsize * math.prod(-(-size // part) for size, part in zip(array.shape, parts, strict=True))


class Propagation:
    """Propagates shardings from a function's arguments to all its values.

    Args:
      mesh: sizes of the mesh's axes; those of size 1 shard nothing.
    """

    def __init__(self, mesh: Mapping[str, int]) -> None:
        self.mesh = dict(mesh)
        self._functions: dict[int, tuple[Any, Function]] = {}
        self._found: dict[tuple[int, tuple[DimAxes, ...]], list[DimAxes]] = {}

    def function(self, jaxpr: Any) -> Function:
        """Returns the operations of a jaxpr inside another; each is read only once."""
        if id(jaxpr) not in self._functions:
            self._functions[id(jaxpr)] = (jaxpr, read_function(jaxpr))  # keeping the jaxpr keeps its id
        return self._functions[id(jaxpr)][1]

    def dim_axes(self, function: Function, given: Sequence[DimAxes]) -> dict[Array, DimAxes]:
        """Returns the mesh axes that shard each value."""
        found: dict[Array, DimAxes] = dict(zip(function.takes, given, strict=True))
        for operation in function.operations:
            operands = [found.get(array, replicated(array)) for array in operation.reads]
            found.update(zip(operation.makes, self.of(operation, operands), strict=True))
        return found

    def of(self, operation: Operation, operands: Sequence[DimAxes]) -> list[DimAxes]:
        """Returns the mesh axes that shard an operation's results."""
        name = operation.name
        if name == "scan":
            return self._scan(operation, operands)
        if name == "while":
            count = operation.params["cond_nconsts"]
            body = self.function(operation.params["body_jaxpr"])
            return self.loop(body, operands[count:], operation.params["body_nconsts"])[1]
        if name == "cond":
            branches = [self._gives(self.function(each), operands[1:]) for each in operation.params["branches"]]
            return [_merged(made.shape, each) for made, *each in zip(operation.makes, *branches, strict=True)]
        if name == "shard_map":
            specs = operation.params["out_specs"]
            return [self._real(sharded_by(s, len(m.shape))) for s, m in zip(specs, operation.makes, strict=True)]
        return [self._one(operation, operands, made) for made in operation.makes]

    def body_inputs(self, operation: Operation, operands: Sequence[DimAxes]) -> list[DimAxes]:
        """Returns the mesh axes that shard the arguments of a scan's body."""
        fixed, carried = scan_counts(operation.params)
        slices = [dim_axes[1:] for dim_axes in operands[fixed + carried :]]
        body = self.function(operation.params["jaxpr"])
        return self.loop(body, [*operands[: fixed + carried], *slices], fixed, carried)[0]

    def loop(
        self, body: Function, given: Sequence[DimAxes], fixed: int, carried: int | None = None
    ) -> tuple[list[DimAxes], list[DimAxes]]:
        """Returns the mesh axes that shard a loop body's arguments and results, once those of its state agree."""
        given = list(given)
        count = len(body.gives) if carried is None else carried
        for _ in range(3):
            gives = self._gives(body, given)
            state = [
                _merged(array.shape, [new, old])
                for array, new, old in zip(body.takes[fixed : fixed + count], gives, given[fixed : fixed + count])
            ]
            if state == given[fixed : fixed + count]:
                break
            given[fixed : fixed + count] = state
        return given, gives

    def _gives(self, function: Function, given: Sequence[DimAxes]) -> list[DimAxes]:
        key = (id(function), tuple(given))
        if key not in self._found:
            found = self.dim_axes(function, given)
            self._found[key] = [found.get(array, replicated(array)) for array in function.gives]
        return self._found[key]

    def _scan(self, operation: Operation, operands: Sequence[DimAxes]) -> list[DimAxes]:
        _, carried = scan_counts(operation.params)
        gives = self._gives(self.function(operation.params["jaxpr"]), self.body_inputs(operation, operands))
        return [*gives[:carried], *[((), *dim_axes) for dim_axes in gives[carried:]]]

    def _one(self, operation: Operation, operands: Sequence[DimAxes], made: Array) -> DimAxes:
        name, params, rank = operation.name, operation.params, len(made.shape)
        if name == "sharding_constraint":
            spec = params["sharding"].spec
            asked = [own if each is PartitionSpec.UNCONSTRAINED else each for each, own in zip(spec, operands[0])]
            return self._real(sharded_by(asked, rank))
        if name == "broadcast_in_dim":
            sources = dict(zip(params["broadcast_dimensions"], zip(operation.reads[0].shape, operands[0])))
            return tuple(
                sources[dim][1] if dim in sources and sources[dim][0] == size else ()
                for dim, size in enumerate(made.shape)
            )
        if name == "transpose":
            return tuple(operands[0][dim] for dim in params["permutation"])
        if name in REDUCTIONS:
            return tuple(axes for dim, axes in enumerate(operands[0]) if dim not in params["axes"])
        if name in ("squeeze", "expand_dims", "reshape"):
            return self.reshaped(operation.reads[0].shape, operands[0], made.shape)
        if name == "dot_general":
            return self._product(operation, operands)
        if name == "gather":
            return self._gathered(operation, operands, made)
        alike = [dim_axes for array, dim_axes in zip(operation.reads, operands) if len(array.shape) == rank]
        if name not in _SAME:  # slices, pads, concatenations: a dimension stays sharded if it keeps its size
            shapes = [array.shape for array in operation.reads if len(array.shape) == rank]
            alike = [
                tuple(axes if size == new else () for axes, size, new in zip(dim_axes, shape, made.shape))
                for dim_axes, shape in zip(alike, shapes)
            ]
        return _merged(made.shape, alike)

    def _real(self, dim_axes: DimAxes) -> DimAxes:
        return tuple(tuple(axis for axis in axes if self.mesh.get(axis, 1) > 1) for axes in dim_axes)

    def reshaped(self, old: Sequence[int], dim_axes: DimAxes, new: Sequence[int]) -> DimAxes:
        """Returns the mesh axes after a reshape: of joined or split dimensions, those of the first pass to the
        first."""
        result: list[tuple[str, ...]] = [()] * len(new)
        if 0 in old:
            return tuple(result)
        i = j = 0
        while i < len(old) and j < len(new):
            first, size_old, size_new = (i, j), old[i], new[j]
            while size_old != size_new:
                if size_old < size_new:
                    i += 1
                    size_old *= old[i]
                else:
                    j += 1
                    size_new *= new[j]
            of = next((d for d in range(first[0], i + 1) if old[d] > 1), first[0])
            to = next((d for d in range(first[1], j + 1) if new[d] > 1), first[1])
            if new[to] % math.prod(self.mesh[axis] for axis in dim_axes[of]) == 0:
                result[to] = dim_axes[of]
            i, j = i + 1, j + 1
        return tuple(result)

    def _product(self, operation: Operation, operands: Sequence[DimAxes]) -> DimAxes:
        (left_c, right_c), (left_b, right_b) = operation.params["dimension_numbers"]
        left, right = operands
        batch = [left[i] or right[j] for i, j in zip(left_b, right_b)]
        free = [axes for dim, axes in enumerate(left) if dim not in (*left_c, *left_b)]
        free += [axes for dim, axes in enumerate(right) if dim not in (*right_c, *right_b)]
        return _without_repeats([*batch, *free])

    def _gathered(self, operation: Operation, operands: Sequence[DimAxes], made: Array) -> DimAxes:
        numbers = operation.params["dimension_numbers"]
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        kept = [dim for dim in range(len(operands[0])) if dim not in gone]
        sizes, table = operation.params["slice_sizes"], operation.reads[0].shape
        offsets = dict(zip(numbers.offset_dims, kept))
        of_indices = iter(operands[1][:-1])
        entries = []
        for dim in range(len(made.shape)):
            if dim in offsets:
                of = offsets[dim]
                entries.append(operands[0][of] if sizes[of] == table[of] else ())
            else:
                entries.append(next(of_indices, ()))
        return _without_repeats(entries)


def made_whole(operation: Operation, operands: Sequence[DimAxes], made: DimAxes) -> list[tuple[int, tuple[str, ...]]]:
    """Returns (operand, mesh axes) of operands that a product gathers: contracted dimensions sharded over mesh axes
    that shard its result too."""
    (left_c, right_c), _ = operation.params["dimension_numbers"]
    used = {axis for axes in made for axis in axes}
    found = []
    for number, contracted, other, others in ((0, left_c, 1, right_c), (1, right_c, 0, left_c)):
        mates = dict(zip(contracted, others))
        axes = [
            axis
            for dim in contracted
            for axis in operands[number][dim]
            if axis in used and axis not in operands[other][mates[dim]]
        ]
        if axes:
            found.append((number, tuple(axes)))
    return found


def _merged(shape: Sequence[int], several: Iterable[DimAxes]) -> DimAxes:
    """Returns the mesh axes of a result of several values of one shape: for each dimension, the most."""
    several = [dim_axes for dim_axes in several if len(dim_axes) == len(shape)]
    return _without_repeats(
        [max((dim_axes[dim] for dim_axes in several), key=len, default=()) for dim in range(len(shape))]
    )


def _without_repeats(entries: Iterable[tuple[str, ...]]) -> DimAxes:
    """Removes mesh axes that an earlier dimension has."""
    used: set[str] = set()
    result = []
    for axes in entries:
        kept = tuple(axis for axis in axes if axis not in used)
        used |= set(kept)
        result.append(kept)
    return tuple(result)
