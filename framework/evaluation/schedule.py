"""The evaluations of a training run: of what, how often, and where goes what they find."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from meshway.framework import terminal
from meshway.framework.data.source import DataSource, EvalTask, SplitRead, for_dry_run, other_split, reads_of, tasks_of
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator, Report, TaskResult
from meshway.framework.evaluation.records import Record, Records, record_name
from meshway.framework.interfaces import Params
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.training.hooks import EvaluationHook, Hook
from meshway.framework.training.program import check_batch, check_vocabularies
from meshway.framework.training.run_directory import RunDirectory
from meshway.framework.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class EvalDataset:
    """What a training run evaluates besides its steps, and how often; T5X's `train_eval` and `infer_eval` are lists of
    these.

    Attributes:
      data: where the tasks come from, with lengths and a batch size of its own; None: the run's own data.
      split: which split of it; None: its validation split.
      period: steps between evaluations; None: that of the run (EVAL_PERIOD).
      evaluation: the settings; None: those of the run.
    """

    data: DataSource | None = None
    split: str | None = None
    period: int | None = None
    evaluation: Evaluation | None = None

    def __post_init__(self) -> None:
        if self.period is not None and self.period < 1:
            raise UserError(f"EvalDataset.period is {self.period!r}; it must be at least 1, or None for EVAL_PERIOD")


class Pass(NamedTuple):
    """An evaluator with its period, in steps; `split` is what it reads where that is not the validation split of the
    run's data."""

    evaluator: Evaluator
    period: int
    split: str | None

    @property
    def names(self) -> list[str]:
        """The names of its tasks' records."""
        return [record_name(task, self.split) for task in self.evaluator.task_names]


class _Wanted(NamedTuple):
    data: DataSource
    split: str | None
    period: int
    evaluation: Evaluation


# What a run evaluates unless it is told otherwise: its own data, teacher-forced and generated.
OWN = (EvalDataset(),)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which evaluations a run makes.

    Attributes:
      train_eval: those of the loss and of the model's own metrics, teacher-forced; None or () for none.
      infer_eval: those of the tasks' metrics of predictions and of scores; None or () for none.
      period: of those that have none of their own; None: they are not made.
      evaluation: settings of those that have none of their own.
    """

    train_eval: Sequence[EvalDataset] | None = OWN
    infer_eval: Sequence[EvalDataset] | None = OWN
    period: int | None = None
    evaluation: Evaluation = Evaluation()

    def open(self, sharded: ShardedModel, own: DataSource, is_dry: bool = False) -> list[Pass]:
        """Opens the tasks: evaluations that read the same, as often, are one pass.

        Args:
          sharded: the model.
          own: the run's own data.
          is_dry: whether nothing may be written, as caches.

        Raises:
          UserError: data cannot be read, or does not fit the model; a list names a task twice.
        """
        lists = {
            name: self._wanted(name, listed, own)
            for name, listed in (("train_eval", self.train_eval), ("infer_eval", self.infer_eval))
        }
        train, infer = lists.values()
        passes: list[tuple[_Wanted, Pass]] = []
        for each in [*train, *(each for each in infer if each not in train)]:
            source = for_dry_run(each.data) if is_dry else each.data
            with contextlib.nullcontext() if is_dry else terminal.stage("opening the evaluation data"):
                tasks = tasks_of(source, each.split)
            if each.data is not own:
                _check_fit(sharded, source, tasks)
            evaluator = Evaluator(sharded, tasks, each.evaluation, losses=each in train, metrics=each in infer)
            passes.append((each, Pass(evaluator, each.period, _label(each, own))))
        for name, listed in lists.items():
            _refuse_same_tasks(name, [each for wanted, each in passes if wanted in listed])
        return [each for _, each in passes]

    def reads(self, own: DataSource) -> list[SplitRead]:
        """Returns the splits that evaluations read, for people."""
        found: dict[SplitRead, None] = {}
        for listed in (self.train_eval, self.infer_eval):
            for each in self._wanted("", listed, own):
                read = [one for one in reads_of(for_dry_run(each.data), True) if one.purpose == "evaluation"]
                split = each.split
                found |= dict.fromkeys(one._replace(split=split, examples=None) if split else one for one in read)
        return list(found)

    def _wanted(self, name: str, listed: Sequence[EvalDataset] | None, own: DataSource) -> list[_Wanted]:
        if not all(isinstance(each, EvalDataset) for each in listed or ()):
            raise UserError(f"{name} must be None or a list as [@{name}/schedule.EvalDataset()], not {listed!r}")
        found: list[_Wanted] = []
        for each in listed or ():
            period = each.period or self.period
            if period is not None:
                data = own if each.data is None else each.data
                wanted = _Wanted(data, other_split(data, each.split), period, each.evaluation or self.evaluation)
                if wanted in found:
                    raise UserError(f"{name} has the same data, split and period twice: leave one of them out")
                found.append(wanted)
        return found


def _label(wanted: _Wanted, own: DataSource) -> str | None:
    """Returns the split that an evaluation reads, None where it is the validation split of the run's data."""
    return other_split(own, wanted.split or getattr(wanted.data, "eval_split", None))


def _refuse_same_tasks(what: str, passes: Sequence[Pass]) -> None:
    """Raises UserError where two passes would write one record."""
    seen: set[str] = set()
    for name in (name for each in passes for name in each.names):
        if name in seen:
            raise UserError(f"{what} evaluates {name!r} twice: give one of them another split, or leave it out")
        seen.add(name)


def _check_fit(sharded: ShardedModel, data: DataSource, tasks: Sequence[EvalTask]) -> None:
    """Raises UserError where data has larger vocabularies, or other features, than the model."""
    check_vocabularies(sharded, data.vocabularies())
    converter: Any = getattr(data, "converter", None)
    if converter is not None and tasks:
        size, lengths = tasks[0].batch_size, tasks[0].lengths
        check_batch(sharded.batch(size, lengths).spec, converter.spec(lengths, size))


def begin_hooks(hooks: Sequence[Hook], passes: Sequence[Pass], records: Records | None, start: int) -> None:
    """Tells the hooks that see evaluations which there are, and what was found up to step `start`; `records` are None
    where another process writes them. Raises UserError where a hook asks for what is not evaluated."""
    seeing = [hook for hook in hooks if isinstance(hook, EvaluationHook)]
    if not seeing:
        return  # the records of a long run are long
    names = list(dict.fromkeys(name for each in passes for name in each.names))
    found: dict[int, dict[str, Record]] = {}
    if records is not None and start:
        for name in names:
            for step, record in records.read(name).items():
                found.setdefault(step, {})[name] = record
    for hook in seeing:
        hook.begin(names, {step: found[step] for step in sorted(found) if step <= start})


class Collected(NamedTuple):
    """One step's evaluations.

    Attributes:
      scalars: `<label>/<task>/<metric>`, and `<label>/loss` over the tokens of all tasks of which a loss was found; the
        label is the split, or "validation".
      reports: by name of the record.
      values: what metrics return besides numbers, as `task_metrics.plain_values` has it, by names as scalars have them.
      notes: what is to be said.
    """

    scalars: dict[str, float]
    reports: dict[str, Report]
    values: dict[str, dict[str, Any]]
    notes: list[str]


def collected(found: Iterable[tuple[str | None, TaskResult]]) -> Collected:
    """Returns the results of one step's evaluations together.

    Args:
      found: (split, result); a task's split is None for the usual one. Results of one task are joined.
    """
    scalars: dict[str, float] = {}
    reports: dict[str, Report] = {}
    totals: dict[str, np.ndarray] = {}
    values: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for split, (name, report, loss, note) in found:
        label = split or "validation"
        if loss is not None:
            totals[label] = totals.get(label, np.zeros(2)) + loss
        scalars |= {f"{label}/{name}/{metric}": value for metric, value in report["metrics"].items()}
        values |= {f"{label}/{name}/{metric}": value for metric, value in report.get("values", {}).items()}
        record = record_name(name, split)
        report = report | ({"split": split} if split else {})
        reports[record] = _joined(reports[record], report) if record in reports else report
        notes += [note] if note else []
    scalars |= {f"{label}/loss": float(total / max(weight, 1e-9)) for label, (total, weight) in totals.items()}
    return Collected(scalars, reports, values, notes)


def _joined(one: Report, other: Report) -> Report:
    """Returns two results of a task as one; of examples that were too long those of the pass that had more."""
    counts = one["counts"] | other["counts"]
    counts |= {
        name: max(each["counts"].get(name, 0) for each in (one, other))
        for name in ("truncated", "skipped")
        if name in counts
    }
    joined = one | other | {"metrics": one["metrics"] | other["metrics"], "counts": counts}
    failed = one.get("failed", {}) | other.get("failed", {})
    joined["predictions"] = one["predictions"] + other["predictions"]
    return joined | ({"failed": failed} if failed else {})


def evaluated(evaluator: Evaluator, params: Params) -> tuple[dict[str, float], dict[str, Report]]:
    """Returns (scalars, reports by task) of all tasks of an evaluator; every process must call it at the same step."""
    found = collected((None, result) for result in evaluator.results(params))
    return found.scalars, found.reports


class EvaluationLog:
    """Makes a run's evaluations, and keeps each task's results in `eval/<task>.jsonl`.

    Args:
      passes: what is evaluated, and how often.
      total: the last step: all is evaluated there.
      directory: the run.
      start: the step from which the run goes on: what was found at later ones is removed.
      primary: whether this process writes and speaks.
      say: prints a line.
      params_of: which parameters of the state are evaluated.
      first: the step that the run began with: all is evaluated there too.
      write_values: takes what metrics return besides numbers, by step and name.

    Attributes:
      reports: what the last evaluation found, by the name of the record.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        total: int,
        directory: RunDirectory,
        start: int,
        primary: bool,
        say: Callable[[str], None],
        params_of: Callable[[TrainState], Params] = lambda state: state.params,
        first: int = 0,
        write_values: Callable[[int, Mapping[str, Mapping[str, Any]]], None] = lambda *_: None,
    ) -> None:
        self._params_of, self._first = params_of, first
        self._records = Records(directory.evaluations) if primary else None
        self._passes, self._total, self._say, self._write_values = list(passes), total, say, write_values
        self._compiled: set[int] = set()
        self._told: set[str] = set()
        self.reports: dict[str, Report] = {}
        self._predictions: dict[str, list[dict[str, str]]] = {}  # the latest of each task
        if self._records is not None:
            self._records.keep_up_to(start)
        for each in self._passes:
            for line in each.evaluator.left_out:
                self._say_once(line)

    def due(self, step: int) -> bool:
        """Whether anything is evaluated after `step`: every period, at the beginning and at the end."""
        return bool(self._due(step))

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Evaluates what is due after `step`, and returns scalars; every process must call it at the same step."""
        due = self._due(step)
        first = not self._compiled.issuperset(due)
        self._compiled.update(due)
        passes = [self._passes[number] for number in due]
        with terminal.stage(f"evaluating step {step}") if first else contextlib.nullcontext():
            params = self._params_of(state)
            results = ((each.split, one) for each in passes for one in each.evaluator.results(params))
            scalars, self.reports, values, notes = collected(results)
        self._predictions |= {name: report["predictions"] for name, report in self.reports.items()}
        if self._records is not None:
            self._records.add(step, self.reports)
            self._write_values(step, values)
        for note in notes:
            self._say_once(note)
        for name, report in self.reports.items():
            for function, message in report.get("failed", {}).items():
                self._say(f"evaluation at step {step}: task {name!r}, {function} raised {message}")
        return scalars

    def samples(self, limit: int = 3) -> str:
        """Returns a few predictions of the last evaluation as text, for a terminal."""
        lines = []
        for name, predictions in self._predictions.items():
            for sample in predictions[:limit]:
                shown = {part: textwrap.shorten(sample[part], 100) for part in ("input", "target", "prediction")}
                lines += [f"{name}", *[f"  {part:10}  {text}" for part, text in shown.items()]]
        return "\n".join(lines)

    def _due(self, step: int) -> list[int]:
        whole = step in (self._first, self._total)
        return [number for number, each in enumerate(self._passes) if whole or step % each.period == 0]

    def _say_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._say(line)
