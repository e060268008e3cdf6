"""What a person sees of a batch job: a bar on a terminal, a plain line now and then in a log."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meshway.framework import stages
from meshway.framework.training.progress import format_duration


class JobProgress:
    """Shows how many examples are done, how fast, and when it ends; use as a context manager.

    Args:
      total: records of the whole input, None where nobody knows.
      stream: where to write; standard error if None: standard output may be the result.
      terminal: whether that is a terminal; found out if None.
      period: seconds between the lines of a log.
      quiet: say nothing, as all processes but the first.
    """

    def __init__(
        self,
        total: int | None,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        period: float = 10.0,
        quiet: bool = False,
    ) -> None:
        self._total, self._period, self._quiet = total, period, quiet
        self._stream = sys.stderr if stream is None else stream
        self._began = self._printed = time.monotonic()
        self._done = self._skipped = self._tokens = 0
        self._bar: Progress | None = None
        self._terminal = contextlib.ExitStack()  # held by this display
        self._task = TaskID(0)
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal and not quiet:
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task("examples", total=total, rates="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._terminal.enter_context(stages.through(self.note))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._terminal.close()

    def skip(self, records: int) -> None:
        """Takes records that an earlier attempt computed."""
        self._skipped += records
        self._show()

    def advance(self, examples: int, tokens: int) -> None:
        """Takes examples that were computed."""
        self._done += examples
        self._tokens += tokens
        self._show()

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._skipped + self._done, rates=self._rates())
        elif time.monotonic() - self._printed >= self._period:
            self._printed = time.monotonic()
            self.note(f"{self._count()}  {self._rates()}{self._left()}")

    def _count(self) -> str:
        of = "" if self._total is None else f" of {self._total:,}"
        return f"{self._skipped + self._done:,}{of} examples"

    def _rates(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return f"{self._done / seconds:,.1f} examples/s  {self._tokens / seconds:,.0f} tokens/s"

    def _left(self) -> str:
        if self._total is None or not self._done:
            return ""
        seconds = (time.monotonic() - self._began) / self._done * (self._total - self._skipped - self._done)
        return f"  ETA {format_duration(max(seconds, 0.0))}"
