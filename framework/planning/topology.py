"""Accelerators as published, and how many of them are wired: `v5p:4x4x8`, `v4:4x4x4x2slices`, `H100:64`, `cpu:8`.

Pure Python.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence

from meshway.framework.errors import UserError, did_you_mean

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one JAX device.

    Attributes:
      bfloat16: dense matmul peak in FLOP/s, inputs in bfloat16 (vendors' "with sparsity" figures are halved).
      float32: the same for float32 inputs at JAX's default precision: TPUs make one bfloat16 pass, NVIDIA
        GPUs use TensorFloat-32.
      memory_bytes: device memory; slightly less is available to a program.
      memory_bandwidth: bytes/s read from it.
      link_bandwidth: bytes/s that one link sends one way, of TPUs as How to Scale Your Model, chapter 2, has it; of a
        GPU what all its links to the switch do.
      torus: dimensions of the torus that its links form, two links each; 0 for a switch.
      source: where the figures come from.
      cores: JAX devices of a chip, of which this is one.
    """

    bfloat16: float
    float32: float
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    torus: int
    source: str
    cores: int = 1

    @property
    def sends(self) -> float:
        """Bytes/s that it sends one way over all its links."""
        return self.link_bandwidth * (2 * self.torus or 1)


def _tpu(tflops: float, gib: int, gigabytes: float, link: float, torus: int, page: str, cores: int = 1) -> Chip:
    source = f"Google Cloud TPU documentation, {page}"
    return Chip(tflops * 1e12, tflops * 1e12, gib * _GIB, gigabytes * 1e9, link * 1e9, torus, source, cores)


def _gpu(tflops: float, gigabytes: int, bandwidth: float, link: float, sheet: str) -> Chip:
    source = f"NVIDIA {sheet} data sheet, dense"
    return Chip(tflops * 1e12, tflops / 2 * 1e12, gigabytes * 10**9, bandwidth * 1e9, link * 1e9, 0, source)


# By `jax.Device.device_kind`. The two cores of a TPU v4 or v5p act as one device; those
# of a TPU7x are two, so its figures are half a chip's.
CHIPS: dict[str, Chip] = {
    "TPU v4": _tpu(275, 32, 1200, 45, 3, "v4"),
    "TPU v5 lite": _tpu(197, 16, 819, 45, 2, "v5e"),
    "TPU v5e": _tpu(197, 16, 819, 45, 2, "v5e"),
    "TPU v5": _tpu(459, 95, 2765, 90, 3, "v5p"),
    "TPU v5p": _tpu(459, 95, 2765, 90, 3, "v5p"),
    "TPU v6 lite": _tpu(918, 32, 1640, 90, 2, "v6e"),
    "TPU v6e": _tpu(918, 32, 1640, 90, 2, "v6e"),
    "TPU7x": _tpu(2307 / 2, 96, 7380 / 2, 100 / 2, 3, "TPU7x, half a chip", cores=2),
    "NVIDIA A100-SXM4-40GB": _gpu(312, 40, 1555, 300, "A100"),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 80, 2039, 300, "A100"),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 40, 1555, 32, "A100"),
    "NVIDIA A100 80GB PCIe": _gpu(312, 80, 1935, 32, "A100"),
    "NVIDIA H100 80GB HBM3": _gpu(989.4, 80, 3350, 450, "H100 SXM"),
    "NVIDIA H100 PCIe": _gpu(756, 80, 2000, 64, "H100 PCIe"),
    "NVIDIA H100 NVL": _gpu(835, 94, 3900, 64, "H100 NVL"),
    "NVIDIA H200": _gpu(989.4, 141, 4800, 450, "H200 SXM"),
    "NVIDIA H200 NVL": _gpu(835, 141, 4800, 64, "H200 NVL"),
    "NVIDIA B200": _gpu(2250, 180, 8000, 900, "HGX B200"),
}


def chip_named(name: str) -> tuple[str, Chip]:
    """Returns (kind, figures) of the accelerator `name`: a device kind, or a part of exactly one.

    Raises:
      UserError: it is part of no known device kind, or of several.
    """
    wanted = name.lower().strip()
    parts = [kind for kind in CHIPS if wanted and wanted in kind.lower()]
    exact = [kind for kind in parts if wanted == kind.lower() or kind.lower().endswith(f" {wanted}")]
    found = exact or parts
    if len(found) != 1:
        listed = found or list(CHIPS)
        raise UserError(f"no accelerator is called {name!r}{' alone' if found else ''}; there are {', '.join(listed)}")
    return found[0], CHIPS[found[0]]


# What people call a whole system, as topologies name it; one part of a device kind may be several chips' own.
_FAMILIES = {
    "v4": "TPU v4",
    "v5e": "TPU v5e",
    "v5p": "TPU v5p",
    "v6e": "TPU v6e",
    "tpu7x": "TPU7x",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
    "cpu": "cpu",
}
_PODS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}  # chips, by the same documentation
_ALSO = {"v5litepod": "v5e", "trillium": "v6e", "ironwood": "tpu7x"}
# A simulated device has its share of a machine: `hardware.topology_of` has figures.
_SIMULATED = Chip(math.nan, math.nan, 0, math.nan, math.nan, 0, "none")
_MOST_SIMULATED = 512
# A TPU host's network to other slices, bytes/s, and the chips that share it by the torus's dimension (How to Scale Your
# Model, chapter 2: 6.25 GB/s a chip of v5p, 3.125 of v5e).
_HOST_NETWORK = 25e9
_HOST_CHIPS = {2: 8, 3: 4}
_MOST = 2**20  # chips: each is described by itself
_DIE_LINKS = 6  # dies of a TPU7x send each other six times what a link of the chip does (its documentation)
_WHOLE = {2: 16, 3: 4}  # torus dimension -> wrapped around where a side is this (2D), or a multiple of it (3D cubes)


@dataclasses.dataclass(frozen=True)
class Ring:
    """One side of a torus, or a part of what a switch connects.

    Attributes:
      size: devices along it.
      bandwidth: bytes/s that a device sends along it, both ways together; half of it where no link wraps around.
      is_inside: whether it joins the dies of a chip.
    """

    size: int
    bandwidth: float
    is_inside: bool = False


def shared_bandwidth(rings: Collection[Ring]) -> float:
    """Returns the bytes/s that a device sends over rings together: the torus's, for which dies of a chip wait."""
    return sum(ring.bandwidth for ring in rings if not ring.is_inside) or sum(ring.bandwidth for ring in rings)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind, wired.

    Attributes:
      name: as it was asked for.
      kind: the device's.
      rings: sides of a slice's torus; of a switch, the prime factors of its number of devices, which may be joined
        freely.
      slices: how many such, joined by the data centre's network.
    """

    name: str
    kind: str
    chip: Chip
    rings: tuple[Ring, ...]
    slices: int = 1

    @property
    def platform(self) -> str:
        """What JAX calls its devices' platform: tpu, gpu or cpu."""
        return "tpu" if self.chip.torus else "cpu" if self.kind == "cpu" else "gpu"

    @property
    def device_rings(self) -> tuple[Ring, ...]:
        """The rings of devices: those of chips, and the dies of a chip where each is a device."""
        cores = self.chip.cores
        return self.rings + ((Ring(cores, _DIE_LINKS * cores * self.chip.link_bandwidth, True),) if cores > 1 else ())

    @property
    def num_chips(self) -> int:
        """Chips in all."""
        return self.slices * math.prod(ring.size for ring in self.rings)

    @property
    def num_devices(self) -> int:
        """JAX devices in all."""
        return self.num_chips * self.chip.cores

    @property
    def network(self) -> float:
        """Bytes/s that a device sends to other slices, its share of its host's; 0 of a GPU, whose network is not
        known."""
        torus = self.chip.torus
        return _HOST_NETWORK / _HOST_CHIPS[torus] / self.chip.cores if torus else 0.0


def topology(name: str) -> Topology:
    """Returns the topology that a text names: a chip, a colon, and the sides of its torus or the number of GPUs; then
    perhaps how many such slices, as `x2slices`.

    A side of a TPU slice is a ring where its last chip has a link to the first: sides that are a multiple of 4 in a
    slice of whole cubes (v4, v5p, TPU7x), sides of 16 (v5e, v6e).

    Raises:
      UserError: there is no such chip, it has no torus of so many sides, there are too many, or GPUs are counted
        in slices.
    """
    family, colon, sides = name.strip().lower().partition(":")
    several = re.fullmatch(r"(.*)x([1-9][0-9]*)slices?", sides)
    sides, slices = (several[1], int(several[2])) if several else (sides, 1)
    kind = _FAMILIES.get(family)
    if kind is None:
        stem = re.sub(r"-[0-9]+$", "", family.removeprefix("tpu-"))  # of the names of machines: v4-128, v5litepod-8
        if known := _ALSO.get(stem, stem if stem in _FAMILIES else ""):
            raise UserError(f"topology {name!r}: write the chip and how many, as {known}:{_example(known)}")
        near = did_you_mean(family, _FAMILIES) or f"; there are {', '.join(_FAMILIES)}"
        raise UserError(f"topology {name!r}: no accelerator is called {family!r}{near}")
    chip, example = CHIPS.get(kind, _SIMULATED), _example(family)
    if not colon or not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", sides):
        raise UserError(f"topology {name!r} does not say how many: write it as {family}:{example}")
    sizes = [int(side) for side in sides.split("x")]
    if (count := slices * math.prod(sizes)) > _MOST:
        raise UserError(f"topology {name!r} has {count:,} chips; at most {_MOST:,} are planned for")
    if not chip.torus:
        if several:
            raise UserError(f"topology {name!r}: slices are of TPUs; write how many devices there are, as {family}:64")
        if kind == "cpu" and count > _MOST_SIMULATED:
            raise UserError(f"topology {name!r}: at most {_MOST_SIMULATED} devices are simulated")
        return switched(name, kind, chip, count)
    if len(sizes) != chip.torus:
        raise UserError(
            f"topology {name!r}: {kind}s form a torus of {chip.torus} dimensions, and it has {len(sizes)}: "
            f"write it as {family}:{example}"
        )
    if (one := count // slices) > _PODS[family]:
        raise UserError(
            f"topology {name!r}: a pod has {_PODS[family]:,} chips, not {one:,}; several slices are written as "
            f"{family}:{example}x2slices"
        )
    whole = _WHOLE[chip.torus]
    wrapped = [size == whole if chip.torus == 2 else all(each % whole == 0 for each in sizes) for size in sizes]
    rings = [Ring(size, chip.link_bandwidth * (2 if wraps else 1)) for size, wraps in zip(sizes, wrapped, strict=True)]
    return Topology(name, kind, chip, tuple(rings), slices)


def _example(family: str) -> str:
    return "x".join("4" * CHIPS.get(_FAMILIES[family], _SIMULATED).torus) or "8"


def described(kind: str, count: int, sides: Sequence[int] = (), slices: int = 1) -> Topology:
    """Returns the topology of devices that are there, by what JAX says of them.

    Args:
      kind: `jax.Device.device_kind`, of the table.
      count: devices.
      sides: of a TPU slice, in chips.
      slices: of TPUs.

    Raises:
      UserError: the kind is not in the table, or the chips do not fill the sides.
    """
    if kind not in CHIPS:
        raise UserError(f"nothing is known of the links of a {kind!r}; there are {', '.join(_FAMILIES)}")
    chip = CHIPS[kind]
    family = next((name for name, known in _FAMILIES.items() if CHIPS.get(known) == chip), "")
    if not chip.torus:
        return switched(f"{family or kind}:{count}", kind, chip, count)
    used = tuple(sides[: chip.torus])
    found = topology(f"{family}:{'x'.join(map(str, used))}" + (f"x{slices}slices" if slices > 1 else ""))
    if found.num_devices != count:
        raise UserError(f"{count} devices do not fill the {found.num_devices} of {found.name}")
    return found


def switched(name: str, kind: str, chip: Chip, count: int) -> Topology:
    """Returns so many devices behind one switch."""
    rings = tuple(Ring(prime, chip.link_bandwidth) for prime in _primes(count))
    return Topology(name, kind, chip, rings or (Ring(1, chip.link_bandwidth),))


def _primes(number: int) -> Iterator[int]:
    """Yields a number's prime factors, in order."""
    factor = 2
    while number > 1:
        while number % factor == 0:
            yield factor
            number //= factor
        factor = factor + 1 if factor * factor <= number else number
