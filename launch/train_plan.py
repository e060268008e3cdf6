"""The plan of a recipe's training on chips that are not here: built from the recipe, and as text and JSON."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshway.framework.errors import UserError
from meshway.framework.planning import aot, hardware, train_plan
from meshway.framework.planning.step_cost import ERROR, StepCost, Traffic
from meshway.framework.planning.topology import Topology, topology
from meshway.framework.planning.train_plan import TrainPlan
from meshway.framework.terminal import format_bytes, format_columns, format_duration

if TYPE_CHECKING:
    from meshway.framework.training.program import TrainProgram
    from meshway.launch.invocation import Invocation
    from meshway.launch.recipe.config import Recipe

ROOT = "plan.Training"  # what a recipe binds for a plan
_COUNTED = ("ATTENTION_KERNEL=@reference.dot_product_attention",)  # what runs/plan.gin imports
_INFERENCE = ("batch", "context", "new_tokens", "weights", "cache", "wires", "overlap", "compile")  # flags


@dataclasses.dataclass(frozen=True)
class Planner:
    """Builds and plans variants of one recipe: the recipe as given with more bindings.

    Attributes:
      invocation: of the command.
      where: the chips.
      described: their devices, as objects that can be traced for.
      defaults: bindings that the recipe's own values of this machine give way to.
    """

    invocation: "Invocation"
    where: Topology
    described: Sequence[Any]
    defaults: tuple[str, ...] = ()

    def recipe(self, bindings: Sequence[str] = (), shown: bool = False) -> "Recipe":
        """Returns the recipe of a variant, and says that it is read if `shown`; raises UserError where it is wrong."""
        from meshway.launch.recipe import config

        wanted = (*self.invocation.bindings, *self.defaults, *bindings)
        asked = dataclasses.replace(self.invocation, bindings=wanted, subject=ROOT.rpartition(".")[2])
        return config.load(asked, import_unreferenced=False, shown=shown)

    def program(self, bindings: Sequence[str] = (), on: Sequence[Any] | None = None) -> "TrainProgram":
        """Returns the program of a variant on described devices, or on those that are given.

        Raises:
          UserError: the recipe is wrong, or does not fit the devices.
        """
        recipe = self.recipe(bindings)
        if recipe.macro("TASK_FEATURE_LENGTHS") is None:
            raise UserError(
                "a plan of training needs the tokens of an example: --gin.TASK_FEATURE_LENGTHS=\"{'targets': 2048}\""
            )
        make: Callable[..., TrainProgram] = recipe.build(ROOT)["program"]
        with _refusals():
            program = make(devices=self.described if on is None else on)
        mesh = program.partitioner.mesh
        if mesh.size != self.where.num_devices:
            raise UserError(
                f"the mesh {dict(mesh.shape)} leaves {self.where.num_devices - mesh.size} of the "
                f"{self.where.num_devices:,} devices of {self.where.name} idle: make the product of MeshShape's sizes "
                f"{self.where.num_devices}, or give one axis -1"
            )
        return program

    @functools.cached_property
    def model_flops(self) -> float:
        """FLOPs of the recipe's step on no mesh, its attention counted as the reference kernel has it: no kernel's loop
        of unknown length hides any."""
        program = self.program(_COUNTED)
        with _refusals():
            return float(program.flops)

    def traced(self, bindings: Sequence[str] = ()) -> TrainPlan:
        """Returns the plan of a variant by closed forms."""
        program, model_flops = self.program(bindings), self.model_flops
        with _refusals():
            return train_plan.traced_plan(program, self.where, model_flops)

    def compiled(self, bindings: Sequence[str] = ()) -> TrainPlan:
        """Returns the plan of a variant with what XLA makes of its step.

        Raises:
          aot.TooLarge: the compiler finds no room for it.
          UserError: as `program`; libtpu is missing; the compiler refuses the step.
        """
        program = self.program(bindings, aot.compiled_for(self.where))
        model_flops = self.model_flops
        with _refusals():
            traced = train_plan.traced_plan(program, self.where, model_flops)
        (compiled,) = aot.compile_programs(program.partitioner, program.compile_step)
        return train_plan.with_compiled(traced, program, compiled)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns what a model refuses while it is made or traced (ValueError) into a UserError."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      note: a sentence about it, "" for none.
      rows: the first of them the columns' titles.
      numbers: the columns that hold numbers.
    """

    note: str
    rows: Sequence[Sequence[str]]
    numbers: tuple[int, ...] = ()

    @property
    def lines(self) -> list[str]:
        """It, as text."""
        return [*([self.note] if self.note else []), *format_columns(self.rows, right=self.numbers)]


def format_plan(plan: TrainPlan) -> str:
    """Returns a plan as text."""
    parts = [heading(plan), *["\n".join(each.lines) for each in tables(plan)], "\n".join(time_lines(plan))]
    return "\n\n".join([*parts, *(["\n".join(f"warning: {each}" for each in plan.waste)] if plan.waste else [])])


def heading(plan: TrainPlan) -> str:
    """Returns what is planned, for what, in two lines."""
    where = plan.where
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    micro = f" in {plan.num_microbatches} microbatches" if plan.num_microbatches > 1 else ""
    cores = f" of {where.chip.cores} devices" if where.chip.cores > 1 else ""
    slices = f", {where.slices} slices" if where.slices > 1 else ""
    return (
        f"{where.name}: {where.num_chips:,} x {where.kind}{cores}{slices}, {format_bytes(where.chip.memory_bytes)} a "
        f"device\n{plan.num_params:,} parameters on the mesh {mesh}; a batch of {plan.batch_size:,} examples, "
        f"{plan.flops.tokens:,} tokens{micro}"
    )


def tables(plan: TrainPlan) -> list[Table]:
    """Returns memory, that of stages if there are any, FLOPs and what is sent."""
    return [_memory(plan), *([_stages(plan)] if plan.stages else []), _flops(plan), _traffic(plan)]


def memory_rows(plan: TrainPlan) -> dict[str, float]:
    """Returns category -> bytes on a device; they add up to `plan.bytes`."""
    memory, compiled = plan.memory, plan.compiled
    rows: dict[str, float] = {
        "parameters": memory.parameters,
        "optimizer state": memory.optimizer,
        "batch": memory.batch,
    }
    if compiled is None:
        rows |= {"padding of these": memory.padding} if memory.padding else {}
        return rows | {"gradients": memory.gradients, "activations and temporaries": memory.activations}
    gradients = min(memory.gradients, compiled.temporaries)
    return rows | {
        "padding of these": compiled.arguments - sum(rows.values()),
        "gradients": gradients,
        "activations and temporaries": compiled.temporaries - gradients,
        "other results": compiled.outputs,
        "code": compiled.code,
    }


def _memory(plan: TrainPlan) -> Table:
    verdict = "fits" if plan.fits else "does not fit"
    source = "as compiled" if plan.compiled else "estimated; see docs/planning.md for how far XLA's figures are from it"
    cells = [("memory of a device", "bytes", "share")]
    cells += [(name, format_bytes(size), f"{size / plan.capacity:.1%}") for name, size in memory_rows(plan).items()]
    cells.append(("together", format_bytes(plan.bytes), f"{plan.bytes / plan.capacity:.1%}"))
    head = (
        f"{verdict}: {format_bytes(plan.bytes)} of the {format_bytes(plan.capacity)} that a program may have ({source})"
    )
    return Table(head, cells, (1, 2))


def _stages(plan: TrainPlan) -> Table:
    cells: list[tuple[str, ...]] = [
        ("stage", "its layers", "of both ends", "activations", "peak", "of its own program", "waste")
    ]
    between = plan.stages[1:2] if len(plan.stages) > 2 else ()  # all alike
    for each in (plan.stages[0], *between, plan.stages[-1]):
        name = f"1 to {len(plan.stages) - 2}" if each in between and len(plan.stages) > 3 else str(each.number)
        sizes = (each.layers, each.shared, each.activations, each.here, each.alone, each.waste)
        cells.append((name, *map(format_bytes, sizes)))
    note = (
        "stages run in one program, so that each device holds as much as any: a share of the embedding and of the "
        "logits, which the first and the last stage alone would need, and activations of idle time steps"
    )
    return Table(note, cells, (1, 2, 3, 4, 5, 6))


def _flops(plan: TrainPlan) -> Table:
    flops = plan.flops
    cells = [("FLOPs", "a step", "a token")]
    for name, count in (
        ("with attention's scores (PaLM's convention)", flops.model),
        ("of parameters alone (6 N)", flops.parameters),
        ("computed, with what is computed again", flops.hardware),
    ):
        cells.append((name, f"{count:.4g}", f"{count / flops.tokens:.4g}"))
    return Table("", cells, (1, 2))


def _traffic(plan: TrainPlan) -> Table:
    traffic: Sequence[Traffic] = plan.compiled_traffic if plan.compiled_cost else plan.traffic
    cells = [("sent by a device, a step", "over", "collectives", "bytes")]
    for each in sorted(traffic, key=lambda each: -each.sent):
        cells.append((each.what, "+".join(each.axes), f"{each.count:,}", format_bytes(each.sent)))
    return Table("" if traffic else "nothing is sent", cells, (2, 3))


def time_lines(plan: TrainPlan) -> list[str]:
    """Returns how long a step takes, and what that is known from."""
    cost = plan.best_cost
    terms = ", ".join(f"{name} {format_seconds(value)}" for name, value in cost.terms.items())
    low, middle, high = ERROR
    lines = [
        f"a step: about {format_seconds(cost.estimate)} (MFU {plan.mfu(cost.estimate):.1%}); published runs took {low} "
        f"to {high} times their estimate, {middle} in the middle: {format_seconds(cost.estimate * middle)}",
        f"  at peak: {format_seconds(cost.least)} if all goes on side by side (MFU {plan.mfu(cost.least):.1%}), "
        f"{format_seconds(cost.most)} if products and collectives wait for each other (MFU {plan.mfu(cost.most):.1%}); "
        f"bound by {cost.bound}",
        f"  {terms}",
        f"  {plan.flops.tokens / cost.most:,.0f} to {plan.flops.tokens / cost.least:,.0f} tokens/s at published peaks",
    ]
    if plan.compiled:
        lines.append(f"compiled in {format_duration(plan.compiled.seconds)}; nothing was run")
        if plan.compiled.unread:
            lines.append(f"what it sends is by closed forms: the compiled step cannot be read ({plan.compiled.unread})")
    else:
        lines.append("closed forms; nothing was compiled")
    return lines


def format_seconds(value: float) -> str:
    """Returns seconds for people, in s, ms or us."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{1e3 * value:,.2f} ms" if value >= 1e-3 else f"{1e6 * value:,.1f} us"


def as_json(plan: TrainPlan) -> dict[str, Any]:
    """Returns a plan as JSON holds it: bytes, seconds, shares."""
    where = plan.where

    def cost(found: StepCost | None) -> Mapping[str, Any] | None:
        if found is None:
            return None
        ends = {"least": found.least, "most": found.most, "bound": found.bound, "estimate": found.estimate}
        ends |= {"published_by_estimate": ERROR}
        return dataclasses.asdict(found) | ends | {"mfu": [plan.mfu(found.most), plan.mfu(found.least)]}

    compiled = plan.compiled
    return {
        "topology": {
            "name": where.name,
            "kind": where.kind,
            "chips": where.num_chips,
            "devices": where.num_devices,
            "slices": where.slices,
        },
        "mesh": plan.mesh,
        "num_params": plan.num_params,
        "batch_size": plan.batch_size,
        "num_microbatches": plan.num_microbatches,
        "flops": dataclasses.asdict(plan.flops),
        "memory": memory_rows(plan) | {"total": plan.bytes, "capacity": plan.capacity, "fits": plan.fits},
        "estimated_memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total},
        "time": {"closed_forms": cost(plan.cost), "compiled": cost(plan.compiled_cost)},
        "sent": [dataclasses.asdict(each) for each in plan.traffic],
        "sent_as_compiled": [dataclasses.asdict(each) for each in plan.compiled_traffic],
        "stages": [
            dataclasses.asdict(each) | {"here": each.here, "alone": each.alone, "waste": each.waste}
            for each in plan.stages
        ],
        "compile_seconds": compiled.seconds if compiled else None,
        "unread": compiled.unread if compiled else "",
        "waste": [str(each) for each in plan.waste],
    }


def asked_topology(name: str) -> Topology:
    """Returns the topology of the flag; simulated devices have their share of this machine."""
    try:
        where = topology(name)
    except UserError as error:
        raise UserError(f"--topology: {error}") from None
    if where.platform != "cpu":
        return where
    return hardware.topology_of(aot.compiled_for(where))


def planner_of(invocation: "Invocation") -> Planner:
    """Returns what plans the training of a command's recipe.

    Raises:
      UserError: there is no such topology, or a flag of inference is given.
    """
    options = invocation.options
    if wrong := [f"--{name}" for name in _INFERENCE if getattr(options, name)]:
        raise UserError(
            f"{' and '.join(wrong)} of inference: a plan of training has the recipe's own batch and lengths"
        )
    where = asked_topology(options.topology)
    planner = Planner(invocation, where, aot.described_devices(where))
    if planner.recipe(shown=True).macro("SCAN") == "auto":  # what it is on chips, whatever machine plans
        planner = dataclasses.replace(planner, defaults=("SCAN=True",))
    return planner
