"""The layout that `--layout=auto` stands for: of the shipped layouts of inference the best by closed forms that the
model runs under, with the numbers that decided."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.distributed.processes import agree
from meshway.framework.errors import UserError
from meshway.framework.inference.engine import Workload, trace_decoding
from meshway.framework.inference.recipe_model import RecipeModel
from meshway.framework.interfaces import Model
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.planning.cost import Transformer
from meshway.framework.planning.dimensions import transformer_of
from meshway.framework.planning.hardware import topology_of
from meshway.framework.planning.layouts import (
    ONE_CHIP,
    Candidate,
    Estimate,
    Pass,
    Phase,
    candidates,
    estimates,
    why_behind,
)
from meshway.framework.planning.topology import Topology, topology
from meshway.framework.terminal import count_of, format_bytes
from meshway.launch.train_plan import asked_topology, format_seconds

if TYPE_CHECKING:
    from meshway.launch.invocation import Invocation

TRACED = {"inputs": 8, "targets": 8}  # lengths for a recipe without a task: sizes do not depend on them
_DOUBLINGS = 12
_TRIES = 48  # candidates that a model may refuse, each traced until it does
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """What a choice is for.

    Attributes:
      work: sequences and tokens.
      weight_bytes, cache_bytes: of an element of parameters, and of keys and values.
      flat, overlap: how the wires are read, and whether collectives go on beside products (`layouts.Pass`).
    """

    work: Workload
    weight_bytes: float = 2
    cache_bytes: float = 2
    flat: bool = True
    overlap: bool = False

    def passes(self, model: Transformer) -> dict[Phase, Pass]:
        """Returns a prompt's pass, and the last step's after it, whose cache is the largest."""
        work = self.work
        options: dict[str, Any] = {
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "overlap": self.overlap,
        }
        rows, known = work.batch * work.decodes, 0 if model.encoder_layers else work.prompt
        inputs = work.prompt if model.encoder_layers else 0
        return {
            "prefill": Pass("prefill", work.batch, work.prompt, work.prompt, **options),
            "decode": Pass("decode", rows, 1, known + work.new_tokens, inputs=inputs, **options),
        }


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was decided, and for what.

    Attributes:
      where: the devices.
      best: the layout.
      other: the best of another layout file, None where there is none.
      refused: better ones that do not run the model: name and mesh -> why.
    """

    where: Topology
    best: Candidate
    other: Candidate | None
    refused: Mapping[str, str]

    @property
    def flags(self) -> tuple[str, ...]:
        """What asks for it by name, on a command line."""
        mesh = f'--gin.mesh.MeshShape.ici="{dict(zip("xyz", self.best.mesh, strict=True))}"'
        return (f"--gin.LAYOUT={self.best.layout}", *([] if self.best.layout == ONE_CHIP else [mesh]))


Refusal = Callable[[Candidate], str]  # why a model does not run under a candidate, "" where it does
Flags = Mapping[str, str]  # of a verb, by what they change: weights, batch, topology; with {} for the value
INFER_FLAGS = {"weights": "--weights=int8", "batch": "--batch_size={}", "topology": "{}"}
SERVE_FLAGS = INFER_FLAGS | {"batch": "--slots={}"}


def choose(model: Transformer, where: Topology, request: Request, refusal: Refusal, flags: Flags) -> Choice:
    """Returns the best layout for prompts and the steps after them.

    Raises:
      UserError: none fits the memory: what would; or the model runs under none.
    """

    def ranked(request: Request, where: Topology) -> list[Candidate]:
        found = {name: estimates(model, what, where, request.flat) for name, what in request.passes(model).items()}
        return candidates(found["prefill"], found["decode"], request.work.new_tokens)

    found = ranked(request, where)
    if not found[0].fits:
        least = min((each.largest for each in found), key=lambda each: each.bytes)
        fitting = remedies(lambda *asked: ranked(*asked)[0].fits, request, where, flags)
        raise UserError(too_large("the run", least, where, fitting))
    refused: dict[str, str] = {}
    accepted: list[Candidate] = []
    tried: set[tuple[str, tuple[int, int, int]]] = set()
    for each in found:
        if not each.fits or (each.layout, each.mesh) in tried or each.layout in {one.layout for one in accepted}:
            continue
        tried.add((each.layout, each.mesh))
        if why := refusal(each):
            refused[f"{each.layout} on {_mesh(each)}"] = why
        else:
            accepted.append(each)
        if len(accepted) == 2 or len(refused) == _TRIES:
            break
    if not accepted:
        reasons = list(dict.fromkeys(refused.values()))
        raise UserError(
            f"no layout of inference runs this model on {where.name}: {'; '.join(reasons[:_SHOWN])} "
            f"({len(refused)} were tried); choose a layout that is not chosen by cost, as {_OTHERS}"
        )
    return Choice(where, accepted[0], accepted[1] if len(accepted) > 1 else None, refused)


_OTHERS = "--layout=data, model_1d or model_2d (meshway inspect says what each would shard)"


def remedies(fits: Callable[[Request, Topology], bool], request: Request, where: Topology, flags: Flags) -> list[str]:
    """Returns the flags with which what does not fit would: narrower weights, a smaller batch, more chips."""
    found = []
    if request.weight_bytes > 1 and fits(dataclasses.replace(request, weight_bytes=1), where):
        found.append(flags["weights"])
    batch = request.work.batch
    while batch > 1:
        batch //= 2
        if fits(dataclasses.replace(request, work=dataclasses.replace(request.work, batch=batch)), where):
            found.append(flags["batch"].format(batch))
            break
    larger = where
    for _ in range(_DOUBLINGS):
        try:
            larger = doubled(larger)
        except UserError:  # a machine's devices are no slice of which there are larger ones
            break
        if fits(request, larger):
            found.append(flags["topology"].format(larger.name))
            break
    return found


def too_large(what: str, least: Estimate, where: Topology, fitting: Sequence[str]) -> str:
    """Returns what is too large, and what would fit."""
    fits = f"; it fits with {' or '.join(fitting)}" if fitting else ""
    return (
        f"{what} does not fit: {where.name} has {format_bytes(where.chip.memory_bytes)} a chip, and the layout "
        f"that needs least keeps {format_bytes(least.weights)} of weights, {format_bytes(least.cache)} of keys and "
        f"values and {format_bytes(least.activations)} of activations there{fits}"
    )


def doubled(where: Topology) -> Topology:
    """Returns a topology of twice as many chips, its shortest side twice as long; UserError where there is none."""
    family, _, sides = where.name.partition(":")
    sizes = [int(side) for side in sides.split("x")]
    shortest = sizes.index(min(sizes))
    sizes[shortest] *= 2
    return topology(f"{family}:{'x'.join(map(str, sizes))}")


def refusal_of(
    model: Model, layout_of: Callable[[Candidate], Layout], devices: Sequence[Any], work: Workload
) -> Refusal:
    """Returns what traces the decoding of a batch under a candidate, and says why that fails."""

    def why(candidate: Candidate) -> str:
        layout = layout_of(candidate)
        try:
            trace_decoding(ShardedModel(model, layout, devices), work)
        except (UserError, ValueError) as error:
            return str(error)
        return ""

    return why


def reader(invocation: "Invocation", root: str) -> Callable[[Candidate], Layout]:
    """Returns what reads the layout file of a candidate, as `root` of a verb takes it: behind the recipe, whose own
    layout it replaces."""
    from meshway.launch.recipe import config

    @functools.cache
    def read(name: str) -> Layout:
        asked = dataclasses.replace(
            invocation, bindings=(*invocation.bindings, f"LAYOUT={name!r}"), subject=root.rpartition(".")[2]
        )
        found: Layout = config.load(asked, import_unreferenced=False, shown=False).build(root)["layout"]
        return found

    def of(candidate: Candidate) -> Layout:
        found = copy.copy(read(candidate.layout))
        if candidate.layout != ONE_CHIP:
            found.mesh = MeshShape(dict(zip("xyz", candidate.mesh, strict=True)))
        return found

    return of


def with_layout(
    invocation: "Invocation",
    opened: RecipeModel,
    work: Workload,
    described: str | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> RecipeModel:
    """Returns what a recipe says of inference, with the layout that is best for `work` on the devices at hand.

    Args:
      invocation: of a verb with `infer.opened`, its layout `ONE_CHIP`.
      opened: of it.
      described: what the devices are counted as, a topology's name; None for what they are.
      say: is told what was decided, a line at a time.

    Raises:
      UserError: the model's costs are not known, it does not fit, or it runs under no layout of inference.
    """
    devices = jax.devices()
    try:
        where = topology_of(devices) if described is None else asked_topology(described)
    except UserError as error:
        advice = "say by --topology what to count the devices as, or name a layout"
        raise UserError(f"--layout=auto: {error}; {advice}") from error
    if where.num_devices != len(devices) or where.slices > 1:
        raise UserError(
            f"--topology={where.name} has {where.num_devices} devices, of one slice; here are {len(devices)}"
        )
    try:
        sizes, _ = transformer_of(opened.model, opened.lengths or TRACED)
    except UserError as error:
        raise UserError(
            f"--layout=auto: {error}; choose a layout by name, as {_OTHERS}, or expert for a mixture"
        ) from error
    read, request = reader(invocation, "infer.opened"), _request(opened, work)
    refusal = refusal_of(opened.model, read, devices, work)
    flags = SERVE_FLAGS if invocation.verb == "serve" else INFER_FLAGS
    choice = choose(sizes, where, request, refusal, flags)
    for line in lines(choice):
        say(line)
    # Every process has counted; free memory, by which simulated devices are, may differ from machine to machine.
    agree({"layout": " ".join(choice.flags)})
    return dataclasses.replace(opened, layout=read(choice.best))


def _request(opened: RecipeModel, work: Workload) -> Request:
    """Returns a request with the types that the recipe's parameters, and its keys and values, are stored in."""
    sharded = ShardedModel(opened.model, opened.layout, jax.local_devices()[:1])
    cache = trace_decoding(sharded, work)
    weights: float = {"int8": 1.0, "int4": 0.5}.get(opened.weights or "", _itemsize(sharded.param_shapes))
    return Request(work, weights, _itemsize(cache))


def _itemsize(tree: Any) -> float:
    """Returns the bytes of an element of a tree's largest array."""
    return float(max(jax.tree.leaves(tree), key=lambda leaf: leaf.size).dtype.itemsize)


def lines(choice: Choice) -> list[str]:
    """Returns a decision with its numbers, as text."""
    best, where = choice.best, choice.where
    most = best.largest
    found = [
        f"one copy of the weights, for a prompt and {count_of(best.steps, 'step')} of decoding "
        f"({format_seconds(best.seconds)}): {' '.join(choice.flags)}",
        *(f"  {_phase(each)}" for each in (best.prefill, best.decode)),
        f"  {format_bytes(most.bytes)} of a chip's {format_bytes(where.chip.memory_bytes)}: "
        f"{format_bytes(most.weights)} of weights, {format_bytes(most.cache)} of keys and values, "
        f"{format_bytes(most.activations)} of activations",
    ]
    if choice.other:
        found.append(
            f"  next {choice.other.layout} on {_mesh(choice.other)} ({format_seconds(choice.other.seconds)}): "
            f"{why_behind(choice.other, best)}"
        )
    for name, why in itertools.islice(choice.refused.items(), _SHOWN):
        found.append(f"  passed over {name}: {why}")
    if (left := len(choice.refused) - _SHOWN) > 0:
        found.append(f"  and {left} more that the model does not run under")
    return found


def _phase(each: Estimate) -> str:
    what = each.what
    name = (
        f"prefill of {count_of(what.batch, 'sequence')}, {what.length:,} tokens each, by"
        if what.phase == "prefill"
        else f"a step of {count_of(what.batch, 'sequence')}, decoding by"
    )
    terms = ", ".join(
        f"{word} {format_seconds(seconds)}"
        for word, seconds in (("compute", each.compute), ("memory", each.memory), ("sent", each.communication))
    )
    return f"{name} {each.feed_forward} and {each.attention}: {format_seconds(each.seconds)} ({terms})"


def _mesh(each: Candidate) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in zip("xyz", each.mesh, strict=True))
