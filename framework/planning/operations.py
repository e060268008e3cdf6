"""A traced function as one list of operations: functions that it calls are put in where they stand, loops are not."""

import dataclasses
from collections.abc import Iterator
from typing import Any

_NOT_CALLS = frozenset(["scan", "while", "cond", "shard_map", "pallas_call"])


@dataclasses.dataclass(frozen=True, eq=False)
class Array:
    """A value of the function; compared by identity."""

    shape: tuple[int, ...]
    dtype: Any

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
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
      takes, gives: arguments and results.
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
    operations = tuple(_read(jaxpr, known))
    return Function(takes, operations, tuple(_of(atom, known) for atom in jaxpr.outvars))


def _read(jaxpr: Any, known: dict[Any, Array]) -> Iterator[Operation]:
    for equation in jaxpr.eqns:
        reads = tuple(_of(atom, known) for atom in equation.invars)
        inner = None if equation.primitive.name in _NOT_CALLS else _called(equation)
        if inner is None:
            yield Operation(
                equation.primitive.name, equation.params, reads, tuple(_of(var, known) for var in equation.outvars)
            )
            continue
        own: dict[Any, Array] = dict(zip(inner.invars, reads, strict=True))
        for var in inner.constvars:
            _of(var, own)
        yield from _read(inner, own)
        known.update((var, _of(atom, own)) for var, atom in zip(equation.outvars, inner.outvars, strict=True))


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
        known[atom] = Array(tuple(getattr(atom.aval, "shape", ())), getattr(atom.aval, "dtype", None))
    return known[atom]
