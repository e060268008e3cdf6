"""Bytes of its arguments that a function reads at least, from its jaxpr: nothing is run, compiled or allocated."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

# What passes an array on: an element that is not read of the result is not read of the array.
_VIEWS = {
    "convert_element_type",
    "copy",
    "expand_dims",
    "optimization_barrier",
    "rev",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_PARTS = {"dynamic_slice", "gather", "slice"}  # what takes some elements of its first argument
_CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2", "scan"}


def bytes_read(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns how many bytes of each argument one call reads at least, as trees like the arguments.

    An array counts once however often it is used, and only where results depend on it; of one that is only looked up
    (an embedding's table) count the entries that are taken. What passes through unread, such as what decoding does not
    need of an encoder, counts 0.

    Args:
      function: a traceable function of arrays.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counted = iter(_read(jaxpr))
    found = [next(counted) if is_used else 0.0 for is_used in used]
    return jax.tree.unflatten(jax.tree.structure(arguments), found)


def _read(jaxpr: Any) -> list[float]:
    """Returns the bytes read of each argument of a jaxpr without dead code."""
    read: dict[Any, float] = {}

    def add(variable: Any, amount: float) -> None:
        if not hasattr(variable, "val"):  # no literal
            read[variable] = min(read.get(variable, 0.0) + amount, _size(variable))

    for equation in reversed(jaxpr.eqns):
        wanted = [read.get(variable, 0.0) for variable in equation.outvars]
        for variable, amount in zip(equation.invars, _read_by(equation, wanted), strict=True):
            add(variable, amount)
    return [read.get(variable, 0.0) for variable in jaxpr.invars]


def _read_by(equation: Any, wanted: Sequence[float]) -> list[float]:
    """Returns the bytes that an equation reads of each operand, where `wanted` are read of its results."""
    name, operands = equation.primitive.name, equation.invars
    whole = [_size(operand) for operand in operands]
    if name in _VIEWS:
        shares = [amount / max(_size(result), 1) for amount, result in zip(wanted, equation.outvars)]
        return [share * size for share, size in zip(shares, whole, strict=True)]
    if name in _PARTS:
        return [min(whole[0], _size(equation.outvars[0])), *whole[1:]]
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    if name not in _CALLS or inner is None or len(inner.invars) != len(operands):
        return whole
    found = _read(inner)
    # A scan may take another part each time, or the same one again: whatever it is counts once (`add`).
    return [amount * equation.params["length"] for amount in found] if name == "scan" else found


def _size(variable: Any) -> float:
    """Returns the bytes of an array; of a key, say, 0."""
    aval = variable.aval
    try:
        return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)
    except (AttributeError, TypeError):
        return 0.0
