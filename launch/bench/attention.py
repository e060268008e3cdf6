"""meshway bench attention: one attention by each of several kernels, at several lengths, in turn.

    meshway bench attention --gin_file=bench_attention
    meshway bench attention --gin_file=bench_attention --gin.forms.KernelForms.window=512
    meshway bench attention --gin_file=bench_attention --gin.LAYOUT=model_1d --simulated_devices=4

All kernels get the same queries, keys and values. Times are medians of rounds in which every kernel has its turn, so
that other load on the machine affects all alike; memory is the compiler's figure, before anything runs.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.distributed import processes
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.bench.rounds import format_mesh, require_at_least, time_in_turn

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation


class Forms(Protocol):
    """One attention by several kernels."""

    names: tuple[str, ...]

    def operands(self, batch_size: int, length: int) -> Sequence[tuple[tuple[str, ...], tuple[int, ...]]]: ...

    def loss(self, name: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array: ...

    def flops(self, batch_size: int, length: int, backward: bool) -> float: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one kernel at one length.

    Attributes:
      name, length: of what.
      seconds: median of one pass; None where it was not run, since it needs more memory than allowed.
      temporary: bytes a device needs beside arguments and results.
      flops: operations that what is seen needs, of all devices.
    """

    name: str
    length: int
    seconds: float | None
    temporary: int
    flops: float


class _Form:
    """A compiled kernel and what it is run on."""

    def __init__(
        self, forms: Forms, name: str, partitioner: Partitioner, operands: Sequence[jax.Array], backward: bool
    ):
        def forward(*operands: jax.Array) -> jax.Array:
            return forms.loss(name, *operands)

        where = tuple(x.sharding for x in operands)
        self.name, self._operands = name, operands
        self._step = partitioner.compile(
            jax.grad(forward, (0, 1, 2)) if backward else forward,
            *operands,
            in_shardings=where,
            out_shardings=where if backward else partitioner.replicated,
        )
        memory: Any = self._step.memory_analysis()
        self.temporary: int = memory.temp_size_in_bytes

    def once(self) -> Any:
        """Runs one pass and returns what it computes."""
        return self._step(*self._operands)


def measure(
    forms: Forms,
    layout: Layout,
    batch_size: int = 1,
    lengths: Sequence[int] = (1024, 2048, 4096, 8192, 16384),
    steps: int = 1,
    rounds: int = 5,
    dtype: str = "float32",
    backward: bool = True,
    most_bytes: int = 4 * 2**30,
) -> list[Result]:
    """Times one attention by each of several kernels, on normally distributed queries, keys and values, and prints what
    it found.

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
    least = min(lengths, default=0)
    require_at_least(1, "bench.attention.measure", batch_size=batch_size, steps=steps, rounds=rounds, lengths=least)
    partitioner, random, results = Partitioner(layout), np.random.default_rng(0), []
    for length in lengths:
        operands = [
            jax.device_put(jnp.asarray(random.normal(size=shape), dtype), partitioner.sharding(names, shape))
            for names, shape in forms.operands(batch_size, length)
        ]
        compiled = [_Form(forms, name, partitioner, operands, backward) for name in forms.names]
        passes = {form.name: form.once for form in compiled if form.temporary <= most_bytes}
        seconds = time_in_turn(passes, steps, rounds)
        flops = forms.flops(batch_size, length, backward)
        for form in compiled:
            results.append(Result(form.name, length, seconds.get(form.name), form.temporary, flops))
    what = f"{batch_size} x length, {dtype}, forward{' and backward' if backward else ''}"
    print(format_table(results, what, dict(partitioner.mesh.shape)))
    return results


def format_table(results: list[Result], what: str, mesh: dict[str, int]) -> str:
    """Returns the results as text, times also as ratios to those of each length's first kernel."""
    lines = [("length", "kernel", "pass", f"/ {results[0].name}", "GFLOP/s", "temporary a device")]
    first: Result | None = None
    for each in results:
        first = each if first is None or first.length != each.length else first
        time, ratio, speed = "not run", "", ""
        if each.seconds is not None:
            time, speed = f"{each.seconds * 1e3:,.1f} ms", f"{each.flops / each.seconds / 1e9:,.1f}"
            ratio = f"x{each.seconds / first.seconds:.2f}" if first.seconds else ""
        lines.append((f"{each.length:,}", each.name, time, ratio, speed, format_bytes(each.temporary)))
    return "\n".join([f"{what}, on {format_mesh(mesh)}", *format_columns(lines)])


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench attention`."""
    from meshway.launch.recipe import config

    with processes.joined(*invocation.processes):
        measure(**config.load(invocation, import_unreferenced=False).build("bench.attention.measure"))
