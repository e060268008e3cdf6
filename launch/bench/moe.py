"""meshway bench moe: a mixture of experts in each form of dispatch, forward and backward, in turn.

    meshway bench moe --gin_file=recipes/bench_moe.gin
    meshway bench moe --gin_file=recipes/bench_moe.gin --gin.LAYOUT=expert --simulated_devices=8
    meshway bench moe --gin_file=mixtral/tiny --gin.bench.moe.measure.length=1024    # the layer of another model

All forms get the same parameters and tokens. Times are medians of rounds in which every form has its turn, so that
other load on the machine affects all of them alike.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.distributed import processes
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.framework.planning.collectives import read_collectives
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.bench.rounds import format_mesh, require_at_least, time_in_turn

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation


class Forms(Protocol):
    """One layer in several forms with the same parameters."""

    names: tuple[str, ...]
    d_model: int

    def init(self, rng: jax.Array) -> dict[str, Any]: ...

    def axes(self) -> dict[str, Any]: ...

    def loss(self, name: str, params: dict[str, Any], x: jax.Array, rng: Any) -> tuple[jax.Array, dict[str, Any]]: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What was found of one form.

    Attributes:
      name: of the form.
      seconds: median of one forward and backward pass.
      temporary: bytes a device needs beside arguments and results.
      sent: bytes a device sends in one pass.
      collectives: number of instructions that send, by kind.
      dropped: share of the choices that found no slot.
    """

    name: str
    seconds: float
    temporary: int
    sent: float
    collectives: dict[str, int]
    dropped: float


class _Form:
    """A compiled form and what it is run on."""

    def __init__(self, forms: Forms, name: str, partitioner: Partitioner, params: Any, stored: Any, x: jax.Array):
        def step(params: Any, x: jax.Array, rng: jax.Array) -> Any:
            passes = jax.value_and_grad(lambda params, x: forms.loss(name, params, x, rng), (0, 1), has_aux=True)
            (loss, metrics), gradients = passes(params, x)
            return loss, metrics, gradients

        self.name, self._arguments = name, (params, x, jax.random.key(1))
        _, metrics, _ = _shapes(partitioner, step, *self._arguments)
        whole = partitioner.replicated
        self._step = partitioner.compile(
            step,
            *self._arguments,
            in_shardings=(stored, x.sharding, whole),
            out_shardings=(whole, jax.tree.map(lambda _: whole, metrics), (stored, x.sharding)),
        )
        self._mesh = dict(partitioner.mesh.shape)
        self._metrics: dict[str, jax.Array] = {}

    def once(self) -> Any:
        """Runs one pass and returns what it computes."""
        found = self._step(*self._arguments)
        self._metrics = found[1]
        return found

    def result(self, seconds: float) -> Result:
        """Returns what was found; `once` has run, in so many seconds."""
        moved = read_collectives(self._step.as_text() or "", self._mesh)
        kinds = Counter({row.instruction: row.kind for row in moved}.values())
        memory: Any = self._step.memory_analysis()
        sent = sum(row.sent for row in moved)
        dropped = float(self._metrics.get("router/drop_rate", float("nan")))
        return Result(self.name, seconds, memory.temp_size_in_bytes, sent, dict(sorted(kinds.items())), dropped)


def measure(
    forms: Forms,
    layout: Layout,
    batch_size: int = 8,
    length: int = 512,
    steps: int = 3,
    rounds: int = 7,
    dtype: str = "float32",
) -> list[Result]:
    """Times a mixture of experts in each form of dispatch, forward and backward, on normally distributed tokens
    [batch_size, length, d_model], and prints what it found.

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
    require_at_least(1, "bench.moe.measure", batch_size=batch_size, length=length, steps=steps, rounds=rounds)
    partitioner = Partitioner(layout)
    shape = (batch_size, length, forms.d_model)
    tokens = partitioner.sharding(("batch", "length", "embed"), shape)
    stored = partitioner.state_shardings(forms.axes(), jax.eval_shape(forms.init, jax.random.key(0)))
    params = partitioner.compile(forms.init, jax.random.key(0), in_shardings=None, out_shardings=stored)(
        jax.random.key(0)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
    compiled = [_Form(forms, name, partitioner, params, stored, jax.device_put(x, tokens)) for name in forms.names]
    seconds = time_in_turn({form: form.once for form in compiled}, steps, rounds)
    results = [form.result(seconds[form]) for form in compiled]
    print(format_table(results, batch_size * length, dict(partitioner.mesh.shape)))
    return results


def format_table(results: list[Result], tokens: int, mesh: dict[str, int]) -> str:
    """Returns the results as text, times also as ratios to the first form's."""
    first = results[0]
    lines = [("dispatch", "pass", f"/ {first.name}", "temporary a device", "sent a device", "dropped", "collectives")]
    for each in results:
        kinds = ", ".join(f"{count} {kind}" for kind, count in each.collectives.items()) or "none"
        lines.append(
            (
                each.name,
                f"{each.seconds * 1e3:,.1f} ms",
                f"x{each.seconds / first.seconds:.2f}",
                format_bytes(each.temporary),
                format_bytes(each.sent),
                f"{100 * each.dropped:.1f} %",
                kinds,
            )
        )
    return "\n".join([f"{tokens:,} tokens, forward and backward, on {format_mesh(mesh)}", *format_columns(lines)])


def _shapes(partitioner: Partitioner, function: Callable[..., Any], *arguments: Any) -> Any:
    with partitioner.activate():
        return jax.eval_shape(function, *arguments)


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench moe`."""
    from meshway.launch.recipe import config

    with processes.joined(*invocation.processes):
        measure(**config.load(invocation, import_unreferenced=False).build("bench.moe.measure"))
