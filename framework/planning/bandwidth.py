"""How fast memory is read: the floor under a step of decoding, which reads all weights for one token a row."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
