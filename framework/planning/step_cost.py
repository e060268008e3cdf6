"""How long a training step takes: at the published peaks of a topology, by each resource, and as a single estimate.

Collectives have the links of the sides of the torus that their mesh axes run along (How to Scale Your Model, chapter
3); where an axis runs across slices, devices of a slice share what crosses the network (each sends its part of it, as
a reduce-scatter inside the slice first leaves it).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from meshway.framework.planning.cost import HOP
from meshway.framework.planning.topology import Ring, Topology, shared_bandwidth


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends in a step over some mesh axes, for one reason or by one kind of collective.

    Attributes:
      sent: bytes.
      count: collectives, one after the other.
    """

    axes: tuple[str, ...]
    what: str
    sent: float
    count: int


# What compiled operations reach of a chip's peaks, as Google's TPU microbenchmarks print it for a v6e (tpu-recipes,
# microbenchmarks/README.md): 827 of 918 TFLOP/s in a bfloat16 product of matrices of 8,192 x 8,192, and 1,360 of 1,600
# GB/s in a copy.
PRODUCTS, COPIES = 827 / 918, 1360 / 1600
# Published seconds by `StepCost.estimate`: least, middle and most of the runs of `meshway bench plan --table=times`.
ERROR = (0.97, 1.31, 1.71)


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Seconds of a step that each resource is busy, alone, at its peak.

    Attributes:
      compute: products.
      memory: the chip's own memory.
      ici, dcn: links within a slice, and the network between slices.
      latency: hops of collectives, whatever they carry.
      elementwise: of `memory`, what is moved by operations other than products.
      waited: of `ici` and `dcn`, what products need at once: sums and exchanges of activations.
    """

    compute: float
    memory: float
    ici: float
    dcn: float
    latency: float
    elementwise: float = 0.0
    waited: float = 0.0

    @property
    def terms(self) -> dict[str, float]:
        """Seconds by resource."""
        return {name: getattr(self, name) for name in ("compute", "memory", "ici", "dcn", "latency")}

    @property
    def estimate(self) -> float:
        """Of the step, as a chip runs it.

        A core runs one operation after the other: products at `PRODUCTS` of the peak, which hide the reads of their own
        operands, and between them the elementwise operations, at `COPIES` of the memory's. Sums and exchanges of
        activations are waited for. Weights are gathered, and gradients summed, beside products, as far as these last.
        """
        products = self.compute / PRODUCTS
        beside = max(0.0, self.ici + self.dcn - self.waited - products)
        return products + self.elementwise / COPIES + self.waited + beside + self.latency

    @property
    def least(self) -> float:
        """Of the step, if everything goes on beside everything else."""
        return max(self.compute, self.memory, self.ici + self.latency, self.dcn)

    @property
    def most(self) -> float:
        """Of the step, if collectives wait for products and products for collectives."""
        return max(self.compute, self.memory) + self.ici + self.dcn + self.latency

    @property
    def bound(self) -> str:
        """The resource that is busy longest."""
        terms = self.terms
        return max(terms, key=lambda name: terms[name])


class Wires:
    """Which links of a topology the axes of a mesh run along.

    Args:
      mesh: over devices with `coords` (of TPUs), and `slice_index` where there are several slices.
    """

    def __init__(self, mesh: Mesh, where: Topology):
        self._devices, self._names, self._where = mesh.devices, tuple(mesh.shape), where

    def seconds(self, traffic: Iterable[Traffic]) -> tuple[float, float, float]:
        """Returns the seconds of (links, network, latency) for what is sent in a step."""
        ici = dcn = latency = 0.0
        for each in traffic:
            bandwidth, hops, slices, inside = self._along(each.axes)
            if inside > 1:
                links = self._where.chip.link_bandwidth if each.what == "collective-permute" else bandwidth
                farther = max(1.0, 2 * hops / 4) if each.what.endswith("all-to-all") else 1.0
                ici += each.sent * farther / links
            if slices > 1 and self._where.network:
                dcn += each.sent / inside / self._where.network
            latency += each.count * hops * HOP
        return ici, dcn, latency

    def _along(self, axes: Sequence[str]) -> tuple[float, float, int, int]:
        """Returns (bytes/s that a device sends along these axes, hops to the farthest, slices, devices of a slice)."""
        index = tuple(slice(None) if name in axes else 0 for name in self._names)
        members = np.asarray(self._devices[index], dtype=object).reshape(-1)
        slices = {getattr(each, "slice_index", 0) for each in members} or {0}
        inside = max(1, len(members) // len(slices))
        chip = self._where.chip
        if not chip.torus:
            return chip.link_bandwidth, 1.0, 1, inside
        taken, hops = [], 0.0
        for number, ring in enumerate(self._where.device_rings):
            along = len({_places(each)[number] for each in members})
            if along > 1:
                whole = along == ring.size
                taken.append(ring if whole else Ring(along, chip.link_bandwidth))
                wraps = whole and not ring.is_inside and ring.bandwidth > chip.link_bandwidth
                hops += along / 2 if wraps else along - 1
        return shared_bandwidth(taken) or chip.link_bandwidth, hops or 1.0, len(slices), inside


def _places(device: Any) -> tuple[int, ...]:
    """Returns a TPU device's places along `Topology.device_rings`."""
    return (*device.coords, device.core_on_chip)
