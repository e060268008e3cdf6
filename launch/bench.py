"""meshway bench train: the train step of a recipe on synthetic data, beside the machine's own matmul peak.

    meshway bench train --gin_file=recipes/bench_t5.gin
    meshway bench train --interleave --gin_file=...    # burst by burst beside other programs, over a pipe

Nothing is read from a data set, and TensorFlow is not imported.

meshway bench data: how fast a recipe's examples become batches, stage by stage, beside seqio doing the same work.

    meshway bench data --gin_file=recipes/quickstart.gin
    meshway bench data --batches=100000 --gin_file=...    # and how much memory that takes
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework import distributed
from meshway.framework.errors import UserError
from meshway.framework.planning.hardware import peak_flops
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.state import TrainState

if TYPE_CHECKING:
    from meshway.framework.data.grain_loader import CachedData
    from meshway.launch.config import Invocation


class TrainBench:
    """One compiled train step and a batch it is run on again and again."""

    def __init__(self, program: TrainProgram):
        begin = time.perf_counter()
        self._step = program.compile_step()
        self.compile_seconds = time.perf_counter() - begin
        self._state: TrainState = program.init()
        self._batch = program.put(program.synthetic_batch())
        self.program = program

    def once(self) -> float:
        """Runs one step to its end and returns its seconds."""
        begin = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - begin

    @property
    def tokens(self) -> int:
        """Tokens of a batch, of all sides."""
        return sum(x.size for name, x in self._batch.items() if name.endswith("input_tokens"))


def train(program: TrainProgram, steps: int = 10, rounds: int = 5, interleave: bool = False) -> None:
    """Times the step and prints what it found.

    Args:
      program: what to time.
      steps: steps a round; a round's figure is their median.
      rounds: rounds, each beside a fresh measurement of the matmul peak.
      interleave: speak the burst protocol on standard input and output instead.
    """
    bench = TrainBench(program)
    first = bench.once()
    info = {
        "first_step_done_s": round(_seconds_since_start(), 2),
        "compile_s": round(bench.compile_seconds, 2),
        "first_ms": round(first * 1e3, 1),
        "tokens": bench.tokens,
        "params": program.num_params,
        "flops": program.flops,
        "tensorflow_imported": "tensorflow" in sys.modules,
    }
    bench.once()
    if interleave:
        _serve(lambda: [bench.once() for _ in range(steps)], info)
        return
    devices = program.partitioner.mesh.devices.flatten().tolist()
    times, peaks, source = [], [], ""
    for _ in range(rounds):
        peak, source = peak_flops(devices, "float32" if devices[0].platform == "cpu" else "bfloat16")
        peaks.append(peak)
        times.append(statistics.median(bench.once() for _ in range(steps)))
    print(_table(info, statistics.median(times), min(times), statistics.median(peaks), source))


def data(
    data: Callable[..., "CachedData"],
    seconds: float = 45,
    batches: int | None = None,
    workers: int | None = None,
    as_json: bool = False,
    imported: Sequence[str] = (),
) -> dict[str, Any]:
    """Times what becomes of a recipe's examples and prints what it found.

    Args:
      data: the recipe's `CachedData`, called with other arguments than the recipe's.
      seconds: for all that is timed in turn. Starting it and building a cache come on top, and `batches` where that
        is given.
      batches: over how many batches memory is watched; None for as many as fit the time.
      workers: the loader is timed with 1, 2, ... so many processes; None for one a core, 4 at most.
      as_json: print everything as JSON too, on one line that begins with RESULT.
      imported: more modules, that a recipe imports only for what they register.

    Returns:
      what was printed, as JSON holds it.

    Raises:
      UserError: an argument is out of range, or the recipe's data cannot be read.
    """
    from meshway.launch import bench_data  # `bench train` starts without it

    for name, value, least in (("seconds", seconds, 1), ("batches", batches, 1), ("workers", workers, 0)):
        if value is not None and value < least:
            raise UserError(f"bench.data.{name} must be at least {least}, not {value}")
    found = bench_data.measure(data, seconds, batches, workers, imported)
    print(bench_data.format_table(found))
    if as_json:
        _say("RESULT", found)
    return found


def _table(info: dict[str, Any], seconds: float, best: float, peak: float, source: str) -> str:
    achieved = info["flops"] / seconds
    lines = {
        "parameters": f"{info['params']:,}",
        "model FLOPs per step": f"{info['flops'] / 1e9:,.1f} G",
        "step, median (best)": f"{seconds * 1e3:,.1f} ms ({best * 1e3:,.1f} ms)",
        "tokens/s": f"{info['tokens'] / seconds:,.0f}",
        "model FLOP/s": f"{achieved / 1e9:,.1f} G",
        "matmul peak": f"{peak / 1e9:,.1f} GFLOP/s ({source})",
        "share of the peak": f"{100 * achieved / peak:.1f} %",
        "compile": f"{info['compile_s']} s",
        "command to first finished step": f"{info['first_step_done_s']} s",
        "peak memory of the process": f"{_peak_mib():,.0f} MiB",
        "TensorFlow imported": "yes" if info["tensorflow_imported"] else "no",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


def _serve(burst: Callable[[], list[float]], info: dict[str, Any]) -> None:
    """READY {json} once, then BURST {json} for each line read: a driver runs programs in turn this way."""
    _say("READY", info | {"first_done_s": info["first_step_done_s"], "peak_rss_mib": round(_peak_mib())})
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        begin = time.process_time()
        seconds = burst()
        _say("BURST", {"wall": seconds, "cpu": (time.process_time() - begin) / len(seconds)})


def _say(tag: str, content: dict[str, Any]) -> None:
    print(f"\n{tag} {json.dumps(content)}", flush=True)


def _seconds_since_start() -> float:
    """Seconds since the kernel started this process (Linux); elsewhere since this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _IMPORTED
    return uptime - ticks / os.sysconf("SC_CLK_TCK")


def _peak_mib() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (1 << 20 if sys.platform == "darwin" else 1 << 10)


_IMPORTED = time.perf_counter()


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch import config

    if invocation.subject == "data":
        recipe = config.load(invocation)
        data(**recipe.build("bench.data"), imported=recipe.unreferenced)
        return
    distributed.start(*invocation.processes)
    train(**config.load(invocation, import_unreferenced=False).build("bench.train"))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["bench", *sys.argv[1:]]))
