"""What a person sees of a run: a bar at the foot of a terminal, or one plain line a report."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meshway.framework import stages


class Progress:
    """Shows how far a run is, how it does and when it ends; use as a context manager, or call `close`.

    On a terminal a bar stays on the last two lines, redrawn twice a second, and notes scroll above it.
    Elsewhere (a file, a pipe) each report is one line. Both go to standard output, notes included, and both
    are what a `Writer` is, so a `Progress` can stand in a list of writers.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        peak_name: str = "mfu",
        stream: TextIO | None = None,
        terminal: bool | None = None,
    ) -> None:
        """Starts the display.

        Args:
          total_steps: the step at which the run ends.
          start_step: the step it starts from, above 0 after a restart.
          peak_name: what the scalar `mfu` is a share of: "mfu", or "of matmul peak" where it was measured.
          stream: where to write, standard output if None.
          terminal: whether that is a terminal; found out if None.
        """
        self._total_steps, self._step, self._reported_step = total_steps, start_step, start_step
        self._peak_name = peak_name
        self._stream = sys.stdout if stream is None else stream
        self._clock = time.monotonic()
        self._step_seconds: float | None = None
        self._scalars: Mapping[str, float] = {}
        self._live: Live | None = None
        self._terminal = contextlib.ExitStack()  # held by this display
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal:
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            self._live = Live(
                get_renderable=self._render, console=console, refresh_per_second=2, vertical_overflow="crop"
            )
            self._terminal.enter_context(stages.through(self.note))
            self._live.start()

    def advance(self, step: int) -> None:
        """Moves the bar of a terminal to `step`; costs next to nothing, so call it at every step."""
        self._step = step

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows a report: loss, learning_rate, tokens_per_second, mfu, data_wait_fraction, as far as given.

        Time left is counted by `step_seconds`, or by the clock between reports where that is missing.
        """
        now = time.monotonic()
        elapsed = (now - self._clock) / max(step - self._reported_step, 1)
        self._step_seconds = scalars.get("step_seconds", elapsed)
        self._reported_step, self._clock, self._scalars = step, now, scalars
        self._step = max(self._step, step)  # a report may come after later steps have been dispatched
        if self._live is None:
            parts = [f"step {step}/{self._total_steps}", *self._numbers(), f"eta {self._eta()}"]
            self._print("  ".join(parts))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The same as `update`, under the name that a `Writer` has."""
        self.update(step, scalars)

    def note(self, text: str) -> None:
        """Prints a line or several: an evaluation's results, a checkpoint saved."""
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back, cursor included. May be called twice."""
        if self._live is not None and self._live.is_started:
            self._live.stop()
        self._terminal.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _numbers(self) -> list[str]:
        """Returns the scalars worth a glance as short texts, in a fixed order."""
        scalars = self._scalars
        shown = []
        if "loss" in scalars:
            shown.append(f"loss {scalars['loss']:.4g}")
        if "learning_rate" in scalars:
            shown.append(f"lr {scalars['learning_rate']:.1e}")
        if "tokens_per_second" in scalars:
            shown.append(f"{scalars['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in scalars:
            share = f"{100 * scalars['mfu']:.1f}%"
            shown.append(f"mfu {share}" if self._peak_name == "mfu" else f"{share} {self._peak_name}")
        if "data_wait_fraction" in scalars:
            shown.append(f"data wait {100 * scalars['data_wait_fraction']:.1f}%")
        return shown

    def _eta(self) -> str:
        if self._step_seconds is None:
            return "-"
        return format_duration(max(self._total_steps - self._step, 0) * self._step_seconds)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            f"step {self._step}/{self._total_steps}",
            ProgressBar(total=max(self._total_steps, 1), completed=self._step),
            f"eta {self._eta()}",
        )
        return Group(bar, Text("  ".join(self._numbers()), no_wrap=True, overflow="ellipsis"))


def format_duration(seconds: float) -> str:
    """Returns seconds as `m:ss`, from an hour on `h:mm:ss`, from a day on `Dd h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {clock}" if days else clock
