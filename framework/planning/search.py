"""Which mesh, layout, remat policy and number of microbatches train fastest on a topology: rough closed forms for many.

Nothing is traced again: a step that was traced once tells which weights there are, what they multiply and how often;
for each candidate the rules of its layout place these anew. State is exact. Activations are those that a policy keeps,
in whole products, and the times those of `train_plan`; so the best few are to be traced, or compiled, before use.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from meshway.framework.axes import sharded_by
from meshway.framework.errors import UserError, first_line
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.partitioning.rules import Rules
from meshway.framework.partitioning.sharded_model import Row
from meshway.framework.planning.communication import Setting
from meshway.framework.planning.products import Product, Uses, Weight
from meshway.framework.planning.step_cost import StepCost
from meshway.framework.planning.topology import Topology
from meshway.framework.planning.train_plan import step_cost, traffic_of

# What a policy computes again, in forward passes; `minimal` the scores of attention, which are no weights' products.
RECOMPUTED = {"none": 0.0, "minimal": 0.1, "full": 1.0}
_ELEMENTWISE = 1.5  # without remat: bytes of norms, activations and masks kept beside each byte of products
_ORDER = ("stage", "replica", "data", "fsdp", "expert", "sequence", "model")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
      layout: its name.
      ici, dcn: sizes of the mesh's axes, within a slice and across slices.
    """

    layout: str
    ici: Mapping[str, int]
    dcn: Mapping[str, int]
    remat: str
    microbatches: int

    @property
    def words(self) -> str:
        """It, in words."""
        mesh = ", ".join(f"{name}={size}" for name, size in self.ici.items())
        across = "".join(f", {name} x{size} across slices" for name, size in self.dcn.items())
        return f"{self.layout} ({mesh}{across}), remat {self.remat}, microbatches {self.microbatches}"


@dataclasses.dataclass(frozen=True)
class Rough:
    """What a candidate is estimated to cost.

    Attributes:
      bytes: on a device.
      cost: of a step, also of one that does not fit; None where the mesh cannot be.
      why_not: why it cannot be, "" if it can.
    """

    candidate: Candidate
    bytes: float
    cost: StepCost | None
    why_not: str = ""

    @property
    def seconds(self) -> float:
        """Of a step; without end where it does not fit."""
        return math.inf if self.cost is None or self.why_not else self.cost.estimate


@dataclasses.dataclass(frozen=True)
class Traced:
    """What the search knows of a recipe: one trace of it.

    Attributes:
      setting: of its loss, traced on no mesh: with the products of experts, and how tokens are dispatched to these.
      rows: the tensors of its state (`program.explain`).
      model_flops: of a step.
      devices: of the topology, described.
      capacity: bytes of a device that a program may have.
      meshes: those that were built.
    """

    setting: Setting
    rows: Sequence[Row]
    batch_size: int
    model_flops: float
    where: Topology
    devices: Sequence[Any]
    capacity: float
    meshes: dict[tuple[Any, ...], Mesh] = dataclasses.field(default_factory=dict)

    def estimate(self, candidate: Candidate, layout: Layout) -> Rough:
        """Returns what a candidate costs, or why it cannot be."""
        try:
            shape = MeshShape(dict(candidate.ici), dict(candidate.dcn))
            sizes = {name: candidate.ici.get(name, 1) * candidate.dcn.get(name, 1) for name in shape.names}
            setting, state, gradients = self._placed(layout, sizes, candidate)
            key = (*shape.ici.items(), None, *shape.dcn.items())
            mesh = self.meshes.get(key) or self.meshes.setdefault(key, shape.build(self.devices))
        except UserError as error:
            return Rough(candidate, math.inf, None, first_line(error))
        again, micro = RECOMPUTED[candidate.remat], candidate.microbatches
        total = state + gradients * (2 if micro > 1 else 1) + _activations(setting, candidate)
        used = {axis for weight in setting.parameters for axes in weight.dim_axes for axis in axes} | setting.tokens
        idle = math.prod(size for axis, size in sizes.items() if axis not in used)
        flops = self.model_flops * (1 + again / 3) * idle
        sent = traffic_of(setting, micro, again)
        cost = step_cost(setting, sent, mesh, self.where, flops, state + gradients, micro, again)
        return Rough(candidate, total, cost, "" if total <= self.capacity else "does not fit")

    def _placed(self, layout: Layout, sizes: Mapping[str, int], candidate: Candidate) -> tuple[Setting, float, float]:
        """Returns the setting under a layout, and the bytes of its state and gradients on a device."""
        parameters = Rules(layout.parameters, sizes, "Layout.parameters")
        optimizer = Rules(layout.optimizer, sizes, "Layout.optimizer")
        activations = Rules(layout.activations, sizes, "Layout.activations", ("length", "kv_length"))
        state = gradients = 0.0
        placed: dict[str, dict[str | None, tuple[str, ...]]] = {}
        moments: dict[str, frozenset[str]] = {}
        for row in self.rows:
            kind, _, path = row.name.partition("/")
            if kind == "batch":
                continue
            rules = optimizer if kind in ("opt_state", "average") else parameters
            dim_axes = sharded_by(rules.resolve(row.axes, row.shape, row.name).spec, len(row.shape))
            own = row.total_bytes / math.prod(sizes[axis] for axes in dim_axes for axis in axes)
            state += own
            if kind == "params":
                gradients += own
                placed[path] = dict(zip(row.axes, dim_axes, strict=True))
            elif kind == "opt_state":
                for weight in self.setting.parameters:
                    if path.endswith(weight.path) and row.shape == weight.shape:
                        moments[weight.path] = frozenset(axis for axes in dim_axes for axis in axes)
        rows = self.batch_size // candidate.microbatches
        batch = activations.resolve(("batch",), (rows,), "a microbatch")
        tokens = frozenset(axis for axes in sharded_by(batch.spec, 1) for axis in axes if sizes[axis] > 1)
        stream = activations.resolve(("batch", "length", "embed"), _stream(self.setting, rows), "an activation")
        beside = frozenset(axis for axes in sharded_by(stream.spec, 3)[1:] for axis in axes if sizes[axis] > 1)
        uses = self.setting.uses
        moved = Uses(
            [dataclasses.replace(each, weight=_with(each.weight, placed)) for each in uses.products],
            [dataclasses.replace(each, weight=_with(each.weight, placed)) for each in uses.lookups],
            dtypes=uses.dtypes,
        )
        weights = [_with(each, placed) for each in self.setting.parameters]
        dispatch = self.setting.dispatch
        setting = Setting(
            dict(sizes), tokens, weights, moments, moved, beside - tokens, platform="tpu", dispatch=dispatch
        )
        return setting, state, gradients


def _with(weight: Weight, placed: Mapping[str, Mapping[str | None, tuple[str, ...]]]) -> Weight:
    """Returns a weight, or a part of one, sharded as the rules have it: dimensions are found by their names."""
    by_name = placed[weight.path]
    return dataclasses.replace(weight, dim_axes=tuple(by_name.get(name, ()) for name in weight.names))


def _stream(setting: Setting, rows: int) -> tuple[int, int, int]:
    """Returns the shape [rows, length, d_model] of the residual stream, the longest."""
    shapes = [product.value.shape for product in setting.uses.products if len(product.value.shape) == 3]
    _, length, width = max(shapes, key=lambda shape: shape[1], default=(rows, 1, 1))
    return rows, length, width


def _activations(setting: Setting, candidate: Candidate) -> float:
    """Returns the bytes of a microbatch's activations on a device: what the policy keeps, and one layer at work."""
    streams = products = layer = logits = gathered = 0.0
    for product in setting.uses.products:
        out = product.output.bytes * product.times / _parts(setting, product, (*product.batched, *product.kept))
        if product.of_experts and setting.dispatch in ("gathered", "sent"):  # rows for the worst case
            axes = {axis for dim in product.batched for axis in product.weight.dim_axes[dim]}
            out *= setting.size(axes & setting.tokens)
        if "vocab" in {product.weight.names[dim] for dim in product.kept}:
            logits += 3 * product.output.bytes / _parts(setting, product, product.kept)
            continue
        products += out
        layer += 2 * out / product.times
        if "heads" in {product.weight.names[dim] for dim in product.kept}:
            streams += product.value.bytes * product.times / setting.size(setting.tokens | setting.stream)
    for weight in setting.parameters:
        sharded = {axis for axes in weight.dim_axes for axis in axes}
        layers = math.prod(size for name, size in zip(weight.names, weight.shape, strict=True) if name == "layers")
        itemsize = np.dtype(setting.uses.dtypes.get(weight.path, weight.dtype)).itemsize
        gathered = max(gathered, math.prod(weight.shape) / layers / setting.size(sharded - setting.tokens) * itemsize)
    kept = {"full": streams, "minimal": streams + products, "none": streams + (1 + _ELEMENTWISE) * products}
    return (kept[candidate.remat] + layer + logits) / candidate.microbatches + 3 * gathered


def _parts(setting: Setting, product: Product, dims: Iterable[int]) -> int:
    axes = {axis for dim in dims for axis in product.weight.dim_axes[dim]}
    return setting.size(setting.tokens | axes)


def frontier(tried: Iterable[Rough]) -> list[Rough]:
    """Returns those that fit and of which no other is as quick with as little memory, the quickest first."""
    found: list[Rough] = []
    for each in sorted((each for each in tried if not each.why_not), key=lambda each: (each.seconds, each.bytes)):
        if not found or each.bytes < found[-1].bytes:
            found.append(each)
    return found


def candidates(
    layouts: Mapping[str, Layout], where: Topology, batch_size: int, most_microbatches: int = 64
) -> Iterator[Candidate]:
    """Yields the ways to train by some layouts: their inner axes of every size that is a power of two, the outer one
    with the rest; the outermost axis across slices."""
    chips = where.num_devices // where.slices
    for name, layout in layouts.items():
        axes = [axis for axis in _ORDER if axis in layout.mesh.names]
        within = [axis for axis in axes if axis in layout.mesh.ici]
        across = {axes[0]: where.slices} if where.slices > 1 else {}
        for ici in _splits(within, chips, {axis for axis in axes if axis in layout.mesh.dcn}):
            for remat in RECOMPUTED:
                for power in range(int(math.log2(most_microbatches)) + 1):
                    if batch_size % 2**power == 0:
                        yield Candidate(name, ici, across, remat, 2**power)


def _splits(axes: Sequence[str], chips: int, slow: set[str]) -> Iterator[dict[str, int]]:
    """Yields sizes of one to three axes whose product is the chips of a slice; of the inner ones powers of two."""
    fast = [axis for axis in axes if axis not in slow] or list(axes)
    ones = {axis: 1 for axis in axes if axis not in fast[:3]}
    powers = [2**power for power in range(1, 7)]
    for sizes in itertools.product(powers, repeat=len(fast[1:3])):
        inner = math.prod(sizes)
        if chips % inner == 0:
            yield ones | dict(zip(fast, (chips // inner, *sizes), strict=False))
