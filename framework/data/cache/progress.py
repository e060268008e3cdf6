"""What a person sees of a cache being built: a bar at the foot of a terminal, or a plain line now and then."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meshway.framework import stages
from meshway.framework.training.progress import format_duration


class CacheProgress:
    """Shows how many examples are written, how fast, and when it ends; use as a context manager.

    Args:
      shards: how many are to be written.
      expected: how many examples they will hold, as far as the sources say; None where they do not.
      stream: where to write, standard output if None.
      terminal: whether that is a terminal; found out if None.
      period: seconds between the lines of a log.
    """

    def __init__(
        self,
        shards: int,
        expected: int | None,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        period: float = 10.0,
    ) -> None:
        self._shards, self._expected, self._period = shards, expected, period
        self._stream = sys.stdout if stream is None else stream
        self._printed = time.monotonic()
        self._begin: float | None = None  # of the first shard; what comes before is TensorFlow's import
        self._examples: dict[int, int] = {}
        self._done = 0
        self._live: Live | None = None
        self._terminal = contextlib.ExitStack()  # held by this display
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal:
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            self._terminal.enter_context(stages.through(self.note))
            self._live.start()

    def update(self, job: int, examples: int) -> None:
        """Takes how many examples shard number `job` has by now."""
        self._examples[job] = examples
        now = time.monotonic()
        self._begin = self._begin or now
        if self._live is None and now - self._printed >= self._period:
            self._printed = now
            self._print("  ".join([self._count(), *self._numbers()]))

    def finish(self, job: int, examples: int) -> None:
        """Takes that a shard is done."""
        self._done += 1
        self.update(job, examples)

    def note(self, text: str) -> None:
        """Prints a line."""
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "CacheProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._terminal.close()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _count(self) -> str:
        return f"shard {self._done}/{self._shards}"

    def _numbers(self) -> list[str]:
        now = time.monotonic()
        examples, seconds = sum(self._examples.values()), now - (self._begin or now)
        fraction = self._fraction()
        left = format_duration(seconds * (1 - fraction) / fraction) if fraction else "-"
        return [f"{examples:,} examples", f"{examples / max(seconds, 1e-9):,.0f} examples/s", f"eta {left}"]

    def _fraction(self) -> float:
        """Returns how much of the work is done: by examples where their number is known, else by shards."""
        if self._expected:
            return min(sum(self._examples.values()) / self._expected, 1.0)
        return self._done / max(self._shards, 1)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(self._count(), ProgressBar(total=1.0, completed=self._fraction()), "  ".join(self._numbers()))
        return bar
