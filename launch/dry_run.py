"""`meshway train --dry_run`: all that a run does before its first step, but for writing, caching and compiling."""

import dataclasses
from collections.abc import Sequence

from meshway.framework.checkpoints.manager import Checkpoints, Keep
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.data.source import DataSource, SplitRead
from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.evaluation.schedule import OWN, EvalDataset, Schedule
from meshway.framework.files import holder_of, local_path
from meshway.framework.terminal import format_columns
from meshway.framework.training.loop import Periods
from meshway.framework.training.program import TrainProgram, open_data
from meshway.framework.training.run_directory import RunDirectory


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
) -> Resolved:
    """Checks what a run checks before it traces its step, with its own calls; nothing is written.

    Raises:
      UserError: as `train.train`.
    """
    schedule, own = Schedule(train_eval, infer_eval, periods.evaluate, evaluation), data
    data = getattr(data, "for_dry_run", lambda: data)()
    directory, notes = None, list[str]()
    if model_dir is not None:
        directory = RunDirectory(local_path(model_dir))
        notes = _look(directory, program, periods, keep)
    resumed = directory if directory is not None and _last(directory, keep) else None
    _, vocabularies, framing = open_data(program, data)
    if resumed is not None:
        resumed.check_vocabularies(vocabularies, framing)
    elif initial is not None:
        initial.check(program.param_shapes, program.axes)
        notes.append(f"parameters start from {initial.path}")
    passes = schedule.open(program.sharded, own, is_dry=True)
    notes += [line for each in passes for line in each.evaluator.left_out]
    reads = [*(data.reads(False) if hasattr(data, "reads") else ()), *schedule.reads(own)]
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


def _look(directory: RunDirectory, program: TrainProgram, periods: Periods, keep: Keep) -> list[str]:
    """Checks a run directory, and returns notes on it."""
    rows = program.explain()
    directory.check(sum(row.total_bytes for row in rows if not row.name.startswith("batch")))
    notes = []
    if holder := holder_of(directory.lock):
        notes.append(f"{directory.root} is being trained by {holder}: a second run would be refused")
    if last := _last(directory, keep):
        Checkpoints(directory.checkpoints, keep, read_only=True).check(last, program.abstract_state)
        reached = f"; TRAIN_STEPS={periods.total} is reached already" if last >= periods.total else ""
        notes.append(f"{directory.root} goes on from its checkpoint {last}{reached}")
    return notes


def _last(directory: RunDirectory, keep: Keep) -> int:
    """Returns the step of the last checkpoint, 0 for none."""
    keep.policy()
    if not directory.checkpoints.is_dir():
        return 0
    return max(Checkpoints(directory.checkpoints, keep, read_only=True).steps(), default=0)


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
