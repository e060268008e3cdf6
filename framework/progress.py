"""How far something long is: a bar at the foot of a terminal, a line now and then in a log."""

import abc
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self, TextIO, TypedDict, Unpack

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meshway.framework.terminal import console_on, format_bytes, format_duration, is_terminal, through


class Bar(NamedTuple):
    """Where work under way stands.

    Attributes:
      label: what it is and how far, as 'step 3/10'.
      done, total: how far it is, in any unit; None where nobody knows the total.
      seconds_left: until it ends, None where that cannot be told yet.
      numbers: rates and the like, short texts.
    """

    label: str
    done: float
    total: float | None
    seconds_left: float | None = None
    numbers: Sequence[str] = ()

    @property
    def eta(self) -> str:
        """The time left as text, '' where there is no total to tell it by."""
        if self.total is None:
            return ""
        return "eta -" if self.seconds_left is None else f"eta {format_duration(max(self.seconds_left, 0.0))}"

    def __str__(self) -> str:
        """One line of a log."""
        return "  ".join(filter(None, [self.label, *self.numbers, self.eta]))


def seconds_left(elapsed: float, done: float, total: float | None) -> float | None:
    """Returns how long the rest of `total` takes if it goes on as in the `elapsed` seconds that `done` took."""
    return None if total is None or not done else elapsed / done * (total - done)


class Screen(TypedDict, total=False):
    """Where a display shows itself.

    Attributes:
      stream: where to write; each display has its own default.
      terminal: whether that is a terminal; found out if None.
      period: seconds between the lines of a log.
      silent: whether to show nothing: one process of a run speaks.
    """

    stream: TextIO | None
    terminal: bool | None
    period: float
    silent: bool


class Display(abc.ABC):
    """Shows how far work is; use as a context manager, or call `start` and `close`.

    On a terminal a bar, and a line of numbers under it, stay at the foot, redrawn twice a second, and notes scroll
    above them. Elsewhere (a file, a pipe) `changed` prints a line once a period.
    """

    stays = False  # whether the bar is left on the terminal at the end

    def __init__(self, default: TextIO, **screen: Unpack[Screen]) -> None:
        """`default` is where to write unless `screen` says otherwise."""
        self._stream = screen.get("stream") or default
        self._period, self._silent = screen.get("period", 10.0), screen.get("silent", False)
        self._printed = time.monotonic()
        self._held = contextlib.ExitStack()  # the terminal
        self._live: Live | None = None
        terminal = screen.get("terminal")
        if not self._silent and (is_terminal(self._stream) if terminal is None else terminal):
            self._live = Live(
                get_renderable=self._render,
                console=console_on(self._stream),
                refresh_per_second=2,
                transient=not self.stays,
                vertical_overflow="crop",
            )

    @property
    def is_log(self) -> bool:
        """Whether there is no terminal to draw on."""
        return self._live is None

    @abc.abstractmethod
    def bar(self) -> Bar | None:
        """Returns what is shown, None for nothing at this moment; may be called from another thread."""

    def start(self) -> None:
        """Draws the bar, which other displays make room for. May be called twice."""
        if self._live is not None and not self._live.is_started:
            self._held.enter_context(through(self.note))
            self._live.start()

    def changed(self) -> None:
        """Says that `bar` may have changed: a log has a line of it if one is due."""
        if self._live is None and time.monotonic() - self._printed >= self._period:
            self.print_line()

    def print_line(self) -> None:
        """Prints a line of a log now; a terminal has the bar."""
        self._printed, bar = time.monotonic(), self.bar()
        if self._live is None and bar is not None:
            self.note(str(bar))

    def redraw(self) -> None:
        """Draws the bar now, instead of within half a second."""
        if self._live is not None:
            self._live.refresh()

    def note(self, text: str) -> None:
        """Prints a line or several, above the bar."""
        if self._silent:
            return
        if self._live is None:
            print(text, file=self._stream, flush=True)
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away, or leaves it as it stands, and gives the terminal back. May be called twice."""
        if self._live is not None and self._live.is_started:
            self._live.stop()
        self._held.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _render(self) -> RenderableType:
        bar = self.bar()
        if bar is None:
            return Text("")
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        share = ProgressBar(total=bar.total, completed=bar.done, pulse=bar.total is None)
        row.add_row(Text(bar.label), share, Text(bar.eta))
        numbers = Text("  ".join(bar.numbers), no_wrap=True, overflow="ellipsis")
        return Group(row, numbers) if bar.numbers else row


class _Bytes(Display):
    def __init__(self, total: int, what: str, **screen: Unpack[Screen]) -> None:
        self._total, self._what, self._done, self._began = total, what, 0, time.monotonic()
        super().__init__(sys.stderr, **screen)

    def advance(self, size: int) -> None:
        self._done += size
        self.changed()

    def bar(self) -> Bar:
        elapsed = time.monotonic() - self._began
        label = f"{self._what}  {format_bytes(self._done)} of {format_bytes(self._total)}"
        rate = f"{format_bytes(self._done / max(elapsed, 1e-9))}/s"
        return Bar(label, self._done, self._total, seconds_left(elapsed, self._done, self._total), [rate])


@contextlib.contextmanager
def progress_of_bytes(total: int, what: str, **screen: Unpack[Screen]) -> Iterator[Callable[[int], None]]:
    """Yields a function to be told how many more bytes of `total` were written; shows on standard error."""
    with _Bytes(total, what, **screen) as shown:
        yield shown.advance
