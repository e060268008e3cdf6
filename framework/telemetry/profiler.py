"""Measurements of programs and devices: a profile of a few steps, the number of compilations, device memory."""

import os
from collections.abc import Sequence
from typing import Any

import jax

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.terminal import format_bytes

_COMPILED = (
    "/jax/core/compile/backend_compile_duration"  # emitted for each program, also if it is in the persistent cache
)
_READ = "/jax/compilation_cache/cache_hits"
_PREFIX = "device_"
_COUNTED = ("bytes_in_use", "peak_bytes_in_use", "bytes_limit")


class Profile:
    """Captures a `jax.profiler` trace of steps `start_step + 1` to `start_step + num_steps` of a run.

    Open the folder with XProf or TensorBoard's profile plugin, or the `.trace.json.gz` in Perfetto. Trace only a
    few steps, after the first ones, which compile. A run that resumes after `start_step` captures nothing.
    """

    def __init__(self, model_dir: str | os.PathLike[str], start_step: int = 10, num_steps: int = 3) -> None:
        """Prepares a trace into `model_dir`/profile. Raises UserError for steps below 1."""
        if start_step < 1 or num_steps < 1:
            raise UserError(f"Profile: start_step and num_steps must be at least 1, got {start_step}, {num_steps}")
        self._folder = local_path(os.fspath(model_dir)) / "profile"
        self._start_step, self._num_steps = start_step, num_steps
        self._tracing = False

    def after_step(self, step: int) -> None:
        """Call when `step` has been dispatched: starts or stops the trace, after waiting for the devices."""
        if step == self._start_step:
            _wait_for_devices()
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        elif step >= self._start_step + self._num_steps:
            self.close()

    def close(self) -> None:
        """Stops a trace that is still running."""
        if self._tracing:
            _wait_for_devices()
            jax.profiler.stop_trace()
            self._tracing = False


def _wait_for_devices() -> None:
    # Steps are dispatched ahead of the devices: the newest of all live arrays are the last step's results.
    jax.block_until_ready(jax.live_arrays())


class Compilations:
    """Counts programs that this process compiles, in any thread, inside a `with` block.

    Attributes:
      count: programs compiled so far, or read from the persistent cache.
      read: those that were read.
    """

    def __init__(self) -> None:
        self.count = self.read = 0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event == _COMPILED

    def _on_event(self, event: str, **_: Any) -> None:
        self.read += event == _READ


def memory_in_use(devices: Sequence[Any]) -> dict[str, float]:
    """Returns `device_bytes_in_use`, `device_peak_bytes_in_use` and `device_bytes_limit` of the device with the highest
    peak. What the backend does not report is left out: on CPUs, everything.

    Args:
      devices: `jax.Device`s of this process, or objects with their `memory_stats`.
    """
    found = [stats for stats in map(_stats, devices) if stats]
    fullest = max(found, key=lambda stats: stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)), default={})
    return {f"{_PREFIX}{name}": float(fullest[name]) for name in _COUNTED if name in fullest}


def planned(compiled: Any) -> str:
    """Returns XLA's memory analysis of a compiled step, for each device, in words; '' if the backend has none."""
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
    """Returns those of `_COUNTED` that a device's backend reports."""
    try:
        stats = device.memory_stats() or {}
    except (AttributeError, NotImplementedError, RuntimeError):
        return {}
    return {name: stats[name] for name in _COUNTED if type(stats.get(name)) is int and stats[name] >= 0}
