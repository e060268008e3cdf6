"""Matmul FLOPs of a function, and the fewest bytes it reads, from its jaxpr: nothing is run or compiled."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval


def count_flops(fn: Callable[..., Any], *abstract_args: Any) -> float:
    """Returns the matmul FLOPs of one call of `fn` (a multiply and an add count as two).

    Matrix products, grouped (ragged) products and convolutions are counted, and nothing else, as is usual for "model
    FLOPs". A scan counts its body times its length, a `cond` its most expensive branch, a `shard_map` its body times
    the shards, a Pallas kernel its body times its grid. Attention is counted in full although a causal mask discards
    half of it. The body of a `while`, whose trip count is unknown, counts ONCE. A kernel without a jaxpr (a foreign
    call) counts nothing.

    Args:
      fn: a traceable function of arrays.
      *abstract_args: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    return _count(jax.make_jaxpr(fn)(*abstract_args))


def jaxpr_flops(closed: Any) -> float:
    """Returns `count_flops` of a function that has been traced."""
    return _count(closed)


def live_flops(fn: Callable[..., Any], *abstract_args: Any) -> float:
    """Returns `count_flops` without dead code, which a compiler removes, such as the logits of a prompt of which only
    keys and values are used."""
    closed = jax.make_jaxpr(fn)(*abstract_args)
    live, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _count(live)


def train_flops(loss_fn: Callable[..., Any], *abstract_args: Any) -> float:
    """Returns the model FLOPs of one gradient step on `loss_fn`: three times its forward pass.

    The usual convention (PaLM, arXiv:2204.02311, appendix B): the backward pass is two products for each one
    of the forward pass. Recomputation (remat) is not counted.
    """
    return 3.0 * count_flops(loss_fn, *abstract_args)


def _count(jaxpr: Any) -> float:
    return sum((_count_equation(equation) for equation in jaxpr.eqns), 0.0)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _MATMULS:
        return _MATMULS[name](equation)
    if name == "cond":
        return max(_count(branch) for branch in params["branches"])
    inside = sum((_count(inner) for inner in _inner_jaxprs(params)), 0.0)
    if name == "scan":
        return inside * params["length"]
    if name == "shard_map":
        return inside * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return inside * math.prod(size for size in params["grid_mapping"].grid if isinstance(size, int))
    return inside


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs an equation holds (jit, remat, custom derivatives, while, ...): all have `eqns`."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _dot_general(equation: Any) -> float:
    (contracting, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)


def _ragged_dot(equation: Any) -> float:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    lhs = equation.invars[0].aval.shape
    flops = 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)
    if set(numbers.lhs_ragged_dimensions) & set(contracting):
        # One output a group, but the groups share the contracted rows among them.
        flops /= equation.invars[2].aval.shape[-1]
    return flops


def _convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    out_features = kernel[numbers.rhs_spec[0]]
    # An output element is a product over the kernel's window and the input features of its group.
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_features


_MATMULS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


# Operations that read an element of their operand only if that element of the result is read.
_VIEWS = {
    "convert_element_type",
    "copy",
    "expand_dims",
    "name",
    "optimization_barrier",
    "rev",
    "reshape",
    "sharding_constraint",
    "squeeze",
    "transpose",
}
_PARTS = {"dynamic_slice", "gather", "slice"}  # operations that read some elements of their first operand
_CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2", "scan"}


def bytes_read(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the fewest bytes that one call reads of each argument, as trees like the arguments.

    An array counts once however often it is used, and only if results depend on it; of one that is only looked up (an
    embedding's table) only the entries taken count. Unused arguments, such as an encoder's parameters while decoding,
    count 0.

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
    # A scan may read another part each time or the same one again: `add` limits the sum to the array's size.
    return [amount * equation.params["length"] for amount in found] if name == "scan" else found


def _size(variable: Any) -> float:
    """Returns the bytes of an array; 0 for other types, such as keys."""
    aval = variable.aval
    try:
        return float(math.prod(aval.shape) * np.dtype(aval.dtype).itemsize)
    except (AttributeError, TypeError):
        return 0.0
