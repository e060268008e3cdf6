"""Hooks of a run: what is called after steps, evaluations and reports, and may stop it."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from meshway.framework.distributed.processes import barrier
from meshway.framework.errors import UserError, did_you_mean

# What an evaluation found, by the name of the record: `metrics`, `counts`, `predictions` and, if any, `failed`.
Found = Mapping[str, Mapping[str, Any]]


class Hook(Protocol):
    """Something small that happens after a step, and when the run ends, however it ends."""

    def after_step(self, step: int) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class EvaluationHook(Hook, Protocol):
    """A hook that sees what evaluations find, and may stop the run.

    Every process calls it with the same; that of process 0 decides for all.
    """

    def begin(self, names: Sequence[str], earlier: Mapping[int, Found]) -> None:
        """Called before anything is compiled.

        Args:
          names: of the records that evaluations of this run write: a task, or `<task>.<split>`.
          earlier: what a run that is resumed had found up to there, by step.

        Raises:
          UserError: the hook asks for what no evaluation finds.
        """
        ...

    def after_evaluation(self, step: int, found: Found) -> str | None:
        """Returns why the run is to stop after `step`, once that is saved; None to go on."""
        ...


@runtime_checkable
class ReportHook(Hook, Protocol):
    """A hook that sees what is reported of training, and may stop the run; it may be an `EvaluationHook` as well.

    Every process calls it; that of process 0 decides for all. Numbers of the machine (`step_seconds`, memory) are each
    process's own.
    """

    def after_report(self, step: int, metrics: Mapping[str, float | None]) -> str | None:
        """Returns why the run is to stop, after the step that follows `step`, once that is saved; None to go on.

        Args:
          step: the last step that the report is of; it is known once the next step has begun.
          metrics: a line of `metrics.jsonl`: means over the steps since the report before; None where no step of them
            measured it.
        """
        ...


TRAINING = "train"  # what stands for a task where a metric is one of the reports of training, as in T5X


class EarlyStopping:
    """Stops a run whose metric does not improve: T5X's `EarlyStoppingAction`.

    It looks at the last `patience` values of the metric, and stops where none of them is better than the one before it
    among these, by more than `atol + rtol * |the one before|`. A value that is not a number is no better. Evaluations
    of a run that is resumed count on; reports of training are counted anew.

    Args:
      metric: (task, metric), as in `eval/<task>.jsonl`; ('train', metric) as in `metrics.jsonl`.
      mode: 'min' where less is better, 'max' where more is.
      patience: how many values in a row are looked at, at least 2.
      atol, rtol: tolerances, at least 0.
    """

    def __init__(
        self, metric: Sequence[str], mode: str, patience: int = 3, atol: float = 0.0, rtol: float = 0.0
    ) -> None:
        pair = [] if isinstance(metric, str) else list(metric)
        if len(pair) != 2 or not all(isinstance(each, str) for each in pair):
            raise UserError(f"EarlyStopping.metric is {metric!r}: a task and its metric, as ('my_task', 'loss')")
        if mode not in ("min", "max"):
            raise UserError(f"EarlyStopping.mode is {mode!r}: 'min' where less is better, 'max' where more is")
        if patience < 2:
            raise UserError(f"EarlyStopping.patience is {patience!r}; two evaluations at least can be compared")
        for name, tolerance in (("atol", atol), ("rtol", rtol)):
            if not tolerance >= 0:
                raise UserError(f"EarlyStopping.{name} is {tolerance!r}; it must be at least 0")
        self._task, self._metric = pair
        self._sign = 1.0 if mode == "min" else -1.0
        self._patience, self._atol, self._rtol = patience, atol, rtol
        self._values: list[float] = []
        if self._task == TRAINING:  # no ReportHook else: processes wait for each other at what these are asked
            self.after_report = self._after_report

    def begin(self, names: Sequence[str], earlier: Mapping[int, Found]) -> None:
        if self._task not in (*names, TRAINING):
            raise UserError(
                f"EarlyStopping.metric: nothing called {self._task!r} is evaluated; it is one of "
                f"{', '.join([*names, TRAINING])}{did_you_mean(self._task, [*names, TRAINING])}"
            )
        if self._task == TRAINING and TRAINING in names:
            raise UserError(
                f"EarlyStopping.metric: {TRAINING!r} stands for the reports of training, and a task of that name is "
                "evaluated too: register the task under another name"
            )
        for step in sorted(earlier):
            self._add(earlier[step])

    def after_evaluation(self, step: int, found: Found) -> str | None:
        if not self._add(found) or len(self._values) < self._patience:
            return None
        if any(self._better(one, before) for before, one in itertools.pairwise(self._values)):
            return None
        values = ", ".join(f"{value:.4g}" for value in self._values)
        seen = "reports" if self._task == TRAINING else "evaluations"
        return f"{self._metric} of {self._task} has not improved in the last {self._patience} {seen}: {values}"

    def _after_report(self, step: int, metrics: Mapping[str, float | None]) -> str | None:
        if metrics.get(self._metric, math.nan) is None:
            return None
        return self.after_evaluation(step, {TRAINING: {"metrics": metrics}})

    def after_step(self, step: int) -> None: ...

    def close(self) -> None: ...

    def _add(self, found: Found) -> bool:
        """Keeps the metric of an evaluation; returns whether it had it."""
        report = found.get(self._task)
        if report is None:
            return False
        if self._metric not in report["metrics"]:
            if not report.get("failed"):
                known = sorted(report["metrics"])
                raise UserError(
                    f"EarlyStopping.metric: {self._task!r} has no metric {self._metric!r}; it is one of "
                    f"{', '.join(known)}{did_you_mean(self._metric, known)}"
                )
            return False
        value = report["metrics"][self._metric]
        self._values = [*self._values, math.nan if value is None else float(value)][-self._patience :]
        return True

    def _better(self, value: float, before: float) -> bool:
        least = self._atol + self._rtol * abs(before)
        return self._sign * value < self._sign * before - least


def agreed(name: str, answers: Sequence[tuple[Hook, str | None]]) -> str:
    """Waits for all processes; returns what process 0's hooks answered, in one line, "" where none wants to stop."""
    reason = "; ".join(f"{type(hook).__name__}: {why}" for hook, why in answers if why)
    return barrier(name, None, reason)[0] if answers else ""
