"""meshway bench attention: one attention by each of several kernels, at several lengths, in turn.

    meshway bench attention --gin_file=bench_attention
    meshway bench attention --gin_file=bench_attention --gin.forms.KernelForms.window=512
    meshway bench attention --gin_file=bench_attention --gin.LAYOUT=model_1d --simulated_devices=4

All kernels get the same queries, keys and values. Times are medians of rounds in which every kernel has its turn, so
that what else the machine does falls on all alike; memory is what the compiler says, before anything runs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.rounds import require_at_least, time_in_turn


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
    batch_size: int,
    lengths: Sequence[int],
    steps: int,
    rounds: int,
    dtype: str,
    backward: bool,
    most_bytes: int,
) -> tuple[list[Result], dict[str, int]]:
    """Times the kernels under a layout, on normally distributed queries, keys and values.

    Returns:
      (what was found, by length and kernel, the mesh's axes and sizes).

    Raises:
      UserError, ValueError: a number is out of range, or a kernel refuses the attention or the layout.
    """
    least = min(lengths, default=0)
    require_at_least(1, "bench.attention", batch_size=batch_size, steps=steps, rounds=rounds, lengths=least)
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
    return results, dict(partitioner.mesh.shape)


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
    where = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
    return "\n".join([f"{what}, on {where}", *format_columns(lines)])
