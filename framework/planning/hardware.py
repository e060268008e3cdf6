"""What accelerators can do at best: published peaks and memory, measured ones for the rest."""

import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshway.framework.errors import UserError

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of what JAX calls one device.

    Attributes:
      bfloat16: dense matmul peak in FLOP/s, inputs in bfloat16 (vendors' "with sparsity" figures are halved).
      float32: the same for float32 inputs at JAX's default precision: TPUs make one bfloat16 pass, NVIDIA
        GPUs use TensorFloat-32.
      memory_bytes: device memory; a running program sees a little less.
      source: where the figures come from.
    """

    bfloat16: float
    float32: float
    memory_bytes: int
    source: str


def _tpu(tflops: float, gib: int, page: str) -> Chip:
    return Chip(tflops * 1e12, tflops * 1e12, gib * _GIB, f"Google Cloud TPU documentation, {page}")


def _gpu(tflops: float, gigabytes: int, sheet: str) -> Chip:
    return Chip(tflops * 1e12, tflops / 2 * 1e12, gigabytes * 10**9, f"NVIDIA {sheet} data sheet, dense")


# By `jax.Device.device_kind`. The two cores of a TPU v4 or v5p act as one device; those
# of a TPU7x are two, so its figures are half a chip's.
CHIPS: dict[str, Chip] = {
    "TPU v4": _tpu(275, 32, "v4"),
    "TPU v5 lite": _tpu(197, 16, "v5e"),
    "TPU v5e": _tpu(197, 16, "v5e"),
    "TPU v5": _tpu(459, 95, "v5p"),
    "TPU v5p": _tpu(459, 95, "v5p"),
    "TPU v6 lite": _tpu(918, 32, "v6e"),
    "TPU v6e": _tpu(918, 32, "v6e"),
    "TPU7x": _tpu(2307 / 2, 96, "TPU7x, half a chip"),
    "NVIDIA A100-SXM4-40GB": _gpu(312, 40, "A100"),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 80, "A100"),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 40, "A100"),
    "NVIDIA A100 80GB PCIe": _gpu(312, 80, "A100"),
    "NVIDIA H100 80GB HBM3": _gpu(989.4, 80, "H100 SXM"),
    "NVIDIA H100 PCIe": _gpu(756, 80, "H100 PCIe"),
    "NVIDIA H100 NVL": _gpu(835, 94, "H100 NVL"),
    "NVIDIA H200": _gpu(989.4, 141, "H200 SXM"),
    "NVIDIA H200 NVL": _gpu(835, 141, "H200 NVL"),
    "NVIDIA B200": _gpu(2250, 180, "HGX B200"),
}


def chip_named(name: str) -> tuple[str, Chip]:
    """Returns (kind, figures) of the accelerator that people call `name`: a device's kind, or a part of just one.

    Raises:
      UserError: it is no part of a known one's, or of several.
    """
    wanted = name.lower().strip()
    parts = [kind for kind in CHIPS if wanted and wanted in kind.lower()]
    exact = [kind for kind in parts if wanted == kind.lower() or kind.lower().endswith(f" {wanted}")]
    found = exact or parts
    if len(found) != 1:
        listed = found or list(CHIPS)
        raise UserError(f"no accelerator is called {name!r}{' alone' if found else ''}; there are {', '.join(listed)}")
    return found[0], CHIPS[found[0]]


def memory_of(device: jax.Device) -> int | None:
    """Returns the bytes of a device's memory; None where nothing tells, as of a CPU."""
    if chip := CHIPS.get(device.device_kind):
        return chip.memory_bytes
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def free_memory(device: jax.Device) -> int | None:
    """Returns the bytes that a device has for more than it holds; of a CPU its share of what the machine has free; None
    where nothing tells."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 // len(jax.local_devices(backend="cpu")) if found else None


def peak_flops(devices: Sequence[jax.Device], dtype: Any) -> tuple[float, str]:
    """Returns (peak matmul FLOP/s of all `devices` together, where the figure comes from).

    Known accelerators are looked up; CPUs and unknown accelerators are measured, which takes about half a
    second. CPU devices share their machine, so their peak is this machine's whatever their number; with
    processes on several CPU machines it is still that of this one.

    Args:
      devices: what the computation runs on, of one kind; they may belong to other processes.
      dtype: what matmuls compute in. Types narrower than bfloat16 are held against bfloat16's peak.

    Raises:
      ValueError: no device, or devices of several kinds.
    """
    kinds = {device.device_kind for device in devices}
    if len(kinds) != 1:
        raise ValueError(f"peak_flops: wants devices of one kind, got {sorted(kinds)}")
    kind = kinds.pop()
    name = "float32" if jnp.dtype(dtype).itemsize >= 4 else "bfloat16"
    if chip := CHIPS.get(kind):
        return getattr(chip, name) * len(devices), f"{len(devices)} x {kind}, {name}: {chip.source}"
    if devices[0].platform == "cpu":
        # XLA's bfloat16 is slower than float32 on some CPUs: the better one is what the machine can do.
        tried = ["float32"] if name == "float32" else ["float32", "bfloat16"]
        peak, best = max((measure_matmul_peak(dtype, 0.5 / len(tried)), dtype) for dtype in tried)
        return peak, f"measured: this machine's best {best} matmul"
    peak = measure_matmul_peak(name) * len(devices)
    return peak, f"measured: the best {name} matmul of one {kind} (not in the table) x {len(devices)}"


def measure_matmul_peak(dtype: Any = "float32", seconds: float = 0.5) -> float:
    """Returns the FLOP/s of the best of several square matmuls on this process's first device.

    Sizes double from 512 to 2,048 (to 8,192 on accelerators) while the next should fit into `seconds`,
    the wall-clock budget; what compilation takes beyond it comes on top.
    """
    device = jax.local_devices()[0]
    largest = 2048 if device.platform == "cpu" else 8192
    # A mesh of this one device, since under the caller's mesh JAX refuses a computation on one device.
    with jax.set_mesh(Mesh([device], ("device",), axis_types=(AxisType.Auto,))):
        return _best_matmul(dtype, largest, seconds)


def _best_matmul(dtype: Any, largest: int, seconds: float) -> float:
    multiply = jax.jit(jnp.matmul)
    deadline = time.perf_counter() + seconds
    best, size = 0.0, 512
    while True:
        matrix = jnp.full((size, size), 0.5, dtype)
        jax.block_until_ready(multiply(matrix, matrix))
        elapsed = min(_time(multiply, matrix) for _ in range(3))
        best = max(best, 2.0 * size**3 / elapsed)
        fits = 4 * 8 * elapsed < deadline - time.perf_counter()  # a warm-up and three runs, 8 x the work each
        if size == largest or not fits:
            break
        size *= 2
    while time.perf_counter() + elapsed < deadline:
        best = max(best, 2.0 * size**3 / _time(multiply, matrix))
    return best


def _time(multiply: Any, matrix: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(multiply(matrix, matrix))
    return time.perf_counter() - start


_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20}
_UNKNOWN_CACHE = 64 * 2**20
_WIDTH = 4096


class StreamingRead:
    """An array on each device of a mesh, too large for its caches, that is read from end to end.

    Attributes:
      bytes: what one pass reads, on all devices together.
      ways: names of the programs that read it; which is the fastest depends on platform and compiler, and it counts.
    """

    ways = ("sum", "product")

    def __init__(self, mesh: Mesh, device_bytes: int | None = None):
        """`device_bytes` is what each device reads; None for 4 times the last-level cache of a CPU (shared by its
        devices), and 1 GiB on accelerators."""
        devices = mesh.devices.size
        if device_bytes is None:
            on_cpu = mesh.devices.flat[0].platform == "cpu"
            device_bytes = -(-4 * last_level_cache() // devices) if on_cpu else 2**30
        rows = max(1, device_bytes // (4 * _WIDTH))
        where, whole = (NamedSharding(mesh, PartitionSpec(*cut)) for cut in ([mesh.axis_names], []))
        with jax.set_mesh(mesh):
            self._array = jax.jit(lambda: jnp.ones((devices, rows, _WIDTH)), out_shardings=where)()
            self._vector = jax.jit(lambda: jnp.ones(_WIDTH), out_shardings=whole)()
            programs = (lambda x, _: jnp.sum(x, axis=-1), lambda x, vector: x @ vector)
            self._read = {
                way: jax.jit(program, out_shardings=where).lower(self._array, self._vector).compile()
                for way, program in zip(self.ways, programs, strict=True)
            }
        self.bytes = self._array.nbytes

    def once(self, way: str) -> jax.Array:
        """Reads everything once and returns the sum of each row, [devices, rows], not waited for."""
        return self._read[way](self._array, self._vector)


def last_level_cache() -> int:
    """Returns the bytes of the processor's largest cache, 64 MiB where the system does not say (it is no Linux)."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((_UNITS[size[-1]] * int(size[:-1]) for size in sizes if size[-1:] in _UNITS), default=_UNKNOWN_CACHE)
