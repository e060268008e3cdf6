"""The programs of inference compiled for chips that are not here: prefill, a step of decoding, scoring."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from meshway.framework.errors import UserError
from meshway.framework.inference.engine import TokenSteps, Workload, compile_score, prompt_batch
from meshway.framework.inference.rows import RowFormat
from meshway.framework.inference.weights import quantized
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.planning import aot
from meshway.framework.planning.aot import CompiledProgram
from meshway.framework.planning.audit import exchanges
from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.layouts import ONE_CHIP, Candidate, Estimate, candidates, estimates
from meshway.framework.planning.memory import device_bytes
from meshway.framework.planning.topology import Topology
from meshway.framework.terminal import format_bytes, format_columns, format_duration
from meshway.launch.layout_choice import Choice, Request

if TYPE_CHECKING:
    from meshway.framework.partitioning.partitioner import Layout
    from meshway.launch.invocation import Invocation

_TYPES: Mapping[float, str] = {4: "float32", 2: "bfloat16", 1: "int8"}
_TITLES = {"prefill": "prefill", "decode": "a step of decoding", "score": "scoring"}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What programs are compiled for.

    Attributes:
      choice: the layout that closed forms chose; None where they have none.
      no_choice: why.
    """

    model: Transformer
    where: Topology
    request: Request
    choice: Choice | None
    no_choice: str = ""


@dataclasses.dataclass(frozen=True)
class Program:
    """One of them.

    Attributes:
      phase: prefill, decode or score.
      layout: the file's name.
      weights, cache: exact bytes on a device of parameters, and of keys and values.
      capacity: bytes of a device that a program may have.
      forms: the closed forms of the same pass by the same layout, None where they know neither.
    """

    phase: str
    layout: str
    mesh: Mapping[str, int]
    weights: int
    cache: int
    capacity: float
    compiled: CompiledProgram
    forms: Estimate | None

    @property
    def memory(self) -> dict[str, int]:
        """Category -> bytes on a device while it runs; with the weights that it does not read, which lie there too.

        A step of decoding is given keys and values and writes into them; prefill makes them.
        """
        made, cache = self.compiled, self.cache
        given = self.weights + (cache if self.phase == "decode" else 0)
        return {
            "weights": self.weights,
            "keys and values": cache,
            "padding, and what else is given": max(0, made.arguments - given),
            "other results": made.outputs - (cache if self.phase == "prefill" else 0),
            "activations and temporaries": made.temporaries,
            "code": made.code,
        }

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.memory.values())


def compiled(
    invocation: "Invocation", plan: Asked, phase: str | None, layouts: Callable[[Candidate], "Layout"]
) -> list[Program]:
    """Compiles what a plan of inference is of, by the layout of the recipe where the command gives one, else by the
    one that the plan chose.

    Args:
      phase: as the flag has it, None for prefill and decoding.
      layouts: reads the layout file of a candidate.

    Raises:
      UserError: there is no compiler for the topology, it refuses a program, or the model does not fit the layout.
    """
    from meshway.launch.recipe import config

    devices = aot.compiled_for(plan.where)
    recipe = config.load(_typed(invocation, plan.request), import_unreferenced=False, shown=False)
    given = any(each.partition("=")[0].strip() == "LAYOUT" for each in invocation.bindings)
    if not given and plan.choice is None:
        raise UserError(f"{plan.no_choice}; or compile one by name: --gin.LAYOUT=...")
    if given:
        name, layout = str(recipe.macro("LAYOUT")), recipe.build("plan.served")["layout"]
    else:
        assert plan.choice is not None
        name, layout = plan.choice.best.layout, layouts(plan.choice.best)
    model = recipe.build("plan.plan")["model"]
    sharded = _typed_weights(ShardedModel(model, layout, devices), _TYPES[plan.request.weight_bytes], phase)
    made = _scored(sharded, plan.request.work) if phase == "score" else _decoded(sharded, plan.request.work)
    mesh, weights = dict(sharded.partitioner.mesh.shape), device_bytes(sharded.param_shapes, sharded.param_shardings)
    forms = functools.partial(_forms, plan, name, mesh)
    return [
        Program(each, name, mesh, weights, cache, plan.where.chip.memory_bytes, program, forms(each))
        for each, (program, cache) in made.items()
        if phase in (None, each)
    ]


def _typed(invocation: "Invocation", request: Request) -> "Invocation":
    """Returns a command whose recipe computes in bfloat16, as closed forms do, and keeps keys and values as asked."""
    from meshway.launch.recipe import config

    first = []
    if config.load(invocation, import_unreferenced=False, shown=False).macro("DTYPE") == "float32":
        first.append("DTYPE='bfloat16'")
    if (kept := _TYPES[request.cache_bytes]) != "bfloat16":
        first.append(f"attention.Attention.cache_dtype={kept!r}")
    return dataclasses.replace(invocation, bindings=(*first, *invocation.bindings))


def _typed_weights(sharded: ShardedModel, dtype: str, phase: str | None) -> ShardedModel:
    """Returns a model whose parameters lie as inference reads them: by layer where it decodes, and of this type."""
    if phase != "score":
        sharded = sharded.by_layer()
    if dtype == "int8":
        sharded = quantized(sharded, dtype, runs=False)

    def typed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return leaf if leaf.dtype != jnp.float32 else jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)

    return sharded.in_form(jax.tree.map(typed, sharded.param_shapes), sharded.axes) if dtype == "bfloat16" else sharded


def _decoded(sharded: ShardedModel, work: Workload) -> dict[str, tuple[CompiledProgram, int]]:
    """Returns phase -> (what the compiler makes of it, bytes of keys and values on a device)."""
    prompts, steps = prompt_batch(sharded, work.batch, work.prompt), []
    programs = aot.compile_programs(
        sharded.partitioner,
        lambda: steps.append(TokenSteps(sharded, prompts, work.new_tokens)),
        "a program of decoding",
    )
    cache = device_bytes(steps[0].shapes.cache, steps[0].shardings.cache)
    return {phase: (program, cache) for phase, program in zip(("prefill", "decode"), programs, strict=True)}


def _scored(sharded: ShardedModel, work: Workload) -> dict[str, tuple[CompiledProgram, int]]:
    coded = RowFormat.of(sharded.model).has_encoder
    lengths = {"inputs": work.prompt, "targets": work.new_tokens} if coded else {"targets": work.prompt}
    batch = sharded.batch(work.batch, lengths)
    (program,) = aot.compile_programs(sharded.partitioner, lambda: compile_score(sharded, batch), "scoring")
    return {"score": (program, 0)}


def _forms(plan: Asked, layout: str, mesh: Mapping[str, int], phase: str) -> Estimate | None:
    """Returns the closed forms of a phase by a layout on a mesh; None of scoring, and of layouts they do not know."""
    passes = plan.request.passes(plan.model)
    found = {name: estimates(plan.model, what, plan.where, plan.request.flat) for name, what in passes.items()}
    for each in candidates(found["prefill"], found["decode"], plan.request.work.new_tokens):
        if each.layout == layout and (layout == ONE_CHIP or list(each.mesh) == [mesh.get(axis, 1) for axis in "xyz"]):
            return {"prefill": each.prefill, "decode": each.decode}.get(phase)
    return None


def format_programs(programs: Sequence[Program]) -> str:
    """Returns them as text: memory and what is sent, beside the closed forms."""
    return "\n\n".join("\n".join(_lines(each)) for each in programs)


def _lines(each: Program) -> list[str]:
    total, forms, made = each.total, each.forms, each.compiled
    mesh = ", ".join(f"{axis}={size}" for axis, size in each.mesh.items())
    verdict = "fits" if total <= each.capacity else "does not fit"
    said = {"weights": forms.weights, "keys and values": forms.cache} if forms else {}
    said |= {"activations and temporaries": forms.activations} if forms else {}
    cells = [("memory of a device", "as compiled", "by closed forms")]
    cells += [(name, format_bytes(size), _bytes(said.get(name))) for name, size in each.memory.items()]
    cells.append(("together", format_bytes(total), _bytes(forms.bytes if forms else None)))
    lines = [
        f"{_TITLES[each.phase]} by {each.layout} ({mesh}), compiled in {format_duration(made.seconds)}: {verdict}, "
        f"{format_bytes(total)} of {format_bytes(each.capacity)}",
        *format_columns(cells, right=(1, 2)),
    ]
    if made.unread:
        return [*lines, f"what it sends is not known: the compiled program cannot be read ({made.unread})"]
    rows = [("sent by a device", "over", "collectives", "bytes")]
    found = exchanges(made.collectives)
    rows += [(one.kind, "+".join(one.axes), f"{one.count:,}", format_bytes(one.sent)) for one in found]
    sent = format_bytes(sum(one.sent for one in found))
    known = f"; layers send {format_bytes(forms.sent)} by closed forms" if forms else ""
    return [*lines, *(format_columns(rows, right=(2, 3)) if found else []), f"{sent} in all{known}"]


def _bytes(size: float | None) -> str:
    return "" if size is None else format_bytes(size)


def as_json(programs: Sequence[Program]) -> list[dict[str, Any]]:
    """Returns them as JSON holds them: bytes, seconds."""
    return [
        {
            "phase": each.phase,
            "layout": each.layout,
            "mesh": each.mesh,
            "memory": each.memory | {"total": each.total, "capacity": each.capacity},
            "compile_seconds": each.compiled.seconds,
            "unread": each.compiled.unread,
            "sent": [dataclasses.asdict(one) for one in exchanges(each.compiled.collectives)],
            "closed_forms": each.forms
            and {name: getattr(each.forms, name) for name in ("weights", "cache", "activations", "sent", "seconds")},
        }
        for each in programs
    ]
