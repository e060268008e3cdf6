"""Which values of a traced function are arrays in memory, and from when to when: what compilers fuse is not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshway.framework.planning.shard_sizes import ELEMENTWISE, REDUCTIONS, Array, Function, Operation, scan_counts

_ALIASES = frozenset(
    ["copy", "expand_dims", "name", "optimization_barrier", "reshape", "sharding_constraint", "squeeze"]
)
FUSED = ELEMENTWISE | _ALIASES | {"broadcast_in_dim", "iota", "random_bits", "threefry2x32", "transpose"}
IN_PLACE = FUSED | {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "scan", "while"}
SAME_VALUE = frozenset(["copy", "name", "optimization_barrier", "sharding_constraint"])
_KEEPING_ROWS = SAME_VALUE | {"transpose"}
_FOREVER = 2**60
_WORTH = 17 / 16  # a value is computed again, not kept, where what it is made of is read for about as many bytes


def written_by_kernels(function: Function) -> set[Array]:
    """Returns the results of Pallas kernels that have several dimensions, in the order of their shape, and what only
    names or moves these."""
    found: set[Array] = set()
    for operation in function.operations:
        kernel = operation.name == "pallas_call"
        kernel = kernel or (operation.name == "shard_map" and _has_kernel(operation.params["jaxpr"]))
        if kernel or (operation.name in _KEEPING_ROWS and operation.reads[0] in found):
            found |= {array for array in operation.makes if len(array.shape) > 2}
    return found


def _has_kernel(jaxpr: Any) -> bool:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        values = [value if isinstance(value, tuple) else (value,) for value in equation.params.values()]
        inner = [each for value in values for each in value if hasattr(each, "eqns")]
        if equation.primitive.name == "pallas_call" or any(map(_has_kernel, inner)):
            return True
    return False


class Lifetimes:
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
                    redone = sum(map(size, roots)) <= _WORTH * size(array)
                    if operation.name in _ALIASES or redone or len(readers.get(array, [])) <= 1:
                        behind[array] = roots
                    else:  # read several times: not recomputed each time
                        self.held.add(array)
        last: dict[Array, int] = {}
        self.sliced: dict[int, list[Array]] = {}
        new = set(slices)
        for number, operation in enumerate(function.operations):
            fused = operation.name in FUSED or is_one_hot(operation)
            if fused and not any(array in self.held for array in operation.makes):
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
    if maker is not None and maker.name not in FUSED and not is_one_hot(maker):
        return True
    filled = maker is not None and not any(each.shape for each in maker.reads)  # with one number
    return any(not _can_fuse(each, array, filled) for each in readers)


def is_one_hot(operation: Operation) -> bool:
    """Whether an operation takes one element of each row, as `take_along_axis` does, or adds one to each row of zeros,
    as its gradient does: compilers make a comparison with the indices of it."""
    if operation.name == "gather":
        return operation.params["slice_sizes"] == (1,) * len(operation.reads[0].shape)
    if operation.name not in ("scatter", "scatter-add", "scatter_add"):
        return False
    numbers = operation.params["dimension_numbers"]
    rows, updates = operation.reads[0].shape, operation.reads[2].shape
    along = [rows[dim] for dim in numbers.inserted_window_dims]
    return len(along) == 1 and not numbers.update_window_dims and math.prod(updates) * along[0] == math.prod(rows)


def _can_fuse(reader: Operation | None, array: Array, filled: bool) -> bool:
    """Whether an operation that reads a value can compute it on the fly."""
    if reader is None:
        return False
    if reader.name == "scan" and filled:  # within the loop, unless it is its state
        return array not in reader.reads[scan_counts(reader.params)[0] :]
    return reader.name in FUSED or reader.name in REDUCTIONS or is_one_hot(reader)


def in_place(
    operation: Operation, made: Sequence[Array], ending: Sequence[Array]
) -> tuple[Sequence[Array], Sequence[Array]]:
    """Returns the results of an operation, and the operands not read again, that may share their memory: of a loop its
    state alone, since what it collects grows while what it reads is still there."""
    if operation.name == "scan":
        fixed, carried = scan_counts(operation.params)
        before, after = operation.reads[fixed : fixed + carried], operation.makes[:carried]
        return [each for each in made if each in after], [each for each in ending if each in before]
    return (made, ending) if operation.name in IN_PLACE else ((), ())


def reused_bytes(sizes: Sequence[int], ends: Sequence[int]) -> int:
    """Returns the bytes of results that reuse the buffers of operands which are not read again."""
    free, total = sorted(ends), 0
    for size in sorted(sizes, reverse=True):
        if size in free:
            free.remove(size)
            total += size
    return total
