"""What benchmarks share: passes timed in turn, so that other load on the machine affects all alike, in this process or
beside other programs; the memory of this process; the text of a mesh."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from meshway.framework.errors import UserError

STATUS = Path("/proc/self/status")  # on Linux only

Key = TypeVar("Key", bound=Hashable)


def require_at_least(least: int, where: str, **numbers: float | None) -> None:
    """Checks numbers of a recipe, say `require_at_least(1, "bench.moe.measure", steps=steps, rounds=rounds)`.

    Raises:
      UserError: a number is less than that. None, which leaves the number open, is accepted.
    """
    for name, value in numbers.items():
        if value is not None and value < least:
            raise UserError(f"{where}.{name} must be at least {least}, not {value}")


def time_in_turn(passes: Mapping[Key, Callable[[], object]], steps: int, rounds: int) -> dict[Key, float]:
    """Runs each pass once untimed, then times all of them in turn.

    Args:
      passes: what runs a pass and returns its arrays, which are waited for.
      steps: passes of a turn, whose median counts.
      rounds: turns of each.

    Returns:
      seconds of a pass, the median of its turns, by the keys and in the order of `passes`.
    """
    for once in passes.values():
        jax.block_until_ready(once())
    turns: dict[Key, list[float]] = {key: [] for key in passes}
    for _ in range(rounds):
        for key, once in passes.items():
            turns[key].append(statistics.median(seconds_of(once) for _ in range(steps)))
    return {key: statistics.median(seconds) for key, seconds in turns.items()}


def seconds_of(once: Callable[[], object]) -> float:
    """Returns the seconds that one pass takes, until its arrays are computed."""
    begin = time.perf_counter()
    jax.block_until_ready(once())
    return time.perf_counter() - begin


def speak_in_bursts(burst: Callable[[], list[float]], info: Mapping[str, Any]) -> None:
    """Lets a driver run this program in turn with others: prints `READY {json}` once, then `BURST {json}` for each line
    read from standard input, until it ends or a line is `quit`.

    Args:
      burst: runs some passes to their end; returns the seconds of each.
      info: what READY says; `first_step_done_s`, the seconds from the command to the first finished pass, is in it.

    A BURST has `wall`, seconds of each pass, and `cpu`, the mean seconds of processor time of one.
    """
    _say("READY", {**info, "first_done_s": info["first_step_done_s"], "peak_rss_mib": round(peak_mib())})
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        begin = time.process_time()
        seconds = burst()
        _say("BURST", {"wall": seconds, "cpu": (time.process_time() - begin) / len(seconds)})


def _say(tag: str, content: Mapping[str, Any]) -> None:
    print(f"\n{tag} {json.dumps(content)}", flush=True)


def peak_dtype(platform: str) -> str:
    """Returns the dtype of the matmul peak that a device is compared with: bfloat16 on accelerators, by convention."""
    return "float32" if platform == "cpu" else "bfloat16"


def format_mesh(mesh: Mapping[str, int]) -> str:
    """Returns a mesh's axes and sizes as text: `data=2 x model=4`."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.items())


def resident_mib(most: bool = False) -> float:
    """Returns the resident memory of this process in MiB, as Linux tells it: now, or the `most` so far, not counting
    what it was started from; 0 on other systems."""
    name, lines = "VmHWM:" if most else "VmRSS:", STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def peak_mib() -> float:
    """Returns the most memory that this process has had resident, in MiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (1 << 20 if sys.platform == "darwin" else 1 << 10)
