"""meshway bench decode: what a token costs, beside how fast this machine reads memory.

    meshway bench decode --gin_file=bench_decode
    meshway bench decode --gin_file=t5_1_1/small --gin.bench.decode.Setting.batch_sizes='(1, 16)'
    meshway bench decode --gin_file=bench_decode --gin.attention.Attention.cache_dtype=int8
    meshway bench decode --interleave --gin_file=...    # burst by burst beside other programs, over a pipe

A step of decoding reads the weights once, whatever the batch, and the keys and values of all that came before: its
floor is these bytes over the bandwidth of a streaming read, which takes turns with the steps. Prompts and parameters
are random; decoding is greedy and never stops early.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import decoding_model
from meshway.framework.inference.engine import TokenSteps, prompt_batch
from meshway.framework.inference.rows import RowFormat, doubling
from meshway.framework.inference.sampling import DecodeState
from meshway.framework.inference.weights import WEIGHTS, prepared
from meshway.framework.interfaces import Model, Params
from meshway.framework.partitioning.sharded_model import ShardedBatch, ShardedModel
from meshway.framework.planning.flops import bytes_read, live_flops
from meshway.framework.planning.hardware import StreamingRead, peak_flops
from meshway.framework.telemetry.profiler import Compilations
from meshway.framework.telemetry.timeline import process_began
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.bench.decode_results import Found, Result
from meshway.launch.bench.rounds import (
    format_mesh,
    peak_dtype,
    require_at_least,
    seconds_of,
    speak_in_bursts,
    time_in_turn,
)

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation

PARAM_DTYPES = ("float32", "bfloat16", "float16", *WEIGHTS)
TOKENS = (3, 64)  # what prompts are drawn from: any vocabulary has these


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed; a recipe binds it.

    Attributes:
      batch_sizes: rows, one size after the other.
      prompt_length: tokens of each prompt, of the encoder's inputs where there is one; 2 at least.
      new_tokens: what is predicted of each row in a turn.
      rounds: turns of each pass, whose median counts.
      mixed_batches: of the job of mixed lengths that must compile nothing.
      params_dtype: what parameters are kept in ("bfloat16", or "int8" with a scale for each channel); None for float32,
        as in training.
      by_layer: whether a program reads an array of each layer, as `infer` does, or entries of stacked ones.

    Raises:
      UserError: a number is out of range, or the dtype is unknown.
    """

    batch_sizes: Sequence[int] = (1, 8)
    prompt_length: int = 128
    new_tokens: int = 16
    rounds: int = 5
    mixed_batches: int = 8
    params_dtype: str | None = None
    by_layer: bool = True

    def __post_init__(self) -> None:
        where, smallest = "bench.decode.Setting", min(self.batch_sizes, default=0)
        counts = {"new_tokens": self.new_tokens, "rounds": self.rounds, "mixed_batches": self.mixed_batches}
        require_at_least(1, where, batch_sizes=smallest, **counts)
        require_at_least(2, where, prompt_length=self.prompt_length)
        if self.params_dtype not in (None, *PARAM_DTYPES):
            known = ", ".join(PARAM_DTYPES)
            raise UserError(f"{where}.params_dtype must be None or one of {known}, not {self.params_dtype!r}")


class _Decoding:
    """The programs of one batch size and prompt length, and the state of its decoding."""

    def __init__(self, sharded: ShardedModel, params: Params, batch_size: int, length: int, new_tokens: int):
        self.batch: ShardedBatch = prompt_batch(sharded, batch_size, length)
        self.steps = TokenSteps(sharded, self.batch, new_tokens, params=params)
        self.sharded, self.params = sharded, params
        self._format, self._length, self._new_tokens = RowFormat.of(sharded.model), length, new_tokens

    def begin(self, sizes: Sequence[int]) -> DecodeState:
        """Reads random prompts that take so many tokens of a row each."""
        random, start = np.random.default_rng(0), self._format.prompt_size(())
        inputs = [random.integers(*TOKENS, size - start).tolist() for size in sizes]
        mine = self.sharded.partitioner.process_rows(len(sizes))
        rows = {name: x[mine] for name, x in self._format.prompts(inputs, self._length).items()}
        self._prompts = self.batch.shard(rows)
        self._start = self.prefill()
        self._cache = self._start.cache
        return self._start

    def prefill(self) -> DecodeState:
        """Reads the prompts again, not waited for."""
        ids = np.zeros(self.batch.size, np.int32)
        return self.steps.prefill(self.params, self._prompts, ids, jax.random.key(0))

    def stream(self) -> DecodeState:
        """Predicts `new_tokens` as a stream does: while a step runs, the host reads the tokens of the one before."""
        at = self._start._replace(cache=self._cache)
        for _ in range(self._new_tokens):
            following = self.steps.step(self.params, at)
            for shard in at.tokens.addressable_shards:
                np.asarray(shard.data)
            at = following
        self._cache = at.cache
        return at

    def loop(self, compiled: Any) -> DecodeState:
        """Predicts `new_tokens` by one program."""
        at = compiled(self.params, self._start._replace(cache=self._cache))
        self._cache = at.cache
        return at

    def keeps_its_memory(self) -> bool:
        """Whether a step consumes the cache it is given and returns it in the same memory."""
        given = jax.tree.leaves(self._cache)
        before = [_pointers(leaf) for leaf in given]
        self._cache = self.steps.step(self.params, self._start._replace(cache=self._cache)).cache
        after = [_pointers(leaf) for leaf in jax.tree.leaves(self._cache)]
        return before == after and all(leaf.is_deleted() for leaf in given)


def measure(sharded: ShardedModel, setting: Setting = Setting(), interleave: bool = False) -> Found | None:
    """Times prefill and steps of a model with random parameters and prompts, and prints what it found.

    Args:
      sharded: what decodes, on the mesh it is timed on.
      setting: what is timed.
      interleave: speak the burst protocol on standard input and output instead (`rounds.speak_in_bursts`); a pass reads
        the prompts and predicts `new_tokens` on the device, and a burst is `rounds` of them.

    Returns:
      what was found; None if it was another program that did the timing.

    Raises:
      UserError: the model predicts no text, it does not fit the layout, or there are several batch sizes to interleave.
    """
    decoding_model(sharded.model)  # raises for a model that predicts no text, before anything is made
    if interleave and len(setting.batch_sizes) != 1:
        raise UserError(
            f"--interleave times one batch size, not {tuple(setting.batch_sizes)}: "
            "add --gin.bench.decode.Setting.batch_sizes='(8,)'"
        )
    sharded, params = _init_params(sharded, setting)
    if interleave:
        _serve(_Decoding(sharded, params, setting.batch_sizes[0], setting.prompt_length, setting.new_tokens), setting)
        return None
    mesh, results, source = sharded.partitioner.mesh, [], ""
    stream, longest = StreamingRead(mesh), None
    for batch_size in setting.batch_sizes:
        # What activations are computed in is the model's own affair; accelerators are held against bfloat16's peak.
        peak, source = peak_flops(mesh.devices.flatten().tolist(), peak_dtype(mesh.devices.flat[0].platform))
        decoding = _Decoding(sharded, params, batch_size, setting.prompt_length, setting.new_tokens)
        longest = decoding if longest is None else longest
        results.append(_measure_one(decoding, batch_size, setting, stream, peak))
    assert longest is not None
    lengths, compiled = _count_compilations(sharded, params, longest, setting)
    found = Found(results, compiled, lengths, dict(mesh.shape), source)
    print(format_table(found, setting))
    return found


def _serve(decoding: _Decoding, setting: Setting) -> None:
    (batch_size,), count = setting.batch_sizes, setting.new_tokens
    decoding.begin([setting.prompt_length] * batch_size)
    loop = decoding.steps.compile_loop(count)

    def once() -> DecodeState:
        return loop(decoding.params, decoding.prefill())

    first = seconds_of(once)
    started = round(time.time() - process_began(), 2)
    info = {"first_step_done_s": started, "first_ms": round(first * 1e3, 1), "tokens": batch_size * count}
    speak_in_bursts(lambda: [seconds_of(once) for _ in range(setting.rounds)], info)


def _init_params(sharded: ShardedModel, setting: Setting) -> tuple[ShardedModel, Params]:
    """Returns the model with its parameters in the form that is timed, and random ones in their shards."""
    dtype = None if setting.params_dtype in WEIGHTS else setting.params_dtype

    def init(key: jax.Array) -> Params:
        params = sharded.model.init(key)
        return params if dtype is None else jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)

    key = jax.random.key(0)
    compiled = sharded.partitioner.compile(init, key, in_shardings=None, out_shardings=sharded.param_shardings)
    weights = setting.params_dtype if setting.params_dtype in WEIGHTS else None
    return prepared(sharded, compiled(key), setting.by_layer, weights)


def _count_compilations(
    sharded: ShardedModel, params: Params, longest: _Decoding, setting: Setting
) -> tuple[list[int], int]:
    """Decodes batches of mixed lengths, each padded to the nearest of a few, of which `longest` is there already.

    Returns:
      (these lengths, how many programs were compiled once each had had a batch).
    """
    batch_size, random = setting.batch_sizes[0], np.random.default_rng(1)
    buckets = doubling({"inputs": setting.prompt_length}, smallest=max(2, setting.prompt_length // 4))
    lengths = [shape["inputs"] for shape in buckets.shapes]
    ready = [_Decoding(sharded, params, batch_size, length, setting.new_tokens) for length in lengths[:-1]]
    ready.append(longest)
    for decoding, length in zip(ready, lengths):
        decoding.begin([length] * batch_size)
        decoding.stream()
    with Compilations() as compilations:
        for _ in range(setting.mixed_batches):
            sizes = random.integers(2, setting.prompt_length + 1, batch_size).tolist()
            bucket = buckets.of({"inputs": max(sizes)})
            assert bucket is not None
            ready[bucket].begin(sizes)
            jax.block_until_ready(ready[bucket].stream())
    return lengths, compilations.count


def step_bytes(model: Model, params: Params, batch_size: int, length: int, new_tokens: int) -> tuple[float, float]:
    """Returns (bytes of parameters, bytes of the cache) that a step of decoding reads on one device, where the cache
    has room for prompts of `length` tokens and as many new ones as `new_tokens`."""
    rows, decodes = RowFormat.of(model), decoding_model(model)
    batch = rows.prompts([()] * batch_size, length)
    shapes = jax.eval_shape(lambda params, batch: decodes.prefill(params, batch, new_tokens), params, batch)
    weights, _, _, cache = bytes_read(decodes.decode, params, *shapes)
    return sum(jax.tree.leaves(weights)), sum(jax.tree.leaves(cache))


def format_table(found: Found, setting: Setting) -> str:
    """Returns the results as text."""
    lines = [("batch", "a step", "tokens/s", "of the floor", "padded", "host gap", "prefill", "MFU", "cache", "padded")]
    for each in found.results:
        lines.append(
            (
                f"{each.batch_size}",
                f"{each.step * 1e3:,.2f} ms",
                f"{each.batch_size / each.step:,.0f}",
                f"{100 * each.floor / each.step:.1f} %",
                f"{100 * each.padded_floor / each.step:.1f} %",
                f"{each.host_gap * 1e3:+,.2f} ms",
                f"{each.prefill * 1e3:,.1f} ms",
                f"{100 * each.prefill_flops / each.prefill / each.peak:.1f} %",
                format_bytes(each.live),
                format_bytes(each.padded),
            )
        )
    first = found.results[0]
    bandwidth = statistics.median(each.bandwidth for each in found.results)
    peak = statistics.median(each.peak for each in found.results)
    kept = all(each.donated for each in found.results)
    facts = {
        "weights a step reads": format_bytes(first.weights),
        "memory bandwidth": f"{bandwidth / 1e9:,.1f} GB/s (measured: a streaming read in turn with the steps)",
        "matmul peak": f"{peak / 1e9:,.1f} GFLOP/s ({found.peak_source})",
        "temporary memory of a step": format_bytes(max(each.temporary for each in found.results)) + " a device",
        "cache donated": "yes, a step returns it in the same memory" if kept else "NO, a step copies it",
        "compiled after warm-up": f"{found.compilations} programs, over {setting.mixed_batches} batches of mixed "
        f"lengths padded to {', '.join(map(str, found.mixed_lengths))}",
    }
    title = (
        f"prompts of {setting.prompt_length} tokens, then {setting.new_tokens} new ones, on {format_mesh(found.mesh)}"
    )
    return "\n".join([title, *format_columns(lines), *format_columns(facts.items())])


def _measure_one(decoding: _Decoding, batch_size: int, setting: Setting, stream: StreamingRead, peak: float) -> Result:
    sharded, params, length, count = decoding.sharded, decoding.params, setting.prompt_length, setting.new_tokens
    start = decoding.begin([length] * batch_size)
    donated = decoding.keeps_its_memory()
    loop = decoding.steps.compile_loop(count)
    passes: dict[str, Callable[[], object]] = {
        **{way: functools.partial(stream.once, way) for way in stream.ways},
        "stream": decoding.stream,
        "loop": lambda: decoding.loop(loop),
        "prefill": decoding.prefill,
    }
    seconds = time_in_turn(passes, 1, setting.rounds)
    weights, cache = _held(sharded, params, start)
    live = _live_share(sharded.model, params, batch_size, length, count)
    prompts, model = decoding.batch.abstract, decoding_model(sharded.model)
    return Result(
        batch_size=batch_size,
        step=seconds["stream"] / count,
        on_device=seconds["loop"] / count,
        prefill=seconds["prefill"],
        prefill_flops=live_flops(lambda params, batch: model.prefill(params, batch, count), params, prompts),
        weights=weights,
        live=cache * live,
        padded=cache,
        temporary=decoding.steps.memory().temp_size_in_bytes,
        bandwidth=stream.bytes / min(seconds[way] for way in stream.ways),
        peak=peak,
        donated=donated,
    )


def _held(sharded: ShardedModel, params: Params, at: DecodeState) -> tuple[float, float]:
    """Returns the bytes of parameters and of the cache that all devices together read in a step, of what each holds."""
    given = (params, at.tokens, at.start, at.cache)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), given)
    read = bytes_read(decoding_model(sharded.model).decode, *shapes)

    def total(read: Any, arrays: Any) -> float:
        copies = jax.tree.map(lambda x: x.sharding.num_devices * _shard_share(x), arrays)
        return sum(jax.tree.leaves(jax.tree.map(lambda amount, times: amount * times, read, copies)))

    return total(read[0], params), total(read[3], at.cache)


def _live_share(model: Model, params: Params, batch_size: int, length: int, count: int) -> float:
    """Returns the share of the cache's bytes that hold something, as the mean over `count` steps.

    Step t of a sequence reads what was there and t new tokens; the first one fed to a decoder without an encoder is
    the prompt's last, which is there already.
    """
    before = 0 if RowFormat.of(model).has_encoder else 1
    first, last, whole = (
        step_bytes(model, params, batch_size, length, room)[1] for room in (1 - before, count - before, count)
    )
    return (first + last) / 2 / whole


def _shard_share(x: jax.Array) -> float:
    return np.prod(x.sharding.shard_shape(x.shape)) / max(x.size, 1)


def _pointers(x: jax.Array) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench decode`."""
    from meshway.launch.recipe import config

    with processes.joined(*invocation.processes):
        measure(**config.load(invocation, import_unreferenced=False).build("bench.decode.measure"))
