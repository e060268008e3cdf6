"""How much of its devices' memory a run uses: what their backend counts, and what XLA plans for one step."""

from collections.abc import Sequence
from typing import Any

from meshway.framework.partitioning.explain import format_bytes

_PREFIX = "device_"
_COUNTED = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")


def memory_in_use(devices: Sequence[Any]) -> dict[str, float]:
    """Returns what the backend counts of this process's devices, in bytes: for each of `device_bytes_in_use`,
    `device_peak_bytes_in_use` and `device_bytes_limit` that of the device with the highest peak. What is not counted
    is left out: all of it for CPUs.

    Args:
      devices: of this process; `jax.Device`s, or what has their `memory_stats`.
    """
    found = [stats for stats in map(_stats, devices) if stats]
    fullest = max(found, key=lambda stats: stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)), default={})
    return {f"{_PREFIX}{name}": float(fullest[name]) for name in _COUNTED if name in fullest}


def planned(compiled: Any) -> str:
    """Returns what XLA plans that a compiled step needs of each device, in words; '' where it does not say."""
    try:
        memory = compiled.memory_analysis()
        kept, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    except (AttributeError, NotImplementedError, RuntimeError):  # XLA's own errors are RuntimeErrors
        return ""
    return (
        f"by XLA's plan the step needs {format_bytes(kept + made + temporary)} of each device: state and batch "
        f"{format_bytes(kept)}, results beside them {format_bytes(made)}, temporary {format_bytes(temporary)}"
    )


def _stats(device: Any) -> dict[str, int]:
    """Returns those of `_COUNTED` that a device's backend counts."""
    try:
        stats = device.memory_stats() or {}
    except (AttributeError, NotImplementedError, RuntimeError):
        return {}
    return {name: stats[name] for name in _COUNTED if type(stats.get(name)) is int and stats[name] >= 0}
