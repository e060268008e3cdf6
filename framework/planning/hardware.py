"""Peak performance and memory of the devices there are: published figures of accelerators, measured ones for others."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from meshway.framework.partitioning.mesh import free_memory
from meshway.framework.planning.topology import CHIPS, Chip, Topology, described, switched


def memory_of(device: jax.Device) -> int | None:
    """Returns the bytes of a device's memory; None if unknown, as for a CPU."""
    if chip := CHIPS.get(device.device_kind):
        return chip.memory_bytes
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


# A machine's figures as a plan for its simulated devices takes them, each an equal share: none of them is measured, so
# that one machine plans alike each time. What they send is copied in memory.
_MACHINE = {"bfloat16": 1e11, "float32": 1e11, "memory_bandwidth": 2e10, "link_bandwidth": 1e10}


def topology_of(devices: Sequence[jax.Device]) -> Topology:
    """Returns the topology of the devices that a program has, of one kind.

    TPUs tell where they are in their torus; GPUs are counted as joined by one switch; simulated devices share this
    machine: its free memory, and round figures for the rest.

    Raises:
      UserError: nothing is known of devices of this kind, or they are a part of a slice that is no box.
    """
    first, count = devices[0], len(devices)
    if first.platform == "cpu":
        shares: dict[str, Any] = {name: figure / count for name, figure in _MACHINE.items()}
        memory = (free_memory(first) or 0) * len(jax.local_devices(backend="cpu")) // count
        chip = Chip(**shares, memory_bytes=memory, torus=0, source="round figures of one machine")
        return switched(f"cpu:{count}", "cpu", chip, count)
    places = [getattr(each, "coords", ()) for each in devices]
    sides = [max(along) - min(along) + 1 for along in zip(*places, strict=True)]
    slices = {getattr(each, "slice_index", 0) for each in devices}
    return described(first.device_kind, count, sides, len(slices))


def peak_flops(devices: Sequence[jax.Device], dtype: Any) -> tuple[float, str]:
    """Returns (peak matmul FLOP/s of all `devices` together, where the figure comes from).

    Known accelerators are looked up; CPUs and unknown accelerators are measured, which takes about half a
    second. CPU devices share their machine, so their peak is this machine's for any number of devices; with
    processes on several CPU machines it is still that of this one.

    Args:
      devices: those the computation runs on, of one kind; they may belong to other processes.
      dtype: of matmuls. Types narrower than bfloat16 are compared with bfloat16's peak.

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
        # XLA's bfloat16 is slower than float32 on some CPUs: the faster one is the machine's peak.
        tried = ["float32"] if name == "float32" else ["float32", "bfloat16"]
        peak, best = max((measure_matmul_peak(dtype, 0.5 / len(tried)), dtype) for dtype in tried)
        return peak, f"measured: this machine's best {best} matmul"
    peak = measure_matmul_peak(name) * len(devices)
    return peak, f"measured: the best {name} matmul of one {kind} (not in the table) x {len(devices)}"


def measure_matmul_peak(dtype: Any = "float32", seconds: float = 0.5) -> float:
    """Returns the FLOP/s of the best of several square matmuls on this process's first device.

    Sizes double from 512 to 2,048 (8,192 on accelerators) while the next should fit into the wall-clock budget
    `seconds`, without compilation.
    """
    device = jax.local_devices()[0]
    largest = 2048 if device.platform == "cpu" else 8192
    # A mesh of this one device: under the caller's mesh JAX refuses a computation on one device.
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
      bytes: read by one pass, on all devices together.
      ways: names of the programs that read it; the fastest, which depends on platform and compiler, is the peak.
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
        sharded, replicated = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ([mesh.axis_names], []))
        with jax.set_mesh(mesh):
            self._array = jax.jit(lambda: jnp.ones((devices, rows, _WIDTH)), out_shardings=sharded)()
            self._vector = jax.jit(lambda: jnp.ones(_WIDTH), out_shardings=replicated)()
            programs = (lambda x, _: jnp.sum(x, axis=-1), lambda x, vector: x @ vector)
            self._read = {
                way: jax.jit(program, out_shardings=sharded).lower(self._array, self._vector).compile()
                for way, program in zip(self.ways, programs, strict=True)
            }
        self.bytes = self._array.nbytes

    def once(self, way: str) -> jax.Array:
        """Starts reading everything once; returns the sum of each row, [devices, rows], which may not be ready yet."""
        return self._read[way](self._array, self._vector)


def last_level_cache() -> int:
    """Returns the bytes of the processor's largest cache, 64 MiB if the system does not tell (other than Linux)."""
    sizes = [path.read_text().strip() for path in _CACHES.glob("index*/size")]
    return max((_UNITS[size[-1]] * int(size[:-1]) for size in sizes if size[-1:] in _UNITS), default=_UNKNOWN_CACHE)
