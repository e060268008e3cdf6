"""meshway bench train: the train step of a recipe on synthetic data, beside the machine's own matmul peak.

    meshway bench train --gin_file=recipes/bench_t5.gin
    meshway bench train --interleave --gin_file=...    # burst by burst beside other programs, over a pipe

Nothing is read from a data set, and TensorFlow is not imported.

meshway bench data: how fast a recipe's examples become batches, stage by stage, beside seqio doing the same work.

    meshway bench data --gin_file=recipes/quickstart.gin
    meshway bench data --batches=100000 --gin_file=...    # and how much memory that takes

meshway bench parallel: what layouts make devices send in a step; see `bench_parallel`.
meshway bench routing: accuracy where experts have little room, by who gets it; see `bench_routing`.

meshway bench moe: the forms of dispatch of a mixture of experts, in turn; see `bench_moe`.
meshway bench attention: kernels of attention at several lengths, in turn; see `bench_attention`.
meshway bench decode: what a token costs, beside how fast memory is read; see `bench_decode`.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.distributed import processes
from meshway.framework.planning.hardware import peak_flops
from meshway.framework.telemetry.timeline import process_began
from meshway.framework.terminal import format_columns
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import TrainState
from meshway.launch.rounds import require_at_least

if TYPE_CHECKING:
    from meshway.framework.data.grain_loader import CachedData
    from meshway.framework.data.source import DataSource
    from meshway.framework.partitioning.partitioner import Layout
    from meshway.framework.partitioning.sharded_model import ShardedModel
    from meshway.launch.bench_attention import Forms as KernelForms
    from meshway.launch.bench_attention import Result as KernelResult
    from meshway.launch.bench_decode import Found as DecodingFound
    from meshway.launch.bench_moe import Forms
    from meshway.launch.bench_moe import Result as FormResult
    from meshway.launch.bench_parallel import Result
    from meshway.launch.bench_routing import Routing
    from meshway.launch.recipe.config import Invocation


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
      imported: modules that the recipe itself imports, which may register tasks.

    Returns:
      what was printed, as JSON holds it.

    Raises:
      UserError: an argument is out of range, or the recipe's data cannot be read.
    """
    from meshway.launch import bench_data  # `bench train` starts without it

    require_at_least(1, "bench.data", seconds=seconds, batches=batches)
    require_at_least(0, "bench.data", workers=workers)
    found = bench_data.measure(data, seconds, batches, workers, imported)
    print(bench_data.format_table(found))
    if as_json:
        _say("RESULT", found)
    return found


def parallel(program: TrainProgram, layouts: str = "", steps: int = 0) -> "Result":
    """Compares what one layout sends with its closed forms; `bench_parallel.run` calls it for each.

    Args:
      program: the recipe under one layout.
      layouts: names or files of layouts, with commas between; "" for all shipped ones.
      steps: how many steps to time after a first one; 0 runs none.
    """
    from meshway.launch import bench_parallel

    return bench_parallel.measure(program, steps)


def routing(program: TrainProgram, data: "DataSource", steps: int, **options: Any) -> "Routing":
    """Returns what a recipe says of comparing who gets the experts' room; see `bench_routing.Routing`."""
    from meshway.launch.bench_routing import Routing

    return Routing(program, data, steps, **options)


def moe(
    forms: "Forms",
    layout: "Layout",
    batch_size: int = 8,
    length: int = 512,
    steps: int = 3,
    rounds: int = 7,
    dtype: str = "float32",
) -> list["FormResult"]:
    """Times a mixture of experts in each form of dispatch, forward and backward, and prints what it found.

    Args:
      forms: the layer of the recipe in each of its forms.
      layout: of the mesh it is timed on.
      batch_size, length: rows and tokens of each.
      steps: passes a turn, whose median counts; `rounds` turns for each form, one after the other.
      dtype: of activations.

    Returns:
      what was found of each form, in their order.

    Raises:
      UserError, ValueError: a number is out of range, or the layer does not fit the layout.
    """
    from meshway.launch import bench_moe

    results, mesh = bench_moe.measure(forms, layout, batch_size, length, steps, rounds, dtype)
    print(bench_moe.format_table(results, batch_size * length, mesh))
    return results


def attention(
    forms: "KernelForms",
    layout: "Layout",
    batch_size: int = 1,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384),
    steps: int = 1,
    rounds: int = 5,
    dtype: str = "float32",
    backward: bool = True,
    most_bytes: int = 4 * 2**30,
) -> list["KernelResult"]:
    """Times one attention by each of several kernels and prints what it found.

    Args:
      forms: the kernels, and what they compute.
      layout: of the mesh they are timed on.
      batch_size, lengths: rows, and tokens of each, one length after the other.
      steps: passes a turn, whose median counts; `rounds` turns for each kernel, one after the other.
      dtype: of queries, keys and values.
      backward: whether a pass goes forward and backward, not only forward.
      most_bytes: a kernel that needs more temporary memory a device is not run; its memory is printed all the same.

    Returns:
      what was found, by length and kernel.

    Raises:
      UserError, ValueError: a number is out of range, or a kernel refuses the attention or the layout.
    """
    from meshway.launch import bench_attention

    given = batch_size, lengths, steps, rounds, dtype, backward, most_bytes
    results, mesh = bench_attention.measure(forms, layout, *given)
    what = f"{batch_size} x length, {dtype}, forward{' and backward' if backward else ''}"
    print(bench_attention.format_table(results, what, mesh))
    return results


def decode(
    placed: "ShardedModel",
    batch_sizes: Sequence[int] = (1, 8),
    prompt_length: int = 128,
    new_tokens: int = 16,
    rounds: int = 5,
    mixed_batches: int = 8,
    params_dtype: str | None = None,
) -> "DecodingFound":
    """Times decoding of a recipe's model, with random parameters and prompts, and prints what it found.

    Args:
      placed: what decodes, on the mesh it is timed on.
      batch_sizes: rows, one size after the other.
      prompt_length: tokens of each prompt, of the encoder's inputs where there is one; 2 at least.
      new_tokens: what is predicted of each row in a turn.
      rounds: turns of each pass, whose median counts.
      mixed_batches: of the job of mixed lengths that must compile nothing.
      params_dtype: what parameters are kept in ("bfloat16"); None for float32, as in training.

    Returns:
      what was found.

    Raises:
      UserError: a number is out of range, or the model predicts no text or does not fit the layout.
    """
    from meshway.launch import bench_decode

    setting = bench_decode.Setting(batch_sizes, prompt_length, new_tokens, rounds, mixed_batches, params_dtype)
    found = bench_decode.measure(placed, setting)
    print(bench_decode.format_table(found, setting))
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
    return "\n".join(format_columns(lines.items()))


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


def _peak_mib() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config

    if invocation.subject == "data":
        recipe = config.load(invocation)
        data(**recipe.build("bench.data"), imported=recipe.registering)
        return
    if invocation.subject == "parallel":
        from meshway.launch import bench_parallel

        with processes.joined(*invocation.processes):
            bench_parallel.run(invocation, parallel)
        return
    if invocation.subject == "moe":
        with processes.joined(*invocation.processes):
            moe(**config.load(invocation, import_unreferenced=False).build("bench.moe"))
        return
    if invocation.subject == "attention":
        with processes.joined(*invocation.processes):
            attention(**config.load(invocation, import_unreferenced=False).build("bench.attention"))
        return
    if invocation.subject == "decode":
        with processes.joined(*invocation.processes):
            decode(**config.load(invocation, import_unreferenced=False).build("bench.decode"))
        return
    if invocation.subject == "routing":
        from meshway.launch import bench_routing

        bench_routing.run(invocation)
        return
    with processes.joined(*invocation.processes):
        train(**config.load(invocation, import_unreferenced=False).build("bench.train"))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["bench", *sys.argv[1:]]))
