"""The collectives that kernels write themselves: those in the bodies of `shard_map`, read from a traced loss."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

_KINDS = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "ragged-all-to-all",
    "ppermute": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Written:
    """One collective of a kernel.

    Attributes:
      kind: as HLO calls it.
      axes: its mesh axes.
      bytes: of its payload on a device (see `collectives.Collective.array`), for all its times in a forward pass.
      trained: whether it moves floating-point numbers, which have gradients; else ids and places.
      ring: of a permute, whether it sends to the next device round a ring.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    trained: bool
    ring: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A body of `shard_map`.

    Attributes:
      written: its collectives.
      keys_values: bytes on a device of the last two arrays [batch, length, heads, head_dim] that it is given, for all
        its times: keys and values, if it is attention.
    """

    written: tuple[Written, ...]
    keys_values: float


def kernel_of(equation: Any, times: int) -> Kernel:
    """Reads a `shard_map` equation that runs `times` times in a forward pass; a loop of unknown length counts once."""
    body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
    given = [var.aval for var in body.invars if len(var.aval.shape) == 4 and _is_float(var.aval)]
    found = tuple(_inside(body, times, dict(equation.params["mesh"].shape)))
    return Kernel(found, times * sum(_bytes(aval) for aval in given[-2:]))


def _inside(jaxpr: Any, times: int, sizes: dict[str, int]) -> Iterator[Written]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in _KINDS:
            yield from _collective(equation, times, sizes)
        elif name == "cond":
            branches = [list(_inside(branch, times, sizes)) for branch in params["branches"]]
            yield from max(branches, key=lambda found: sum(each.bytes for each in found))
        else:
            inner_times = times * params["length"] if name == "scan" else times
            for value in params.values():
                for item in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(item, "eqns") or hasattr(getattr(item, "jaxpr", None), "eqns"):
                        yield from _inside(item, inner_times, sizes)


def _collective(equation: Any, times: int, sizes: dict[str, int]) -> Iterator[Written]:
    params, kind = equation.params, _KINDS[equation.primitive.name]
    named = params.get("axes", params.get("axis_name", ()))
    axes = tuple(axis for axis in ((named,) if isinstance(named, str) else named) if sizes.get(axis, 1) > 1)
    if not axes:
        return
    ring = kind == "collective-permute" and _is_ring(params["perm"], math.prod(sizes[axis] for axis in axes))
    if kind == "collective-permute" and all(source == target for source, target in params["perm"]):
        return
    for array in equation.outvars if kind == "all-gather" else equation.invars:
        yield Written(kind, axes, _bytes(array.aval) * times, _is_float(array.aval), ring)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * jax.numpy.dtype(aval.dtype).itemsize


def _is_float(aval: Any) -> bool:
    return bool(jax.numpy.issubdtype(aval.dtype, jax.numpy.floating))


def _is_ring(pairs: Sequence[tuple[int, int]], size: int) -> bool:
    return sorted(pairs) == [(i, (i + 1) % size) for i in range(size)]
