"""The training loop, and what its parts meet: compiled steps, evaluations, periods."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from meshway.framework.data.prefetch import BatchSizes
from meshway.framework.distributed.processes import StepWatch, StopSignal
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch
from meshway.framework.telemetry.profiler import planned
from meshway.framework.telemetry.reporter import Reporter
from meshway.framework.training.hooks import EvaluationHook, Hook, ReportHook, agreed
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import TrainState

Step = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Any]]


class SizedSteps:
    """The compiled steps of a run's batch sizes, all that are still to come: called as one of them is."""

    def __init__(
        self,
        program: TrainProgram,
        schedule: Sequence[tuple[int, int]],
        start: int,
        end: int,
        skipped: Sequence[tuple[int, int]] = (),
    ):
        """Compiles those of the run's steps `start` + 1 to `end`, as if every batch that is `skipped` were before them.

        Raises:
          UserError: as `TrainProgram.compile_step`.
        """
        self._program, self._sizes = program, BatchSizes(program.batch_size, schedule)
        self._programs: dict[int, TrainProgram] = {}
        self._steps: dict[int, Any] = {}
        self._done = start
        self._ran: list[tuple[int, int]] = []  # (step from which on batches had a size, that size)
        end += sum(last - first + 1 for first, last in skipped)
        numbers = [start + 1, *[step for step, _ in schedule if start < step <= end], end]
        for size in dict.fromkeys(map(self._sizes.at, numbers)):
            self._compile(size)

    def _compile(self, size: int) -> None:
        self._programs[size] = self._program.of_size(size)
        self._steps[size] = self._programs[size].compile_step()

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Any]:
        size = next(iter(batch.values())).shape[0]
        self._done += 1
        if not self._ran or self._ran[-1][1] != size:
            self._ran.append((self._done, size))
        return self._steps[size](state, batch)

    def shard_batch(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch, of any of the sizes, on its devices."""
        return self._programs[self._size_of(len(next(iter(batch.values()))))].shard_batch(batch)

    def _size_of(self, local_rows: int) -> int:
        """Returns the size of a batch of which this process has so many rows; one that was not expected, since batches
        were left out by an earlier command, is compiled now."""
        for size in self._sizes.after(0):
            rows = self._program.partitioner.process_rows(size)
            if rows.stop - rows.start == local_rows:
                if size not in self._programs:
                    self._compile(size)
                return size
        raise AssertionError(f"no batch of the schedule has {local_rows} rows here")

    def flops(self, step: int) -> float:
        """Returns the model FLOPs of a step that was run, by its number from 1: by the size of the batch that it had,
        which is not the one of its number where batches are left out."""
        size = next(size for first, size in reversed(self._ran) if first <= step)
        return self._programs[size].flops

    def planned(self) -> str:
        """Returns what memory the step of the largest batch needs, for people."""
        return planned(self._steps[max(self._steps)])


class Evaluate(Protocol):
    """The evaluations of a run; `schedule.EvaluationLog` is one.

    Attributes:
      reports: what the last evaluation found, by the name of the record.
    """

    reports: dict[str, dict[str, Any]]

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step`."""
        ...

    def __call__(self, state: TrainState, step: int) -> dict[str, float]:
        """Evaluates, and returns scalars to report."""
        ...


@dataclasses.dataclass(frozen=True)
class Periods:
    """How often, in steps: reports, evaluations (None never), checkpoints (None only at the end).

    `total` is the step at which training ends. `relative` instead counts steps from the one that the run begins with,
    that of the checkpoint which it starts from (TRAIN_STEPS_RELATIVE); `total` is ignored then, as in T5X.
    """

    total: int | None
    report: int = 100
    evaluate: int | None = None
    checkpoint: int | None = None
    relative: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise UserError(f"the period {field.name!r} is {value}; it must be at least 1")

    def counted_from(self, first: int) -> "Periods":
        """Returns the periods of a run that begins with step `first`, with a total.

        Raises:
          UserError: the run would end before it begins.
        """
        if self.relative is not None:
            return dataclasses.replace(self, total=first + self.relative, relative=None)
        last = self.last
        if first and first >= last:
            raise UserError(
                f"TRAIN_STEPS={self.total} is the step at which training ends, and this run counts on from step "
                f"{first}: set TRAIN_STEPS_RELATIVE to the number of further steps, or TRAIN_STEPS to more than that"
            )
        return self

    @property
    def last(self) -> int:
        """The step at which training ends.

        Raises:
          UserError: the recipe does not say it.
        """
        if self.total is None:
            raise UserError("TRAIN_STEPS is None: set the step at which training ends, or TRAIN_STEPS_RELATIVE")
        return self.total

    def saves(self, step: int) -> bool:
        """Whether to save after `step`: every period, and at the end."""
        return step == self.last or (self.checkpoint is not None and step % self.checkpoint == 0)


@dataclasses.dataclass
class Loop:
    """The parts of a run; `run` turns them.

    `shard_batch` puts a batch on devices. `save(state, step, position, scalars)` starts a checkpoint; it gets the last
    evaluation's scalars, by which best checkpoints are kept.
    """

    step: Step
    shard_batch: Callable[[Batch], dict[str, jax.Array]]
    stream: Iterator[tuple[Batch, dict[str, int]]]
    periods: Periods
    reporter: Reporter
    evaluate: Evaluate
    save: Callable[[TrainState, int, Mapping[str, int], Mapping[str, float]], None]
    hooks: Sequence[Hook] = ()
    max_skipped_in_a_row: int = 10
    first: int = 0  # the step that the run began with
    also_refused: str = ""  # what else than infinities the step leaves updates out for, as ", or ..."
    watch: StepWatch = dataclasses.field(default_factory=StepWatch)
    stop: StopSignal = dataclasses.field(default_factory=StopSignal)
    reason: str = dataclasses.field(default="", init=False)  # why a hook stopped the run

    def run(self, state: TrainState, start: int) -> int:
        """Trains from after step `start` to the end or a stop signal; returns the last step, whose save has begun.

        Raises:
          UserError: the updates of more than `max_skipped_in_a_row` steps in a row were left out, or a save failed.
        """
        streaks: list[tuple[int, jax.Array]] = []
        scalars: dict[str, float] = {}
        step = start
        with contextlib.ExitStack() as stack:
            for hook in self.hooks:
                stack.callback(hook.close)
            if start == self.first and self.evaluate.due(start):  # a hook that wants to stop then has one step yet
                with self.reporter.pause("evaluation", state.step):
                    scalars = self.evaluate(state, start)
                self.reporter.evaluated(start, scalars)
                self.reason = self._ask_hooks(start)
            stop = stack.enter_context(self.stop)
            stack.enter_context(self.reporter.training())
            watch = stack.enter_context(self.watch)
            for step in range(start + 1, self.periods.last + 1):
                with self.reporter.waiting():
                    batch, position = next(self.stream)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):  # steps, by number, in a profile
                    state, metrics = self.step(state, self.shard_batch(batch))
                self.reporter.add(step, metrics)
                self.reason = self.reason or self._ask_about_report()
                streaks = self._await_step_before_last(streaks, step, metrics)
                if self.evaluate.due(step):
                    with self.reporter.pause("evaluation", state.step), watch.paused():
                        found = self.evaluate(state, step)
                        self.reason = self.reason or self._ask_hooks(step)
                    scalars = scalars | found
                    self.reporter.evaluated(step, found)
                elif step % self.periods.report == 0:
                    self.reporter.report(step)
                stopping = stop.requested(step) or bool(self.reason)
                if self.periods.saves(step) or stopping:
                    with self.reporter.pause("checkpoint", state.step), watch.paused():
                        # A report of a step that will never run again must be on disk before its checkpoint is.
                        self.reporter.commit()
                        self._check_streaks(streaks)
                        self.save(state, step, position, scalars)
                for hook in self.hooks:
                    hook.after_step(step)
                watch.finished(step)
                if stopping:
                    break
        return step

    def _ask_hooks(self, step: int) -> str:
        """Returns why hooks want the run to stop after an evaluation, the same on every process; "" where none does."""
        hooks = [hook for hook in self.hooks if isinstance(hook, EvaluationHook)]
        answers = [(hook, hook.after_evaluation(step, self.evaluate.reports)) for hook in hooks]
        return agreed(f"the hooks after evaluation {step}", answers)

    def _ask_about_report(self) -> str:
        """Returns the same of the report that was written last, if it was not asked about."""
        hooks = [hook for hook in self.hooks if isinstance(hook, ReportHook)]
        reported = self.reporter.take_reported() if hooks else None
        if reported is None:
            return ""
        step, metrics = reported
        return agreed(f"the hooks after report {step}", [(hook, hook.after_report(step, metrics)) for hook in hooks])

    def _await_step_before_last(
        self, streaks: list[tuple[int, jax.Array]], step: int, metrics: Any
    ) -> list[tuple[int, jax.Array]]:
        """Keeps two steps in flight: the device always has work, and Python never runs far ahead of it."""
        streak = metrics["skipped_in_a_row"][0].addressable_data(0)
        streak.copy_to_host_async()
        streaks = [*streaks, (step, streak)]
        self._check_streaks(streaks[:-2])
        return streaks[-2:]

    def _check_streaks(self, streaks: Sequence[tuple[int, jax.Array]]) -> None:
        for step, streak in streaks:
            if float(streak) > self.max_skipped_in_a_row:
                self.reporter.flush()
                raise UserError(
                    f"the loss or its gradient was not finite{self.also_refused} in the last {int(streak)} steps "
                    f"(limit max_skipped_in_a_row={self.max_skipped_in_a_row}, step {step}); their updates were left "
                    "out. Lower the learning rate, or set Optimizer.max_grad_norm, and resume from the last checkpoint"
                )
