"""meshway bench accelerator: is this machine's accelerator used well, and are its kernels right? In about ten minutes.

    meshway bench accelerator --gin_file=bench_accelerator
    meshway bench accelerator --gin_file=bench_accelerator --small      # everything in small, on any machine

Start-up, compilation and the share of the peak (MFU) of the recipe's training step, in processes of their own; layouts,
kernels of attention and forms of dispatch in bfloat16 beside the reference in float32; steps of decoding beside the
bandwidth of memory. What fails is a row of the table, and the others go on.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.distributed import processes
from meshway.framework.errors import UserError, first_line
from meshway.framework.partitioning.partitioner import Partitioner
from meshway.framework.planning.hardware import peak_flops
from meshway.framework.terminal import format_bytes, format_columns
from meshway.framework.training.program import TrainProgram
from meshway.launch.bench import attention, decode, moe
from meshway.launch.bench.rounds import format_mesh, peak_dtype
from meshway.launch.invocation import Invocation

MFU, BANDWIDTH = 0.6, 0.7  # goals, on an H200
OFF = 0.03  # how far gradients in bfloat16 may be off, as a share of their root mean square; 8 bits, some products
# Families of layouts, each by its smallest model, and the mesh axes that it has.
LAYOUTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "data": ("lm", ("data",)),
    "zero_1": ("lm", ("data",)),
    "fsdp_model": ("lm", ("fsdp", "model")),
    "model_2d": ("lm", ("data", "model")),
    "model_sequence": ("lm", ("data", "model")),
    "ring": ("lm", ("data", "sequence")),
    "ulysses": ("lm", ("data", "sequence")),
    "stage": ("lm", ("data", "stage")),
    "expert": ("mixtral", ("data", "expert")),
    "inference/2d": ("lm", ("x", "y", "z")),
}
SMALL_LAYOUTS = ("ring", "inference/2d")
TINY = ("VOCAB_SIZE=256", "BATCH_SIZE=16", "TASK_FEATURE_LENGTHS={'targets': 128}", "WARMUP_STEPS=10")
KERNELS = {  # of attention, by platform
    "gpu": {"cudnn": "@auto.CudnnAttention()"},
    "tpu": {"splash": "@auto.SplashAttention()"},
    "cpu": {"splash": "@auto.SplashAttention()"},  # interpreted
}
SMALL = {
    "train": ("D_MODEL=64", "D_FF=128", "NUM_HEADS=4", "NUM_KV_HEADS=4", "HEAD_DIM=16", "NUM_LAYERS=1")
    + ("VOCAB_SIZE=256", "BATCH_SIZE=8", "TASK_FEATURE_LENGTHS={'targets': 32}"),
    "attention": ("bench.attention.measure.lengths=(128,)", "bench.attention.measure.rounds=1"),
    "moe": ("D_MODEL=8", "moe.MoeMlp.d_ff=8", "moe.MoeMlp.num_experts=8", "bench.moe.measure.length=16")
    + ("bench.moe.measure.rounds=1", "bench.moe.measure.steps=1"),
    "decode": ("bench.decode.Setting.batch_sizes=(8,)", "bench.decode.Setting.prompt_length=8")
    + ("bench.decode.Setting.new_tokens=2", "bench.decode.Setting.rounds=1", "bench.decode.Setting.mixed_batches=1"),
}
LARGE = {
    "train": (),
    "attention": ("bench.attention.measure.lengths=(2048, 8192)", "bench.attention.measure.steps=5"),
    "moe": ("D_MODEL=1024", "moe.MoeMlp.d_ff=4096", "bench.moe.measure.length=2048"),
    "decode": ("bench.decode.Setting.batch_sizes=(1, 8, 64)", "bench.decode.Setting.prompt_length=512")
    + ("bench.decode.Setting.new_tokens=64", "bench.decode.Setting.params_dtype='bfloat16'"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: what was looked at, what was found, what it ought to be, and whether it is (None: a figure
    without a goal)."""

    what: str
    found: str
    wanted: str = ""
    right: bool | None = None


def measure(invocation: Invocation) -> list[Row]:
    """Runs all parts and prints what they find.

    Args:
      invocation: of the command; its recipe is what is trained and what decodes.

    Returns:
      the table.

    Raises:
      UserError: there is no accelerator, and the small form was not asked for.
    """
    small = invocation.options.small
    platform, kind, count = _devices()
    if platform == "cpu" and not small:
        raise UserError(
            "bench accelerator: jax finds no GPU or TPU on this machine (are jax's plugins installed: pip install "
            "'meshway[cuda]' or 'meshway[tpu]'?); --small runs everything in small on CPU"
        )
    sizes = SMALL if small else LARGE
    # The first two need the whole device: before this process takes it.
    parts: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        ("training", lambda: _training(invocation, sizes["train"], platform)),
        *((f"layout {name}", functools.partial(_layout, name)) for name in (SMALL_LAYOUTS if small else LAYOUTS)),
        ("attention", lambda: _attention(sizes["attention"], platform)),
        ("dispatch", lambda: _dispatch(sizes["moe"])),
        ("decoding", lambda: _decoding(invocation, (*sizes["train"], *sizes["decode"]), small)),
    ]
    rows = [Row("devices", f"{count} x {kind}, jax {jax.__version__}")]
    for name, part in parts:
        print(f"{name} ...", flush=True)
        try:
            rows += part()
        except Exception as error:  # a kernel that a compiler refuses is what this command is to tell
            rows.append(_failed(name, error))
    print(format_rows(rows), flush=True)
    return rows


def format_rows(rows: Sequence[Row]) -> str:
    """Returns the table as text."""
    verdicts = {None: "", True: "ok", False: "NOT MET"}
    cells = [(row.what, row.found, row.wanted, verdicts[row.right]) for row in rows]
    return "\n".join(format_columns([("", "found", "wanted", ""), *cells]))


def _failed(what: str, error: Exception) -> Row:
    print(f"{what} failed: {error}", file=sys.stderr, flush=True)
    return Row(what, f"failed: {type(error).__name__}: {first_line(error)[:80]}", right=False)


def _devices() -> tuple[str, str, int]:
    """Returns the platform, kind and number of devices, as a process of its own sees them: one that trains needs all of
    their memory."""
    code = "import jax, json; d = jax.devices(); print(json.dumps([d[0].platform, d[0].device_kind, len(d)]))"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    platform, kind, count = json.loads(said.splitlines()[-1])
    return platform, kind, count


def _training(invocation: Invocation, sizes: Sequence[str], platform: str) -> Iterator[Row]:
    """Start-up without and with a compilation cache, and the share of the peak."""
    with tempfile.TemporaryDirectory() as cache:
        info, seconds = _timed_step(invocation, sizes, cache, bursts=0)
        yield Row("compile, command to first step", f"{info['compile_s']} s, {info['first_step_done_s']} s")
        info, seconds = _timed_step(invocation, sizes, cache, bursts=3)
        yield Row("with a cache of programs", f"{info['compile_s']} s, {info['first_step_done_s']} s")
    peak, source = peak_flops(jax.devices(), peak_dtype(platform))
    share = info["flops"] / seconds / peak
    yield Row("parameters, tokens a step", f"{info['params']:,}, {info['tokens']:,}")
    yield Row("step", f"{seconds * 1e3:,.1f} ms, {info['tokens'] / seconds:,.0f} tokens/s")
    goal = None if platform == "cpu" else share >= MFU
    yield Row("MFU", f"{100 * share:.1f} % of {peak / 1e12:,.1f} TFLOP/s ({source})", f">= {100 * MFU:.0f} %", goal)


def _timed_step(invocation: Invocation, sizes: Sequence[str], cache: str, bursts: int) -> tuple[dict[str, Any], float]:
    """Runs `meshway bench train --interleave` in a process; returns what it says of itself and the median seconds of a
    step."""
    flags = [f"--gin_file={name}" for name in invocation.gin_files]
    flags += [f"--gin.{binding}" for binding in (*sizes, *invocation.bindings)]
    flags += [f"--gin_search_paths={path}" for path in invocation.search_paths]
    if invocation.simulated_devices:
        flags.append(f"--simulated_devices={invocation.simulated_devices}")
    process = subprocess.Popen(
        [sys.executable, "-m", "meshway.launch.cli", "bench", "train", "--interleave", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
    )
    said, _ = process.communicate("go\n" * bursts + "quit\n")
    if process.returncode:
        raise RuntimeError(f"bench train ended with exit code {process.returncode}, see above")
    told = [line.split(" ", 1) for line in said.splitlines() if line.startswith(("READY ", "BURST "))]
    found = [(tag, json.loads(content)) for tag, content in told]
    times = [second for tag, content in found if tag == "BURST" for second in content["wall"]]
    (info,) = [content for tag, content in found if tag == "READY"]
    return info, statistics.median(times) if times else float("nan")


def _load(subject: str, gin_files: Sequence[str], bindings: Sequence[str]) -> dict[str, Any]:
    from meshway.launch.recipe import config

    asked = Invocation("bench", subject, tuple(gin_files), tuple(bindings))
    built: dict[str, Any] = config.load(asked, import_unreferenced=False).build(f"bench.{subject}.measure")
    return built


def _layout(name: str) -> Iterator[Row]:
    """Steps of a tiny model in bfloat16 under a layout, beside float32 on one device."""
    family, axes = LAYOUTS[name]
    first, *others = axes
    sizes = {first: -1} | dict.fromkeys(others, 1 if jax.device_count() == 1 else 2)
    files = (f"models/{family}/tiny.gin", "optimizers/adamw.gin")
    mesh = (f"LAYOUT={name!r}", f"mesh.MeshShape.ici={sizes}", "DTYPE='bfloat16'")
    single, program = (_load("train", files, (*TINY, *more))["program"] for more in (("LAYOUT='single'",), mesh))
    wanted, found = _steps(single), _steps(program)
    off = float(np.max(np.abs(found - wanted) / wanted))
    shape = format_mesh(program.partitioner.mesh.shape)
    yield Row(f"layout {name}, {shape}", f"losses and gradient norms off by {100 * off:.2f} %", "<= 3 %", off <= OFF)


def _steps(program: TrainProgram) -> np.ndarray:
    """Returns the loss and the gradient's norm of three steps."""
    step, state, found = program.compile_step(), program.init(), []
    for seed in range(3):
        state, metrics = step(state, program.shard_batch(program.synthetic_batch(seed=seed)))
        found += [float(metrics[name][0]) / float(metrics[name][1]) for name in ("loss", "grad_norm")]
    return np.array(found)


def _attention(sizes: Sequence[str], platform: str) -> Iterator[Row]:
    """Gradients of each kernel of attention, and its times."""
    kernels = {"reference": "@reference.dot_product_attention", "chunked": "@chunked.ChunkedAttention()"}
    names = kernels | KERNELS.get(platform, {})
    table = ", ".join(f"{name!r}: {reference}" for name, reference in names.items())
    bound = (f"forms.KernelForms.kernels={{{table}}}", "bench.attention.measure.dtype='bfloat16'", *sizes)
    if platform == "cpu":
        bound = (*bound, "auto.SplashAttention.interpret=True")
    given = _load("attention", ("bench_attention",), bound)
    forms, length = given["forms"], given["lengths"][0]
    partitioner, random = Partitioner(given["layout"]), np.random.default_rng(0)
    operands = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for _, shape in forms.operands(1, length)]
    yield from _compared("attention", forms.names, forms.loss, operands, partitioner)
    for each in attention.measure(**given):
        if each.seconds is not None:
            speed = f"{each.seconds * 1e3:,.2f} ms, {each.flops / each.seconds / 1e12:,.2f} TFLOP/s"
            yield Row(f"attention {each.name}, {each.length:,}", f"{speed}, {format_bytes(each.temporary)} temporary")


def _dispatch(sizes: Sequence[str]) -> Iterator[Row]:
    """The same of each form of dispatch, with slots for all choices."""
    bound = ("moe.MoeMlp.capacity_factor=16.0", "bench.moe.measure.dtype='bfloat16'", *sizes)
    names = "forms.DispatchForms.names=('einsum', 'all_to_all', 'dropless', 'ragged')"
    given = _load("moe", ("bench_moe",), (names, *bound))
    forms, partitioner = given["forms"], Partitioner(given["layout"])
    params = jax.jit(forms.init)(jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, forms.d_model)), jnp.bfloat16)

    def loss(name: str, params: Any, x: jax.Array) -> jax.Array:
        total: jax.Array = forms.loss(name, params, x, None)[0]
        return total

    yield from _compared("dispatch", forms.names, loss, [params, x], partitioner)
    for each in moe.measure(**given):
        yield Row(f"dispatch {each.name}", f"{each.seconds * 1e3:,.2f} ms, {format_bytes(each.temporary)} temporary")


def _compared(
    what: str, names: Sequence[str], loss: Callable[..., jax.Array], operands: list[Any], partitioner: Partitioner
) -> Iterator[Row]:
    """Compares gradients by each form, of operands as they are, with those of the first in float32."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands)

    def gradients(name: str, operands: list[Any]) -> list[np.ndarray]:
        with partitioner.activate():
            found = jax.jit(jax.grad(lambda operands: loss(name, *operands)))(operands)
        return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]

    with jax.default_matmul_precision("highest"):
        wanted = gradients(names[0], wide)
    for name in names:
        try:
            pairs = zip(gradients(name, operands), wanted, strict=True)
            off = max(float(np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))) for x, y in pairs if np.any(y))
            yield Row(f"{what} {name}, gradients", f"off by {100 * off:.2f} %", f"<= {100 * OFF:.0f} %", off <= OFF)
        except Exception as error:  # as above
            yield _failed(f"{what} {name}", error)


def _decoding(invocation: Invocation, sizes: Sequence[str], small: bool) -> Iterator[Row]:
    """Steps of decoding beside the floor of bandwidth."""
    found = decode.measure(**_load("decode", invocation.gin_files, (*sizes, *invocation.bindings)))
    assert found is not None  # nothing here interleaves
    for each in found.results:
        share = each.floor / each.on_device
        text = f"{each.on_device * 1e3:,.2f} ms on the device, {100 * share:.0f} % of {each.bandwidth / 1e9:,.0f} GB/s"
        goal = None if small else share >= BANDWIDTH
        yield Row(f"token, batch {each.batch_size}", text, f">= {100 * BANDWIDTH:.0f} %", goal)


def run(invocation: Invocation) -> int:
    """Runs `meshway bench accelerator`; returns the exit code, 1 where something failed or missed its goal."""
    with processes.joined(*invocation.processes):
        rows = measure(invocation)
    if any(row.right is False for row in rows):
        return 1
    return 0
