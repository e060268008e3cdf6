"""What a person sees of an evaluation: a bar at the foot of a terminal, and one plain line a task and step."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meshway.framework import stages
from meshway.framework.training.report.experts import is_of_router

_MOST_METRICS = 10  # in a line


class EvaluationDisplay:
    """Shows what is evaluated and what was found; use as a context manager.

    Args:
      silent: whether to show nothing: one process of a run speaks.
      stream: where to write, standard output if None.
      terminal: whether that is a terminal; found out if None.
    """

    def __init__(self, silent: bool = False, stream: TextIO | None = None, terminal: bool | None = None) -> None:
        self._silent, self._stream = silent, sys.stdout if stream is None else stream
        self._began = time.monotonic()
        self._step = 0
        self._bar: Progress | None = None
        self._terminal = contextlib.ExitStack()  # held by this display
        self._row: TaskID | None = None
        self._shown = ("", "")
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal and not silent:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            self._bar = Progress(*columns, console=console, transient=True)

    def begin(self, step: int) -> None:
        """Says that the evaluation of a step begins."""
        self._step, self._began, self._shown = step, time.monotonic(), ("", "")

    def observe(self, task: str, what: str, done: int, total: int) -> None:
        """Moves the bar of a terminal; an `Observer`."""
        if self._bar is None:
            return
        if self._shown != (task, what):
            self._shown = (task, what)
            self._clear()
            self._row = self._bar.add_task(f"step {self._step}  {task}  {what}", total=total)
        if self._row is not None:
            self._bar.update(self._row, completed=done)

    def found(self, task: str, report: Mapping[str, Any]) -> None:
        """Prints what one task gave, and how quickly."""
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
        """Prints a line, above the bar where there is one."""
        if self._silent:
            return
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._clear()
            self._bar.console.print(line, soft_wrap=True, markup=False)

    def __enter__(self) -> "EvaluationDisplay":
        if self._bar is not None:
            self._terminal.enter_context(stages.through(self.say))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._clear()
            self._bar.stop()
        self._terminal.close()

    def _clear(self) -> None:
        if self._bar is not None and self._row is not None:
            self._bar.remove_task(self._row)
            self._bar.refresh()
            self._row = None
