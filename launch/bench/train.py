"""meshway bench train: the train step of a recipe on synthetic data, beside the machine's own matmul peak.

    meshway bench train --gin_file=recipes/bench_t5.gin
    meshway bench train --interleave --gin_file=...    # burst by burst beside other programs, over a pipe

Nothing is read from a data set, and TensorFlow is not imported.
"""

import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from meshway.framework.distributed import processes
from meshway.framework.planning.hardware import peak_flops
from meshway.framework.telemetry.timeline import process_began
from meshway.framework.terminal import format_columns
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import TrainState
from meshway.launch.bench.rounds import peak_dtype, peak_mib, seconds_of, speak_in_bursts

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation


class TrainBench:
    """One compiled train step and a batch it is run on again and again."""

    def __init__(self, program: TrainProgram):
        begin = time.perf_counter()
        self._step = program.compile_step()
        self.compile_seconds = time.perf_counter() - begin
        self._state: TrainState = program.init()
        self._batch = program.shard_batch(program.synthetic_batch())
        self.program = program

    def once(self) -> float:
        """Runs one step to its end and returns its seconds."""
        return seconds_of(self._pass)

    def _pass(self) -> object:
        self._state, metrics = self._step(self._state, self._batch)
        return self._state, metrics

    @property
    def tokens(self) -> int:
        """Tokens of a batch, of all sides."""
        return sum(x.size for name, x in self._batch.items() if name.endswith("input_tokens"))


def measure(program: TrainProgram, steps: int = 10, rounds: int = 5, interleave: bool = False) -> None:
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
        "first_step_done_s": round(time.time() - process_began(), 2),
        "compile_s": round(bench.compile_seconds, 2),
        "first_ms": round(first * 1e3, 1),
        "tokens": bench.tokens,
        "params": program.num_params,
        "flops": program.flops,
        "tensorflow_imported": "tensorflow" in sys.modules,
    }
    bench.once()
    if interleave:
        speak_in_bursts(lambda: [bench.once() for _ in range(steps)], info)
        return
    devices = program.partitioner.mesh.devices.flatten().tolist()
    times, peaks, source = [], [], ""
    for _ in range(rounds):
        peak, source = peak_flops(devices, peak_dtype(devices[0].platform))
        peaks.append(peak)
        times.append(statistics.median(bench.once() for _ in range(steps)))
    print(_table(info, statistics.median(times), min(times), statistics.median(peaks), source))


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
        "peak memory of the process": f"{peak_mib():,.0f} MiB",
        "TensorFlow imported": "yes" if info["tensorflow_imported"] else "no",
    }
    return "\n".join(format_columns(lines.items()))


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench train`."""
    from meshway.launch.recipe import config

    with processes.joined(*invocation.processes):
        measure(**config.load(invocation, import_unreferenced=False).build("bench.train.measure"))
