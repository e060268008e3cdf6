"""Evaluates checkpoints of a run one after the other, and shows progress and results."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

from meshway.framework.checkpoints.manager import Checkpoints, DamagedCheckpoint
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluator, TaskResult
from meshway.framework.evaluation.records import Records, StepQueue, complete_steps
from meshway.framework.evaluation.schedule import collected
from meshway.framework.interfaces import Attempt, Params, Writer
from meshway.framework.progress import Bar, Display, Screen, seconds_left
from meshway.framework.report.page import is_of_router, write_report
from meshway.framework.telemetry.writers import TensorBoardWriter, Writers
from meshway.framework.terminal import stage
from meshway.framework.training.run_directory import RunDirectory

_MOST_METRICS = 10  # in a line


class EvaluationDisplay(Display):
    """Shows what is evaluated and what was found."""

    def __init__(self, **screen: Unpack[Screen]) -> None:
        """`screen` says where to write, on standard output unless it says otherwise."""
        self._step, self._began = 0, time.monotonic()
        self._pass: _Pass | None = None
        screen.setdefault("period", 60.0)
        super().__init__(sys.stdout, **screen)

    def begin(self, step: int) -> None:
        """Says that the evaluation of a step begins."""
        self._step, self._began, self._pass = step, time.monotonic(), None

    def observe(self, task: str, what: str, done: int, total: int) -> None:
        """Moves the bar; an `Observer`."""
        before, label = self._pass, f"at step {self._step}  {task}  {what}"
        if before is None or before.label != label:
            self._pass = _Pass(label, time.monotonic(), done, done, total)
            self.redraw()
        else:
            self._pass = before._replace(done=done, total=total)
        self.changed()

    def bar(self) -> Bar | None:
        at = self._pass
        if at is None:
            return None
        left = seconds_left(time.monotonic() - at.began, at.done - at.first, at.total - at.first)
        return Bar(f"{at.label}  {at.done:,}/{at.total:,}", at.done, at.total, left)

    def found(self, task: str, report: Mapping[str, Any]) -> None:
        """Prints the metrics of one task, and its speed."""
        seconds, self._began = time.monotonic() - self._began, time.monotonic()
        counts = report["counts"]
        counted = next(each for each in ("predictions", "scores", "rows") if each in counts)
        number, name = counts[counted], "rows" if counted == "rows" else "examples"
        metrics = [(key, value) for key, value in report["metrics"].items() if not is_of_router(key)]
        shown = [f"{key} {value:.4g}" for key, value in metrics[:_MOST_METRICS]]
        more = [f"and {len(metrics) - _MOST_METRICS} more"] if len(metrics) > _MOST_METRICS else []
        speed = f"({number:,} {name}, {number / max(seconds, 1e-9):,.1f} {name}/s)"
        self.say("  ".join([f"step {self._step}", task, *shown, *more, speed]))

    def say(self, line: str) -> None:
        """Prints a line; the bar is taken away until there is something to count again."""
        self._pass = None
        self.note(line)


class _Pass(NamedTuple):
    """One pass over the examples of a task.

    Attributes:
      label: what it does.
      began, first: when the first batch was done, and how many examples that had; its own time, which includes
        compiling, does not tell how fast the others are.
      done, total: examples.
    """

    label: str
    began: float
    first: int
    done: int
    total: int


_REMOVAL = 10.0  # seconds that the removal of a checkpoint may take


class EvaluationJob:
    """The work of one `meshway eval`, on all of its processes: process 0 decides, writes and speaks.

    Args:
      directory: the run.
      evaluator: what is evaluated on each step.
      params: the parameters' shapes, with shardings, as they are stored.
      queue: the steps; process 0 asks it.
      records: where what was found goes.
      fingerprint: of what is evaluated.
      split: what the tasks read, where it is not the recipe's validation split; None where it is.
      display: what a person sees.
      skip_removed: whether a checkpoint that is removed before it could be read, or is damaged, is passed over; else it
        is an error.
      averaged: whether averages of parameters are read instead of them.
      loggers: what takes the scalars beside TensorBoard; it closes them.
      laid: makes of the parameters what the evaluator reads; they may be deleted.
    """

    def __init__(
        self,
        directory: RunDirectory,
        evaluator: Evaluator,
        params: Params,
        queue: StepQueue,
        records: Records,
        fingerprint: str,
        split: str | None,
        display: EvaluationDisplay,
        skip_removed: bool,
        averaged: bool = False,
        loggers: Sequence[Writer] = (),
        laid: Callable[[Params], Params] = lambda params: params,
    ) -> None:
        self._directory, self._evaluator, self._params, self._queue = directory, evaluator, params, queue
        self._laid = laid
        self._records, self._fingerprint, self._split = records, fingerprint, split
        self._display, self._skip_removed = display, skip_removed
        self._primary, self._averaged = processes.is_primary(), averaged
        self._loggers, self._begun = Writers(loggers), False
        self._checkpoints: Checkpoints | None = None
        self._failures: list[str] = []
        self._noted: list[str] = []
        self._damaged: list[str] = []

    def run(self) -> int:
        """Evaluates all steps of the queue; returns how many.

        Raises:
          UserError: a checkpoint is another model's, the disk refuses, or, once all is evaluated and written, some
            function of a task has raised.
          DamagedCheckpoint: a checkpoint that was asked for cannot be read; or, once all others are evaluated, one of
            them could not be. Where the latest was asked for, the last that can be read serves.
        """
        try:
            return self._run()
        finally:
            if self._primary:
                self._loggers.close()

    def _run(self) -> int:
        count = 0
        while True:
            with contextlib.ExitStack() as stack:
                step = stack.enter_context(self._queue.next()) if self._primary else None
                step = _told("the next step to evaluate", step)
                if step is None:
                    break
                params = self._load(step)
                if params is not None:
                    params = self._laid(params)
                    self._evaluate(step, params)
                    count += 1
                del params  # gone before the next are read: two may not fit where one does
        if self._failures:
            times = f"{len(self._failures)} time{'' if len(self._failures) == 1 else 's'}"
            listed = "\n  ".join(dict.fromkeys(self._failures))
            raise UserError(f"all was evaluated and written; the tasks' own code has raised {times}:\n  {listed}")
        if self._damaged:
            raise DamagedCheckpoint("all else was evaluated and written:\n  " + "\n  ".join(self._damaged))
        return count

    def _load(self, step: int) -> Params | None:
        """Returns the parameters of a step; None where its checkpoint was removed meanwhile, or is passed over."""
        params, failure, unreadable = None, "", False
        try:
            if self._checkpoints is None:
                self._checkpoints = Checkpoints(self._directory.checkpoints, read_only=True, averaged=self._averaged)
            with stage(f"reading checkpoint {step}"):
                params = self._checkpoints.load_params(step, self._params)
        except (UserError, DamagedCheckpoint) as error:
            failure, unreadable = str(error), isinstance(error, DamagedCheckpoint)
        brought = [json.loads(text) for text in _brought("the reading of a checkpoint", [failure, unreadable])]
        failures = [text for text, _ in brought if text]
        if not failures:
            return params
        unreadable = any(unreadable for _, unreadable in brought)
        if not (self._skip_removed and unreadable):
            raise (DamagedCheckpoint if unreadable else UserError)(failures[0])
        if _told("a checkpoint's removal", self._primary and self._vanishes(step)):
            self._display.say(f"step {step}: its checkpoint was removed before it could be read; passed over")
            return None
        self._pass_over(step, failures[0])
        return None

    def _pass_over(self, step: int, problem: str) -> None:
        """Leaves a damaged checkpoint out, for the one before it where the latest was asked for."""
        if not self._queue.wanted.latest:
            self._damaged.append(problem)
            self._display.say(f"{problem}; passed over")
            return
        earlier = _told("an earlier checkpoint", self._queue.before(step) if self._primary else None)
        if earlier is None:
            raise DamagedCheckpoint(problem)
        self._display.say(f"{problem}; taking step {earlier}")

    def _vanishes(self, step: int) -> bool:
        """Returns whether a checkpoint is gone, or going: what removes one takes a while."""
        newest = max(complete_steps(self._directory.checkpoints), default=step)
        end = time.monotonic() + (_REMOVAL if step < newest else 0.0)  # what removes old ones leaves the newest
        while (there := step in complete_steps(self._directory.checkpoints)) and time.monotonic() < end:
            time.sleep(0.1)
        return not there

    def _evaluate(self, step: int, params: Params) -> None:
        self._display.begin(step)
        results = self._evaluator.results(params, self._display.observe)
        found = collected((self._split, self._shown(step, result)) for result in results)
        if self._primary:
            if not self._begun:  # not where there is nothing to evaluate
                self._loggers.begin(Attempt(self._directory.root, 0, -1, self._directory.config(), evaluation=True))
            self._begun = True
            self._records.add(step, found.reports, self._fingerprint)
            # A file of its own a step, whole: TensorBoard, which reads one file after the other, misses none.
            writer = TensorBoardWriter(self._directory.tensorboard / "eval", start_step=None)
            with contextlib.closing(Writers([writer])) as own:
                for each in (own, self._loggers):
                    each.write(step, found.scalars)
                    each.write_values(step, found.values)
            write_report(self._directory.root)

    def _shown(self, step: int, result: TaskResult) -> TaskResult:
        """Tells people of a task's result as soon as it is there; returns it."""
        name, report, _, note = result
        self._display.found(name, report)
        if note and note not in self._noted:
            self._noted.append(note)
            self._display.say(note)
        for function, message in report.get("failed", {}).items():
            self._failures.append(f"task {name!r}, {function}: {message}")
            self._display.say(f"step {step}  {name}  {function} raised {message}")
        return result


def is_done(records: Records, names: list[str], fingerprint: str) -> Callable[[int], bool]:
    """Returns what says of a step whether it has been evaluated, all of its tasks, without a failure of theirs."""

    def done(step: int) -> bool:
        found = [records.read(name).get(step, {}) for name in names]
        return all(record.get("fingerprint") == fingerprint and "failed" not in record for record in found)

    return done


def _brought(name: str, value: Any) -> list[str]:
    """Returns what every process brings to a barrier."""
    return list(processes.barrier(name, None, json.dumps(value)).values())


def _told(name: str, value: Any) -> Any:
    """Returns what process 0 brings to a barrier."""
    return json.loads(processes.barrier(name, None, json.dumps(value))[0])
