"""meshway plan: what a model costs on a slice of chips, before any chip is paid for.

    meshway plan --gin_file=models/palm/540b.gin --topology=v4:4x4x4 --batch=64 --context=2048

A recipe that trains gets a plan of its step (`train_plan.py`). Of others, this
reads a recipe's model, computes no array, and prints for prefill and decoding what each inference layout of Pope et al.
2022 costs: time and what it is spent on, memory of a chip, price of a token.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from meshway.framework.errors import UserError, first_line
from meshway.framework.files import io_errors, local_path
from meshway.framework.inference.engine import Workload
from meshway.framework.interfaces import Model
from meshway.framework.planning import aot
from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.dimensions import transformer_of
from meshway.framework.planning.layouts import Candidate, Estimate, Pass, Phase, estimates
from meshway.framework.planning.topology import Topology
from meshway.framework.terminal import count_of, format_bytes, format_columns
from meshway.launch import layout_choice, plan_page, plan_programs, plan_variants, train_plan
from meshway.launch.layout_choice import Choice, Request
from meshway.launch.train_plan import format_seconds

if TYPE_CHECKING:
    from meshway.framework.partitioning.partitioner import Layout
    from meshway.framework.training.program import TrainProgram
    from meshway.launch.recipe.config import Invocation

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
_SHOWN = 8  # layouts of a phase in the printed table; as JSON there are all
_SWITCHED = 8  # GPUs that the switch of a machine joins
_FLAGS = {"weights": "--weights=int8", "batch": "--batch={}", "topology": "--topology={}"}

Dtype = Literal["float32", "bfloat16", "int8"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What was found.

    Attributes:
      num_params: of the model, norms and biases too.
      phases: phase -> every layout, the best first.
      request: what was asked for.
      choice: the layout file for both, which `infer --layout=auto` takes; None where there is none.
      no_choice: why there is none.
    """

    model: Transformer
    num_params: int
    where: Topology
    passes: Mapping[Phase, Pass]
    phases: Mapping[Phase, Sequence[Estimate]]
    request: Request
    choice: Choice | None
    no_choice: str = ""


def plan(
    model: Model,
    lengths: Mapping[str, int] | None,
    topology: str,
    phase: Phase | None = None,
    batch: int = 1,
    context: int = 2048,
    new_tokens: int = 128,
    weights: Dtype = "bfloat16",
    cache: Dtype = "bfloat16",
    wires: Literal["flat", "torus"] = "flat",
    overlap: bool = False,
    layouts: Callable[[Candidate], "Layout"] | None = None,
) -> Plan:
    """Returns what inference costs by each layout on a slice of chips.

    Args:
      model: a recipe's.
      lengths: tokens by task feature, as the recipe has them; None for a recipe without a task.
      topology: chips, as `v5p:4x4x8` or `h100:8`.
      phase: None for both.
      batch: sequences.
      context: tokens of the prompt, without those that are new; with `phase` 'decode' those that the last step attends
        to, with those that are new. Of a model with an encoder its inputs.
      new_tokens: steps of decoding that follow one prefill, where one copy of the weights serves both.
      weights, cache: types that parameters, and keys and values, are stored in; products are in bfloat16.
      wires: flat, where each collective has all of a chip's links, or torus, where it has those of its axes.
      overlap: whether collectives go on beside products.
      layouts: reads the layout file of a candidate, which the model is traced under; None: it is not.

    Raises:
      UserError: there is no such topology, the model is no dense transformer that decodes, or it does not fit.
    """
    where = _topology(topology)
    sizes, num_params = transformer_of(model, lengths or layout_choice.TRACED)
    prompt = context
    if phase == "decode" and not sizes.encoder_layers:
        prompt = max(1, context - new_tokens)
        new_tokens = max(1, context - prompt)
    work = Workload(batch, prompt, new_tokens)
    request = Request(work, ITEMSIZES[weights], ITEMSIZES[cache], wires == "flat", overlap)
    passes = {name: what for name, what in request.passes(sizes).items() if phase in (None, name)}
    found = {name: estimates(sizes, what, where, request.flat) for name, what in passes.items()}
    for name, ranked in found.items():
        if not ranked[0].fits:
            raise UserError(_too_large(sizes, name, request, where, ranked))
    refusal = (
        (lambda _: "")
        if layouts is None
        else layout_choice.refusal_of(model, layouts, aot.described_devices(where), work)
    )
    choice, why = None, ""
    try:
        choice = layout_choice.choose(sizes, where, request, refusal, _FLAGS)
    except UserError as error:
        why = str(error)
    return Plan(sizes, num_params, where, passes, found, request, choice, why)


def _topology(name: str) -> Topology:
    where = train_plan.asked_topology(name)
    if where.slices > 1:
        raise UserError(f"--topology={name}: inference is planned for one slice; leave x{where.slices}slices out")
    return where


def _too_large(model: Transformer, phase: Phase, request: Request, where: Topology, ranked: Sequence[Estimate]) -> str:
    """Returns what is too large in a phase, and what would fit."""

    def fits(request: Request, where: Topology) -> bool:
        return estimates(model, request.passes(model)[phase], where, request.flat)[0].fits

    fitting = layout_choice.remedies(fits, request, where, _FLAGS)
    return layout_choice.too_large(phase, min(ranked, key=lambda each: each.bytes), where, fitting)


def format_plan(found: Plan) -> str:
    """Returns a plan as text: a table of each phase, and what serves both."""
    where, model = found.where, found.model
    cores = f" of {where.chip.cores} devices" if where.chip.cores > 1 else ""
    kind = f"{where.num_chips:,} x {where.kind}{cores}"
    heads = f"{model.num_heads} heads, {model.num_kv_heads} of keys and values, of {model.head_dim}"
    blocks = f"{model.layers} layers" + (f" after {model.encoder_layers} of an encoder" if model.encoder_layers else "")
    block = f"{'gated' if model.gated else 'ungated'}, {'parallel' if model.parallel else 'serial'}"
    lines = [
        f"{where.name}: {kind}, {format_bytes(where.chip.memory_bytes)} each",
        f"{found.num_params:,} parameters: {blocks}, d_model {model.d_model}, d_ff {model.d_ff} ({block}), {heads}",
    ]
    for phase, ranked in found.phases.items():
        lines += ["", _title(found.passes[phase]), *_table(_distinct(ranked)), *_in_rings(ranked[0])]
    lines += ["", *(layout_choice.lines(found.choice) if found.choice else [found.no_choice])]
    if not where.chip.torus and where.num_chips > _SWITCHED:
        lines += [
            "",
            f"GPUs are counted as joined by one switch; a machine's joins {_SWITCHED}, and its network is slower",
        ]
    lines += [
        "",
        "estimates of closed forms (docs/planning.md): what a chip reaches of its published peaks is not in",
    ]
    return "\n".join(lines)


def _title(what: Pass) -> str:
    sequences = count_of(what.batch, "sequence")
    if what.phase == "prefill":
        return f"prefill of {sequences}, {what.length:,} tokens each"
    inputs = f" and {what.inputs:,} of inputs" if what.inputs else ""
    return f"a step of decoding of {sequences}, {what.context:,} tokens{inputs} each"


_HEAD = (
    "mesh x,y,z",
    "feed-forward",
    "attention",
    "time",
    "compute",
    "memory",
    "sent",
    "MFU",
    "a chip",
    "chip-ms/token",
)


def _table(ranked: Sequence[Estimate]) -> list[str]:
    rows = [
        (
            _mesh(each),
            each.feed_forward,
            each.attention,
            format_seconds(each.seconds),
            format_seconds(each.compute),
            format_seconds(each.memory),
            format_seconds(each.communication),
            f"{each.mfu:.0%}",
            format_bytes(each.bytes) if each.fits else f"{format_bytes(each.bytes)}, too much",
            f"{1000 * each.chip_seconds_per_token:,.3g}",
        )
        for each in ranked[:_SHOWN]
    ]
    left = len(ranked) - _SHOWN
    return format_columns([_HEAD, *rows], right=range(3, len(_HEAD))) + ([f"... and {left} more"] if left > 0 else [])


def _in_rings(best: Estimate) -> list[str]:
    """Returns a line on what collectives that go around rings beside their products would save of the best layout."""
    if not best.num_collectives:
        return []
    seconds = {"one_way": best.one_way, "bidirectional": best.bidirectional}
    ways = " or ".join(f"'{name}' {format_seconds(each)}" for name, each in seconds.items())
    return [f"the first with Layout.products = {ways}: collectives in rings beside products"]


def _distinct(ranked: Sequence[Estimate]) -> list[Estimate]:
    """Returns the estimates without those that equal a better one in all but the mesh."""
    seen: dict[tuple[str, str, float, float], Estimate] = {}
    for each in ranked:
        seen.setdefault((each.feed_forward, each.attention, each.seconds, each.bytes), each)
    return list(seen.values())


def _mesh(each: Estimate) -> str:
    return ",".join(map(str, each.mesh.sizes))


def as_json(found: Plan) -> dict[str, Any]:
    """Returns a plan as JSON holds it: seconds, bytes, shares."""
    return {
        "topology": {"name": found.where.name, "kind": found.where.kind, "chips": found.where.num_chips},
        "model": dataclasses.asdict(found.model) | {"num_params": found.num_params},
        "phases": {
            phase: {"pass": dataclasses.asdict(found.passes[phase]), "layouts": [_entry(each) for each in ranked]}
            for phase, ranked in found.phases.items()
        },
        "choice": _chosen(found.choice) if found.choice else None,
    }


def _chosen(found: Choice) -> dict[str, Any]:
    best, other = found.best, found.other
    return {
        "layout": best.layout,
        "mesh": best.mesh,
        "seconds": best.seconds,
        "steps": best.steps,
        "prefill": _entry(best.prefill),
        "decode": _entry(best.decode),
        "next": {"layout": other.layout, "mesh": other.mesh, "seconds": other.seconds} if other else None,
        "refused": dict(found.refused),
    }


def _entry(each: Estimate) -> dict[str, Any]:
    names = ("feed_forward", "attention", "seconds", "compute", "memory", "communication", "bound", "mfu", "fits")
    rings = ("one_way", "bidirectional")
    sizes = ("weights", "cache", "activations", "bytes", "chip_seconds_per_token")
    return {"mesh": each.mesh.sizes} | {name: getattr(each, name) for name in (*names, *rings, *sizes)}


@dataclasses.dataclass(frozen=True)
class Training:
    """What a recipe, and the command, bind for a plan of training.

    Attributes:
      program: makes the program of its step on the devices that it is given.
      layout: of it.
      attention: the kernel by which the model's FLOPs are counted.
      analytic: whether nothing is compiled.
      fit: whether to search for the fastest way to train that fits.
      html: the page to write, None for none.
    """

    program: Callable[..., "TrainProgram"]
    layout: "Layout"
    attention: Callable[..., Any]
    analytic: bool = False
    fit: bool = False
    html: str | None = None


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    import jax

    from meshway.launch.recipe import config

    jax.config.update("jax_platforms", "cpu")  # nothing is computed: accelerators stay free
    options = invocation.options
    if options.phase == "train" or (options.phase is None and trains(invocation)):
        _plan_training(invocation)
        return
    if wrong := [f"--{name}" for name in ("analytic", "fit", "html") if getattr(options, name)]:
        raise UserError(
            f"{' and '.join(wrong)}: for plans of training alone; give a recipe with an optimizer, or --phase=train"
        )
    if options.phase == "score" and not options.compile:
        raise UserError("--phase=score is planned by compiling it: add --compile")
    invocation = dataclasses.replace(invocation, subject="plan")
    layouts = layout_choice.reader(invocation, "plan.served")
    asked = config.load(invocation, import_unreferenced=False).build("plan.plan")
    # What scoring costs by closed forms is what a prompt of as many tokens does.
    phase: Phase | None = "prefill" if options.phase == "score" else options.phase
    found = plan(**asked, phase=phase, layouts=layouts)
    programs = None
    if options.compile:
        wanted = plan_programs.Asked(found.model, found.where, found.request, found.choice, found.no_choice)
        programs = plan_programs.compiled(invocation, wanted, options.phase, layouts)
    if options.json:
        compiled = {"compiled": plan_programs.as_json(programs)} if programs else {}
        print(json.dumps(as_json(found) | compiled, indent=2))
    else:
        print(format_plan(found) + (f"\n\n{plan_programs.format_programs(programs)}" if programs else ""))
    if programs and (large := [each.phase for each in programs if each.total > each.capacity]):
        raise UserError(
            f"{' and '.join(large)} as compiled does not fit {found.where.name}; take more chips, a smaller --batch or "
            "--weights=int8"
        )


def _plan_training(invocation: "Invocation") -> None:
    """Prints the plan of a recipe's training.

    Raises:
      UserError: a flag or the recipe is wrong, libtpu is missing, or the step does not fit: what would. With `--fit` a
        layout that the batch or the model does not divide over is none: the search begins with another.
    """
    planner = train_plan.planner_of(invocation)
    asked, refusal = Training(**planner.recipe().build(train_plan.ROOT)), ""
    if not asked.analytic:
        aot.compiled_for(planner.where)  # what is missing is said before seconds are spent
    if asked.html and not (folder := local_path(asked.html).parent).is_dir():
        raise UserError(f"--html={asked.html}: there is no folder {folder}")
    instead: dict[str, str] = {}
    try:
        traced = found = planner.traced()
    except UserError as error:
        if not asked.fit:
            raise
        planner, traced, way = plan_variants.placed(planner, error)
        found, instead = traced, {"given": first_line(error), "planned_instead": way.words}
    if not asked.analytic and not asked.fit:
        try:
            found = planner.compiled()
        except aot.TooLarge as error:
            refusal = str(error)
    options_found = plan_variants.knobs(planner, traced)
    fit = plan_variants.fit(planner, traced, compiles=not asked.analytic) if asked.fit else None
    if invocation.options.json:
        print(json.dumps(train_plan.as_json(found) | plan_variants.as_json(options_found, fit) | instead, indent=2))
    else:
        parts = [f"as given: {instead['given']}\nplanned instead: {instead['planned_instead']}"] if instead else []
        parts += [train_plan.format_plan(found), "\n".join(plan_variants.knob_table(options_found).lines)]
        parts += ["\n".join([*plan_variants.fit_table(fit).lines, "", *plan_variants.fit_lines(fit)])] if fit else []
        print("\n\n".join(parts))
    if asked.html:
        path = local_path(asked.html)
        with io_errors(path):
            path.write_text(plan_page.page(found, options_found, fit), encoding="utf-8")
    if not fit and (refusal or not found.fits):
        remedies = [each.words for each in options_found if each.fits]
        fits = (
            f"by closed forms it fits with {' or with '.join(remedies)}" if remedies else "no single option is enough"
        )
        needs = f"the step needs {format_bytes(found.bytes)} of the {format_bytes(found.capacity)} of a device"
        raise UserError(f"{refusal or needs}; {fits}; --fit searches for the fastest way that does")


def served(layout: "Layout") -> "Layout":
    """Returns a layout that inference may have: what `runs/plan.gin` binds."""
    return layout


def trains(invocation: "Invocation") -> bool:
    """Whether a command's recipe says how its model is trained: it binds an optimizer."""
    from meshway.launch.recipe import files

    joined = files.join(invocation, files.GinFiles(invocation.search_paths))
    return any(each.is_macro and each.parameter == "OPTIMIZER" and not each.is_default for each in joined.bindings)


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["plan", *sys.argv[1:]]))
