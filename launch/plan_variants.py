"""Variants of a recipe's training plan: what single options would change, and the fastest way to train that fits."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meshway.framework.errors import UserError, first_line
from meshway.framework.partitioning.rules import Rules
from meshway.framework.planning import aot
from meshway.framework.planning.comparison import setting_of
from meshway.framework.planning.search import Candidate, Rough, Traced, candidates, frontier
from meshway.framework.planning.train_plan import TrainPlan, whole_uses
from meshway.framework.terminal import format_bytes
from meshway.launch import layout_choice
from meshway.launch.train_plan import ROOT, Planner, Table, format_seconds

_LAYOUTS = ("zero_1", "fsdp", "fsdp_model", "model_2d")
_ACROSS = ("replica_fsdp", "replica_fsdp_model")  # of several slices
_OF_EXPERTS = ("expert", "fsdp_expert", "expert_model")
# moe.MoeMlp.dispatch -> how the closed forms call what it sends
_DISPATCHES = {"all_to_all": "slots", "einsum": "slots", "dropless": "gathered", "ragged": "sent"}
_SECONDS = 10.0  # for closed forms
_OBJECTIVES = "meshway.models.objectives"
_OF_PARTS: tuple[tuple[str, str, str, Any], ...] = (  # options of what a recipe need not have
    ("meshway.framework.optimizers.optimizers", "adamw", "mu_dtype", "bfloat16"),
    *((_OBJECTIVES, name, "num_loss_chunks", 8) for name in ("DecoderOnly", "EncoderDecoder", "EncoderOnly")),
)
_CONFIRMED = 3  # plans that are offered
_ATTEMPTS = 12  # at tracing, or compiling, one
_MOST_TRIED = 8192  # devices of a larger slice


@dataclasses.dataclass(frozen=True)
class Knob:
    """One option changed.

    Attributes:
      bindings: that change it.
      saves: bytes of a device, negative if it costs.
      seconds: that it adds to a step with all side by side.
      why_not: why it cannot be changed, "" if it can.
    """

    bindings: tuple[str, ...]
    saves: float = 0.0
    seconds: float = 0.0
    fits: bool = False
    why_not: str = ""

    @property
    def words(self) -> str:
        """The flags that change it."""
        return " ".join(f"--gin.{each}" for each in self.bindings)


def knobs(planner: Planner, plan: TrainPlan) -> list[Knob]:
    """Returns what options would save, each by itself, by closed forms; those of what the recipe does not have are
    left out."""
    recipe = planner.recipe()
    found = []
    for bindings in _options(recipe, plan):
        try:
            other = planner.traced(bindings)
        except UserError as error:
            found.append(Knob(bindings, why_not=first_line(error)))
            continue
        saves = plan.memory.total - other.memory.total
        found.append(Knob(bindings, saves, other.cost.least - plan.cost.least, other.fits))
    return sorted(found, key=lambda knob: -knob.saves)


def _options(recipe: Any, plan: TrainPlan) -> Iterator[tuple[str, ...]]:
    for remat in ("none", "minimal", "full"):
        if recipe.macro("REMAT") not in (None, remat):
            yield (f"REMAT='{remat}'",)
    for factor in (2, 8):
        number = plan.num_microbatches * factor
        if plan.batch_size % number == 0:
            yield (f"NUM_MICROBATCHES={number}",)
    for layout in ("fsdp", "fsdp_model"):
        if recipe.macro("LAYOUT") != layout and plan.where.slices == 1:
            yield (f"LAYOUT='{layout}'",)
    if recipe.macro("DTYPE") == "float32":
        yield ("DTYPE='bfloat16'",)
    for module, name, parameter, value in _OF_PARTS:
        if recipe.would_use(ROOT, module, name, parameter):
            yield (f"{module.rpartition('.')[2]}.{name}.{parameter}={value!r}",)


def knob_table(found: Sequence[Knob]) -> Table:
    """Returns the options as a table."""
    cells = [("an option by itself", "saves of a device", "adds to a step", "")]
    for each in found:
        if each.why_not:
            cells.append((each.words, "-", "-", each.why_not))
            continue
        sign = "-" if each.saves < 0 else ""
        added = f"{'-' if each.seconds < 0 else ''}{format_seconds(abs(each.seconds))}"
        cells.append((each.words, sign + format_bytes(abs(each.saves)), added, "" if each.fits else "does not fit"))
    return Table("", cells, (1, 2))


def placed(planner: Planner, refusal: UserError) -> tuple[Planner, TrainPlan, Candidate]:
    """Returns what a search begins with where the recipe cannot be cut as it is given: a planner that binds a layout
    and mesh by which it can, its plan, and these.

    Raises:
      UserError: `refusal`, where that is not by the layout or no other helps; or the batch divides over no mesh: the
        nearest that do.
    """
    batch_size, where = planner.recipe().macro("BATCH_SIZE"), planner.where
    layouts = dict(_layouts(planner, experts=False))

    def takes(candidate: Candidate, rows: int) -> bool:
        layout = layouts[candidate.layout]
        sizes = dict.fromkeys(layout.mesh.names, 1)
        sizes |= {axis: candidate.ici.get(axis, 1) * candidate.dcn.get(axis, 1) for axis in sizes}
        try:
            Rules(layout.activations, sizes, "Layout.activations").resolve(("batch",), (rows,), "a batch")
        except UserError:
            return False
        return True

    # Those that shard the batch most, first.
    ways = [each for each in candidates(layouts, where, batch_size, 1) if each.remat == "none"]
    ways.sort(key=lambda each: -next(iter(each.ici.values())))
    able = [each for each in ways if takes(each, batch_size)]
    for each in able[:_ATTEMPTS]:
        bindings = (*planner.invocation.bindings, *bindings_of(each)[:-2])  # remat and microbatches are the recipe's
        other = dataclasses.replace(planner, invocation=dataclasses.replace(planner.invocation, bindings=bindings))
        with contextlib.suppress(UserError):
            return other, other.traced(), each
    if able:
        raise refusal
    near = [
        next((rows for rows in rest if any(takes(each, rows) for each in ways)), 0)
        for rest in (range(batch_size - 1, 0, -1), range(batch_size + 1, batch_size + where.num_devices + 1))
    ]
    wanted = " or ".join(f"{rows:,}" for rows in near if rows)
    raise UserError(
        f"BATCH_SIZE={batch_size} divides over none of the {len(ways)} meshes of {where.name} that --fit tries"
        + (f"; the nearest that does is {wanted}" if wanted else "")
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a search found.

    Attributes:
      plans: the best, the fastest first, traced and perhaps compiled, with the bindings that make them.
      tried: every candidate, by rough closed forms.
      lost: mesh and layout -> why it is not among them, by its best or least.
    """

    plans: Sequence[tuple[Candidate, TrainPlan]]
    tried: Sequence[Rough]
    lost: Mapping[str, str]


def fit(planner: Planner, plan: TrainPlan, compiles: bool) -> Fit:
    """Searches mesh, layout, remat policy and microbatches for the fastest step that fits.

    Args:
      planner: of the recipe.
      plan: of the recipe as it is, traced.
      compiles: whether the compiler confirms the best.

    Raises:
      UserError: nothing fits.
    """
    deadline = time.monotonic() + _SECONDS
    program = planner.program()
    setting = setting_of(program)
    routed = _DISPATCHES[planner.recipe().macro("DISPATCH") or "all_to_all"]
    traced = Traced(
        dataclasses.replace(setting, uses=whole_uses(program, setting.parameters), dispatch=routed),
        program.explain(),
        program.batch_size,
        planner.model_flops,
        planner.where,
        planner.described,
        plan.capacity,
    )
    layouts = dict(_layouts(planner, any("expert" in weight.names for weight in setting.parameters)))
    rough = [
        traced.estimate(each, layouts[each.layout]) for each in candidates(layouts, planner.where, program.batch_size)
    ]
    kept, refused = _tried(planner, rough, plan.capacity, math.inf if compiles else deadline, compiles)
    if not kept:
        would = _what_would(traced, layouts, min((each.bytes for each in rough), default=math.inf))
        raise UserError(_nothing_fits(rough, refused, plan, would))
    lost = {**_explained(rough), **refused}
    for found, _ in kept:
        lost.pop(_group(found), None)
    kept.sort(key=lambda pair: pair[1].best_cost.estimate)
    return Fit(kept, rough, lost)


def _tried(
    planner: Planner, rough: Sequence[Rough], capacity: float, deadline: float, compiles: bool
) -> tuple[list[tuple[Candidate, TrainPlan]], dict[str, str]]:
    """Traces, and perhaps compiles, the best of each mesh and layout, until a few fit or it is late.

    Returns:
      those that fit; by mesh and layout, why others do not.
    """
    kept: list[tuple[Candidate, TrainPlan]] = []
    lost: dict[str, str] = {}
    scale: dict[tuple[str, str], float] = {}  # of a layout and policy: what tracing says beside the rough estimate
    attempts = 0
    for each in sorted((each for each in rough if not each.why_not), key=lambda each: each.seconds):
        name, bindings = _group(each.candidate), bindings_of(each.candidate)
        if any(_group(found) == name for found, _ in kept):
            continue
        kind = (each.candidate.layout, each.candidate.remat)
        likely = each.bytes * scale.get(kind, 1.0)
        if likely > capacity:
            lost.setdefault(name, f"{each.candidate.words}: likely {format_bytes(likely)}, by what was traced")
            continue
        if len(kept) == _CONFIRMED or attempts == _ATTEMPTS or (kept and time.monotonic() > deadline):
            break
        attempts += 1
        try:
            found = planner.traced(bindings)
            scale[kind] = max(scale.get(kind, 1.0), found.memory.total / each.bytes)
            if compiles and found.fits:
                found = planner.compiled(bindings)
        except UserError as error:  # of the recipe under this layout, or the compiler's
            lost[name] = f"{each.candidate.words}: {first_line(error)}"
            continue
        if found.fits:
            kept.append((each.candidate, found))
        else:
            lost[name] = f"{each.candidate.words}: {format_bytes(found.bytes)}, too much"
    return kept, lost


def _layouts(planner: Planner, experts: bool) -> Iterator[tuple[str, Any]]:
    names = [planner.recipe().macro("LAYOUT"), *(_ACROSS if planner.where.slices > 1 else _LAYOUTS)]
    if experts and planner.where.slices == 1:
        names += _OF_EXPERTS
    # A mesh that the command gives is the recipe's layout's, and the search chooses its own.
    free = [each for each in planner.invocation.bindings if not each.startswith("mesh.MeshShape.")]
    planner = dataclasses.replace(planner, invocation=dataclasses.replace(planner.invocation, bindings=tuple(free)))
    for name in dict.fromkeys(filter(None, names)):
        yield name, planner.recipe((f"LAYOUT={name!r}",)).build(ROOT)["layout"]


def bindings_of(candidate: Candidate) -> tuple[str, ...]:
    """Returns the bindings that make a recipe train so."""
    return (
        f"LAYOUT={candidate.layout!r}",
        f"mesh.MeshShape.ici={dict(candidate.ici)}",
        *([f"mesh.MeshShape.dcn={dict(candidate.dcn)}"] if candidate.dcn else []),
        f"REMAT={candidate.remat!r}",
        f"NUM_MICROBATCHES={candidate.microbatches}",
    )


def _group(candidate: Candidate) -> str:
    return candidate.words.partition(", remat")[0]


def _explained(rough: Sequence[Rough]) -> dict[str, str]:
    """Returns a line for each mesh and layout: how it does at its best, or why it cannot be."""
    lines: dict[str, str] = {}
    for each in sorted(rough, key=lambda each: (each.seconds, each.bytes)):
        name = _group(each.candidate)
        if name in lines:
            continue
        if not each.why_not:
            lines[name] = (
                f"{each.candidate.words}: about {format_seconds(each.seconds)}, {format_bytes(each.bytes)}; "
                f"bound by {each.cost.bound if each.cost else ''}"
            )
        elif each.cost is not None:
            lines[name] = f"{name}: needs {format_bytes(each.bytes)} at least, by remat {each.candidate.remat}"
        else:
            lines[name] = f"{name}: {each.why_not}"
    return lines


def _what_would(traced: Traced, layouts: Mapping[str, Any], least: float) -> str:
    """Returns the smallest larger slice that some way to train fits, by rough closed forms: as a flag and in words; ""
    where none is found in a few seconds.

    Args:
      least: bytes of a device that the least needs on this one; twice the chips halve it at best.
    """
    deadline, where, parts = time.monotonic() + _SECONDS, traced.where, 1
    while where.slices == 1 and where.num_devices < _MOST_TRIED:
        try:
            where, parts = layout_choice.doubled(where), 2 * parts
        except UserError:  # there is no larger slice
            break
        if least / parts > traced.capacity:
            continue
        there = dataclasses.replace(traced, where=where, devices=aot.described_devices(where), meshes={})
        for each in candidates(layouts, where, traced.batch_size):
            if time.monotonic() > deadline:
                return ""
            if each.remat == "full" and not there.estimate(each, layouts[each.layout]).why_not:
                return f"--topology={where.name} would hold it, by {each.words}"
    return ""


def _nothing_fits(rough: Sequence[Rough], refused: Mapping[str, str], plan: TrainPlan, would: str) -> str:
    least = min(rough, key=lambda each: each.bytes, default=None)
    if refused:
        needs = f"what was traced, first {next(iter(refused.values()))}"
    else:
        needs = f"the least takes about {format_bytes(least.bytes)} by {least.candidate.words}" if least else "none"
    return (
        f"no way to train fits {plan.where.name}, whose devices have {format_bytes(plan.capacity)} for a program: "
        f"{needs}; {would or 'take more chips'}; or take a smaller batch, or an optimizer with less state "
        "(optimizers/adafactor.gin)"
    )


def fit_table(found: Fit) -> Table:
    """Returns the best that a search found as a table."""
    cells = [("the fastest that fit", "a step", "at peak, from", "to", "MFU", "of a device", "bound by")]
    for candidate, plan in found.plans:
        cost = plan.best_cost
        cells.append(
            (
                candidate.words,
                format_seconds(cost.estimate),
                format_seconds(cost.least),
                format_seconds(cost.most),
                f"{plan.mfu(cost.estimate):.1%}",
                format_bytes(plan.bytes) + (" as compiled" if plan.compiled else ""),
                cost.bound,
            )
        )
    return Table(f"of {len(found.tried):,} ways to train:", cells, (1, 2, 3, 4, 5))


def first_flags(found: Fit) -> str:
    """Returns the flags of the best that a search found."""
    return "the first: " + " ".join(f'--gin."{each}"' for each in bindings_of(found.plans[0][0]))


def fit_lines(found: Fit) -> list[str]:
    """Returns the flags of the best that a search found, which ways are worth taking, and why others lost."""
    best = [
        f"on the frontier: {each.candidate.words}: about {format_seconds(each.seconds)}, {format_bytes(each.bytes)}"
        for each in frontier(found.tried)
    ]
    lost = [f"lost: {line if line.startswith(name) else f'{name}: {line}'}" for name, line in found.lost.items()]
    return [first_flags(found), *best, *lost]


def as_json(found: Sequence[Knob], fit: Fit | None) -> dict[str, Any]:
    """Returns options and what a search found as JSON holds them: bytes and seconds."""
    entry: dict[str, Any] = {"knobs": [dataclasses.asdict(each) for each in found]}
    if fit is None:
        return entry
    plans = [
        {
            "bindings": bindings_of(candidate),
            "bytes": plan.bytes,
            "is_compiled": plan.compiled is not None,
            "estimate": plan.best_cost.estimate,
            "least": plan.best_cost.least,
            "most": plan.best_cost.most,
            "bound": plan.best_cost.bound,
        }
        for candidate, plan in fit.plans
    ]
    best = [
        {"bindings": bindings_of(each.candidate), "seconds": each.seconds, "bytes": each.bytes}
        for each in frontier(fit.tried)
    ]
    return entry | {"fit": {"tried": len(fit.tried), "plans": plans, "frontier": best, "lost": dict(fit.lost)}}
