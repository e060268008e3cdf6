"""`meshway train --dry_run`: all that a run does before its first step, but for writing, caching and compiling.

`meshway launch` checks the same before a training is submitted: the hosts' devices are played by simulated ones of this
process, as many as the place was asked for.
"""

import dataclasses
import importlib.util
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.checkpoints import continuation
from meshway.framework.checkpoints.manager import Checkpoints, Keep
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.data.prefetch import BatchSizes, check_not_trained
from meshway.framework.data.source import DataSource, SplitRead, for_dry_run, reads_of
from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import EnvironmentFailure, UserError, first_line
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.evaluation.schedule import OWN, EvalDataset, Schedule, begin_hooks
from meshway.framework.files import holder_of, local_path, open_path
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.terminal import format_columns
from meshway.framework.training.hooks import Hook
from meshway.framework.training.loop import Periods
from meshway.framework.training.program import TrainProgram, open_data
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch.cluster.job import Chips

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Recipe


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a recipe comes to: by name, the splits that are read, and what there is to say of it."""

    found: dict[str, str]
    reads: Sequence[SplitRead]
    notes: Sequence[str]


def check(
    program: TrainProgram,
    data: DataSource,
    model_dir: str | None,
    periods: Periods,
    evaluation: Evaluation = Evaluation(),
    keep: Keep = Keep(),
    initial: Initial | None = None,
    train_eval: Sequence[EvalDataset] | None = OWN,
    infer_eval: Sequence[EvalDataset] | None = OWN,
    hooks: Sequence[Hook] = (),
    batch_size_schedule: Sequence[tuple[int, int]] = (),
    skip_batches: Sequence[tuple[int, int]] = (),
) -> Resolved:
    """Checks what a run checks before it traces its step, with its own calls; nothing is written.

    Raises:
      UserError: as `train.train`.
    """
    schedule, own = Schedule(train_eval, infer_eval, periods.evaluate, evaluation), data
    data = for_dry_run(data)
    directory = None if model_dir is None else RunDirectory(open_path(model_dir))
    saved = None if directory is None else _saved(directory, keep)
    first, periods, initial = continuation.counted(program, periods, initial, saved)
    notes = [] if directory is None else _look(directory, program, periods, saved)
    for size in BatchSizes(program.batch_size, batch_size_schedule).after(0):
        program.of_size(size)  # raises where it is not divisible over the mesh
    _, vocabularies, framing = open_data(program, data, batch_size_schedule, skip_batches)
    if directory is not None and saved is not None:
        directory.check_vocabularies(vocabularies, framing)
        last = max(steps := saved.steps())
        check_not_trained(skip_batches, saved.position(last), last, saved.first_step, steps)
    elif initial is not None:
        continuation.check(initial, program.state_shapes, program.axes)
        notes.append(f"parameters start from {initial.path}")
        notes += filter(None, [continuation.restart_note(initial, first)])
    passes = schedule.open(program.sharded, own, is_dry=True)
    begin_hooks(hooks, passes, None, 0)
    notes += [line for each in passes for line in each.evaluator.left_out]
    reads = [*reads_of(data, False), *schedule.reads(own)]
    names = dict.fromkeys(name for each in passes for name in each.names)
    found = _resolved(program, data, vocabularies, list(names))
    if framing is not None:
        found["texts"] = f"a decoder starts from {list(framing.start)}, a prediction ends at {list(framing.stop)}"
    return Resolved(found, reads, notes)


def described(resolved: Resolved) -> str:
    """Returns for people what a recipe comes to."""
    rows = [[f"{name}:", each] for name, each in resolved.found.items()]
    parts = ["\n".join(format_columns(rows)), _splits(resolved.reads), "\n".join(resolved.notes)]
    return "\n\n".join(filter(None, parts))


def _look(directory: RunDirectory, program: TrainProgram, periods: Periods, saved: Checkpoints | None) -> list[str]:
    """Checks a run directory, and returns notes on it."""
    directory.check(program.explain())
    notes = []
    if holder := holder_of(directory.lock):
        notes.append(f"{directory.root} is being trained by {holder}: a second run would be refused")
    if saved is not None:
        last = max(saved.steps())
        saved.check(last, program.abstract_state)
        reached = f"; step {periods.last} is reached already" if last >= periods.last else ""
        notes.append(f"{directory.root} goes on from its checkpoint {last}{reached}")
    return notes


def _saved(directory: RunDirectory, keep: Keep) -> Checkpoints | None:
    """Returns the checkpoints of a run, None where it has none."""
    keep.policy()  # raises for what cannot be kept
    if not directory.checkpoints.is_dir():
        return None
    found = Checkpoints(directory.checkpoints, keep, read_only=True)
    return found if found.steps() else None


def _resolved(
    program: TrainProgram, data: DataSource, vocabularies: dict[str, Vocabulary], tasks: Sequence[str]
) -> dict[str, str]:
    """Returns what the recipe comes to, by name."""
    mesh = ", ".join(f"{name}={size}" for name, size in program.partitioner.mesh.shape.items())
    readers: dict[str, list[str]] = {}
    for name, vocabulary in vocabularies.items():
        readers.setdefault(str(vocabulary), []).append(name)
    described = "; ".join(f"{' and '.join(names)}: {vocabulary}" for vocabulary, names in readers.items())
    converter = getattr(data, "converter", None)
    return {
        "model": type(program.model).__name__,
        "optimizer": program.optimizer_name,
        "mesh": mesh,
        "data": f"{type(data).__name__} {getattr(data, 'name', '')}".strip(),
        "converter": type(converter).__name__ if converter is not None else "none",
        "feature lengths": ", ".join(f"{name} {length:,}" for name, length in program.lengths.items()) or "none",
        "batch": f"{program.batch_size:,} examples"
        + (f" in {program.num_microbatches} microbatches" if program.num_microbatches > 1 else ""),
        "vocabularies": described or "none",
        "evaluated on": ", ".join(tasks) or "nothing",
    }


def _splits(reads: Sequence[SplitRead]) -> str:
    """Returns a table of the splits that are read."""
    states = {True: "cached", False: "not cached yet: in its source", None: "streamed"}
    rows = [["task", "split", "for", "examples", ""]]
    for each in reads:
        count = "?" if each.examples is None else f"{each.examples:,}"
        rows.append([each.task, each.split, each.purpose, count, states[each.cached]])
    return "\n".join(format_columns(rows, right=(3,))) if reads else ""


_MOST = 1024  # simulated devices of a process: each costs two threads


def check_training(recipe: "Recipe", chips: Chips | None) -> list[str]:
    """Checks task, split, vocabularies, converter, values, and whether the layout fits the devices that were asked for.

    Args:
      recipe: of the training.
      chips: the devices of the place; None where what was asked for does not tell.

    Returns:
      what only the hosts can check, in words.

    Raises:
      UserError: what the run would say there.
    """
    left = [
        f"the module {name} is not here: the task, its splits and vocabularies are left to the hosts to check"
        for name in _modules(recipe.macro("MIXTURE_OR_TASK_MODULE"))
        if not _is_here(name)  # one that is missing from a package that is here is a mistake
    ]
    mesh = vars(MeshShape()) | recipe.literals(MeshShape.__module__, MeshShape.__name__)
    if chips is not None:
        _check_mesh(mesh, chips)
    _simulate(_num_devices(mesh, chips))
    arguments = recipe.build("train.train", given=["resolved", "began"])
    arguments["program"].trace_loss()
    if left:
        return left
    known = inspect.signature(check).parameters
    given = {name: value for name, value in arguments.items() if name in known}
    if not local_path(given["model_dir"]).is_dir():
        given["model_dir"] = None  # where the hosts mount it
    initial = given.get("initial")
    if initial is not None and initial.path and not initial.is_here:
        left.append(f"{initial.path}, where parameters start from, is not here: left to the hosts to check")
        given["initial"] = None
        if (periods := given["periods"]).relative is not None:  # counted from a step that only the hosts know
            given["periods"] = dataclasses.replace(periods, total=periods.relative, relative=None)
    try:
        check(**given)
    except (OSError, EnvironmentFailure) as error:  # what it reads is on the hosts
        left.append(f"its data cannot be read here ({first_line(error)}): left to the hosts to check")
    return left


def _modules(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]


def _is_here(module: str) -> bool:
    """Whether a module's package can be imported here."""
    package = module.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _check_mesh(mesh: Mapping[str, Any], chips: Chips) -> None:
    """Raises UserError where the mesh cannot be made of the devices that were asked for."""
    sizes = [*mesh["ici"].values(), *mesh["dcn"].values()]
    fixed, free = math.prod(size for size in sizes if size != -1), -1 in sizes
    if fixed < 1:
        return  # said by MeshShape itself
    said = f"the mesh ici={dict(mesh['ici'])} dcn={dict(mesh['dcn'])}"
    if fixed > chips.devices or (free and chips.devices % fixed):
        raise UserError(
            f"{said} needs {'a multiple of ' if free else ''}{fixed} devices, and {chips.words} has {chips.devices}: "
            "change MeshShape, or what is asked for"
        )
    if not free and fixed <= chips.devices - chips.devices // chips.hosts:
        raise UserError(
            f"{said} takes {fixed} of the {chips.devices} devices of {chips.words} and leaves hosts without any: make "
            f"the product of its sizes {chips.devices}, or give one axis -1"
        )


def _num_devices(mesh: Mapping[str, Any], chips: Chips | None) -> int:
    """Returns how many devices to play: those of the place, or the most or the least of which such a mesh is made."""
    fixed = max(1, math.prod(size for part in mesh.values() for size in part.values() if size != -1))
    if chips is None:
        return fixed
    return chips.devices if chips.devices <= _MOST else max(1, _MOST // fixed) * fixed


def _simulate(devices: int) -> None:
    """Makes this process one of so many CPU devices; where JAX has begun, those that it has must do."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return
