"""The collectives of a compiled program, and those that kernels issue themselves: what is sent, over which mesh axes,
and how often."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshway.framework.planning import hlo
from meshway.framework.planning.hlo import Sources, sources_of_operands

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
class KernelCollective:
    """One collective of a `shard_map` kernel.

    Attributes:
      kind: the HLO opcode.
      axes: its mesh axes.
      bytes: of its payload on a device (see `Collective.array`), for all its executions in a forward pass.
      trained: whether it moves floating-point numbers, which have gradients; else segment ids and positions.
      ring: of a permute, whether it sends to the next device of a ring.
    """

    kind: str
    axes: tuple[str, ...]
    bytes: float
    trained: bool
    ring: bool = False


@dataclasses.dataclass(frozen=True)
class ShardMapKernel:
    """The body of a `shard_map`.

    Attributes:
      written: its collectives.
      keys_values: bytes on a device of its last two arguments of shape [batch, length, heads, head_dim], for all its
        executions: keys and values, if it is attention.
    """

    written: tuple[KernelCollective, ...]
    keys_values: float


def kernel_of(equation: Any, times: int) -> ShardMapKernel:
    """Reads a `shard_map` equation that runs `times` times in a forward pass; a loop of unknown length counts once."""
    body = getattr(equation.params["jaxpr"], "jaxpr", equation.params["jaxpr"])
    given = [var.aval for var in body.invars if len(var.aval.shape) == 4 and _is_float(var.aval)]
    found = tuple(_inside(body, times, dict(equation.params["mesh"].shape)))
    return ShardMapKernel(found, times * sum(_bytes(aval) for aval in given[-2:]))


def _inside(jaxpr: Any, times: int, sizes: dict[str, int]) -> Iterator[KernelCollective]:
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


def _collective(equation: Any, times: int, sizes: dict[str, int]) -> Iterator[KernelCollective]:
    params, kind = equation.params, _KINDS[equation.primitive.name]
    named = params.get("axes", params.get("axis_name", ()))
    axes = tuple(axis for axis in ((named,) if isinstance(named, str) else named) if sizes.get(axis, 1) > 1)
    if not axes:
        return
    ring = kind == "collective-permute" and _is_ring(params["perm"], math.prod(sizes[axis] for axis in axes))
    if kind == "collective-permute" and all(source == target for source, target in params["perm"]):
        return
    for array in equation.outvars if kind == "all-gather" else equation.invars:
        yield KernelCollective(kind, axes, _bytes(array.aval) * times, _is_float(array.aval), ring)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * jax.numpy.dtype(aval.dtype).itemsize


def _is_float(aval: Any) -> bool:
    return bool(jax.numpy.issubdtype(aval.dtype, jax.numpy.floating))


def _is_ring(pairs: Sequence[tuple[int, int]], size: int) -> bool:
    return sorted(pairs) == [(i, (i + 1) % size) for i in range(size)]


# Bytes that one device of a ring of n sends, as a multiple of the payload (Thakur, Rabenseifner and Gropp 2005,
# sections 4.1 to 4.5; Patarasuk and Yuan 2009 for the all-reduce). They are lower bounds for any algorithm without
# multicast. `Collective` defines the payload of each kind.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,  # of whole buffers: how full they are is unknown before the run
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
_UNEVEN = "inside a loop of unknown length, counted once"
_CHOICE = "inside a conditional, of which the most expensive branch is counted"
# XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and a slice, whose computation has this name.
_FUSED_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that a collective moves; an instruction that moves several arrays is several of these.

    Attributes:
      kind: the opcode, such as `all-reduce`; the start and done of an asynchronous one count as one.
      axes: the mesh axes it spans. Devices that differ only along these form a group.
      group: devices of a group; fewer than the product of the axes' sizes if it spans a part of an axis.
      count: executions in a step, with the trip counts of enclosing loops.
      array: dtype and shape of the payload on one device: the whole array of an all-reduce, the result of an
        all-gather, the operand of a reduce-scatter, all-to-all or permute.
      origin: the operation's name in the program, as jax wrote it into the metadata.
      instruction: its name in the HLO; arrays of one instruction are sent together.
      sources: the arguments of the program that the payload depends on (see `hlo.sources_of_operands`).
      note: why `count` may be wrong, "" if it is exact.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: int
    array: hlo.Array
    origin: str
    instruction: str
    sources: Sources = frozenset()
    note: str = ""

    @property
    def payload(self) -> int:
        """Bytes of `array` times `count`."""
        return self.array.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by `SENT`."""
        return SENT[self.kind](self.group) * self.payload


def read_collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Returns a `Collective` for each array that a compiled program moves between devices.

    A loop is counted by its trip count: XLA's if known, else the constant that its condition compares with, else 1,
    with a note. Of a conditional, the branch that sends most is counted. Groups of one device are left out.

    Args:
      text: HLO of one SPMD program (`compiled.as_text()`).
      mesh: sizes of the mesh's axes in order. XLA numbers devices by their position in the mesh, row-major, regardless
        of their ids.

    Raises:
      UserError: the text is not HLO.
    """
    module = hlo.parse(text)
    return list(_Reader(module, mesh).read(module.entry, 1, ""))


def sent_by_axes(rows: Iterable[Collective]) -> dict[tuple[str, ...], float]:
    """Returns mesh axes -> bytes a device sends over them in one run of the program."""
    totals: dict[tuple[str, ...], float] = {}
    for row in rows:
        totals[row.axes] = totals.get(row.axes, 0.0) + row.sent
    return totals


class _Reader:
    def __init__(self, module: hlo.Module, mesh: Mapping[str, int]):
        self._module, self._mesh = module, dict(mesh)
        self._sources = sources_of_operands(module)

    def read(self, name: str, times: int, note: str) -> Iterator[Collective]:
        computation = self._module.computations.get(name)
        for instruction in computation or ():
            kind = _kind(instruction.opcode)
            if kind:
                yield from self._rows(kind, instruction, times, note)
            elif not instruction.opcode.endswith(("-done", "-update")):
                yield from self._inside(instruction, times, note)

    def _inside(self, instruction: hlo.Instruction, times: int, note: str) -> Iterator[Collective]:
        called = instruction.called()
        if instruction.opcode == "while":
            trips = self._trips(instruction, called["condition"][0])
            inside, note = (times, _UNEVEN) if trips is None else (times * trips, note)
            yield from self.read(called["body"][0], inside, note)
        elif instruction.opcode == "conditional":
            branches = [list(self.read(name, times, _CHOICE)) for names in called.values() for name in names]
            yield from max(branches, key=lambda rows: sum(row.sent for row in rows), default=[])
        else:
            for names in called.values():
                for name in names:
                    yield from self.read(name, times, note)

    def _trips(self, loop: hlo.Instruction, condition: str) -> int | None:
        known = re.search(r'known_trip_count[\\"]*:\s*\{[\\"]*n[\\"]*:\s*[\\"]*(\d+)', loop.attributes)
        if known:
            return int(known.group(1))
        constants = [each for each in self._module.computations[condition] if each.opcode == "constant"]
        limits = [each.operands[0] for each in constants if each.arrays[0].shape == ()]
        return int(limits[0]) if len(limits) == 1 and limits[0].isdecimal() else None

    def _rows(self, kind: str, instruction: hlo.Instruction, times: int, note: str) -> Iterator[Collective]:
        groups = _groups(instruction, math.prod(self._mesh.values()))
        axes = _spanned(groups, self._mesh)
        size = groups.shape[1]
        if not axes:
            return
        fused = instruction.computation.startswith(_FUSED_SCATTER)
        for array in self._result(instruction).arrays:
            if array.dtype in ("token", "opaque") or not array.size:
                continue
            if fused:
                kind = "reduce-scatter"
            elif kind == "reduce-scatter":
                array = hlo.Array(array.dtype, (size, *array.shape))
            sources = self._sources.get((instruction.computation, instruction.name), frozenset())
            yield Collective(kind, axes, size, times, array, instruction.op_name, instruction.name, sources, note)

    def _result(self, instruction: hlo.Instruction) -> hlo.Instruction:
        """Returns the instruction with the collective's result: the `-done` of an asynchronous one, else itself."""
        if not instruction.opcode.endswith("-start"):
            return instruction
        ends = [
            each
            for each in self._module.computations[instruction.computation]
            if each.opcode.endswith("-done") and instruction.name in each.operands
        ]
        return ends[0] if ends else instruction


def _kind(opcode: str) -> str:
    """Returns the kind of a collective or of the start of an asynchronous one; "" for all other opcodes."""
    kind = opcode.removesuffix("-start")
    return kind if kind in SENT else ""


def _groups(instruction: hlo.Instruction, num_devices: int) -> np.ndarray:
    """Returns the positions of each group's devices, int [groups, size]; for a permute its (source, target) pairs."""
    pairs = instruction.attribute("source_target_pairs")
    if pairs:
        return np.array([[int(source), int(target)] for source, target in re.findall(r"\{(\d+),(\d+)\}", pairs)])
    text = instruction.attribute("replica_groups")
    if text.startswith("mesh["):
        # Its parts are divided by commas: `mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}`.
        start = instruction.attributes.index("replica_groups=mesh[")
        return _mesh_groups(instruction.attributes[start:], num_devices)
    if "<=" in text:
        return _iota(text)
    listed = [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(listed) if listed else np.arange(num_devices)[None]


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: 0, 1, 2 ... in shape [4, 2], transposed, then reshaped to [2, 4]."""
    shape, _, source = text.partition("<=")
    return _counted(source).reshape(_integers(shape))


def _counted(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0, 1, 2 ... in shape [4, 2], transposed."""
    sizes, _, order = text.partition("T")
    numbers = np.arange(math.prod(_integers(sizes))).reshape(_integers(sizes))
    return numbers.transpose(_integers(order)) if order else numbers


def _mesh_groups(text: str, num_devices: int) -> np.ndarray:
    """`mesh['a'=4,'b'=2], device_ids=(ORDER) {'a'}`: groups along named axes of XLA's own mesh.

    `'a':(2)2` is a sub-axis of a: of size 2, with 2 before it.
    """
    found = re.match(r"replica_groups=mesh\[([^\]]*)\](?:,?\s*device_ids=\((.*?)\))?\s*\{([^}]*)\}", text)
    if not found:
        return np.arange(num_devices)[None]
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
    order = found.group(2) or ""
    if order.startswith("["):
        ids = _counted(order)
    else:
        ids = np.array(_integers(order)) if order else np.arange(num_devices)
    dims: list[int] = []
    chosen: list[int] = []
    spans = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(3))
    for name, size in sizes.items():
        sub_axes = [(int(before or 1), int(part or size)) for span, before, part in spans if span == name]
        done = 1
        for before, part in sorted(sub_axes):
            dims += [before // done, part]
            chosen.append(len(dims) - 1)
            done = before * part
        dims.append(size // done)
    rest = [dim for dim in range(len(dims)) if dim not in chosen]
    width = math.prod(dims[dim] for dim in chosen)
    return ids.reshape(dims).transpose(*rest, *chosen).reshape(-1, width)


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _spanned(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which the members of a group differ."""
    coordinates: Sequence[np.ndarray] = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(name for name, along in zip(mesh, coordinates, strict=True) if bool(np.any(along != along[:, :1])))
