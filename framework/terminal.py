"""What commands show on a terminal: tables, counts of things, the version, and what is being done right now.

How far something is, is shown by `progress.py`.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text


def format_columns(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Returns a line for each row, cells padded to the widest of their column and two spaces apart.

    Args:
      rows: cells, as many in each row; the first may be a heading.
      right: numbers of the columns that are aligned right; the others are left.

    Raises:
      ValueError: a row has more or fewer cells than another.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if number in right else "<" for number in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def is_terminal(stream: TextIO) -> bool:
    """Returns whether lines at the foot of a stream can be redrawn."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def console_on(stream: TextIO) -> "Console":
    """Returns what draws on a terminal, in its own colours."""
    from rich.console import Console

    return Console(file=stream, force_terminal=True, highlight=False)


def count_of(number: int, noun: str, verb: str = "", plural: str = "") -> str:
    """Returns a number and its noun, and after it a verb that agrees.

    Args:
      number: how many.
      noun: of one of them.
      verb: 'is' or 'has', as of one; '' for none.
      plural: of several, where it is not the noun with an s.
    """
    one = number == 1
    words = [f"{number:,}", noun if one else plural or f"{noun}s"]
    return " ".join([*words, verb if one else {"is": "are", "has": "have", "": ""}[verb]]).rstrip()


def listed(items: Iterable[object], limit: int = 8, separator: str = ", ") -> str:
    """Returns things in one line, the first `limit` of them: 'a, b and 3 more', or with '; ' 'a; b; and 3 more'."""
    texts = [str(item) for item in items]
    left = f"{' ' if separator == ', ' else separator}and {len(texts) - limit} more" if len(texts) > limit else ""
    return separator.join(texts[:limit]) + left


def installed_version() -> str:
    """Returns the version of the installed package, "uninstalled" where it runs from a folder."""
    try:
        return metadata.version("meshway")
    except metadata.PackageNotFoundError:
        return "uninstalled"


_WORTH_SECONDS = 1.0  # what took less is not said to have ended


class Stages:
    """Shows what is being done, one thing inside another.

    On a terminal the foot of it holds a line with a clock; in a log each stage has a line when it begins, and another
    every `period` seconds. Either way one that took a second or more leaves a line that says how long. All goes to
    standard error by default: standard output is for results.

    Args:
      stream: where to write, standard error if None.
      terminal: whether that is a terminal; found out if None.
      period: seconds between the lines of a log.
      silent: whether to show nothing: one process of a run speaks.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        period: float = 30.0,
        silent: bool = False,
    ) -> None:
        self._stream, self._period, self.silent = _standard_error() if stream is None else stream, period, silent
        self._terminal = is_terminal(self._stream) if terminal is None else terminal
        self._thread = threading.current_thread()
        self._open: list[tuple[str, float]] = []
        self._say: Callable[[str], None] | None = None
        self._live: Live | None = None

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Shows `what` for the time of a `with` block. Other threads than the one that made this are not heard."""
        if self.silent or threading.current_thread() is not self._thread:
            yield
            return
        began = time.monotonic()
        self._open.append((what, began))
        ended = self._begin(what)
        try:
            yield
        except BaseException:
            self._end(ended)
            raise
        self._end(ended)
        if (seconds := time.monotonic() - began) >= _WORTH_SECONDS:
            self._print(f"{what}: {_said(seconds)}")

    @contextlib.contextmanager
    def through(self, say: Callable[[str], None]) -> Iterator[None]:
        """Gives the terminal to another display for the time of a `with` block; `say` prints a line above it."""
        before, self._say = self._say, say
        self._pause()
        try:
            yield
        finally:
            self._say = before
            if self._open:
                self._resume()

    def _begin(self, what: str) -> threading.Event:
        """Says that a stage begins; the event, once set, keeps it from being said again."""
        ended = threading.Event()
        if self._terminal and self._say is None:
            self._resume()
        else:
            self._print(f"{what} ...")
            if len(self._open) == 1:
                threading.Thread(target=self._repeat, args=(ended,), daemon=True).start()
        return ended

    def _end(self, ended: threading.Event) -> None:
        ended.set()
        self._open.pop()
        if not self._open:
            self._pause()

    def _repeat(self, ended: threading.Event) -> None:
        while not ended.wait(self._period):
            with contextlib.suppress(IndexError):  # it ends this very moment
                what, began = self._open[-1]
                self._print(f"{what}: {_said(time.monotonic() - began)} so far")

    def _resume(self) -> None:
        if self._terminal and self._say is None and self._live is None:
            from rich.live import Live

            self._live = Live(
                get_renderable=self._line,
                console=console_on(self._stream),
                refresh_per_second=4,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # else results would end on the terminal
            )
            self._live.start()

    def _pause(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _line(self) -> "Text":
        from rich.text import Text

        what, began = self._open[-1] if self._open else ("", time.monotonic())
        return Text(f"{what} ... {time.monotonic() - began:.0f} s", no_wrap=True, overflow="ellipsis")

    def _print(self, line: str) -> None:
        if self._say is not None:
            self._say(line)
        elif self._live is not None:
            self._live.console.print(line, soft_wrap=True, markup=False)
        else:
            with contextlib.suppress(OSError, ValueError):  # nobody listens; that is no reason to end
                print(line, file=self._stream, flush=True)


_shown: Stages | None = None


@contextlib.contextmanager
def shown(stages: Stages) -> Iterator[None]:
    """Lets `stage`, wherever it is called, show itself there for the time of a `with` block: commands do so, and a
    library says nothing."""
    global _shown
    before, _shown = _shown, stages
    try:
        yield
    finally:
        _shown = before


def stage(what: str) -> contextlib.AbstractContextManager[None]:
    """Shows `what` for the time of a `with` block, if this is a command (see `Stages.stage`)."""
    return contextlib.nullcontext() if _shown is None else _shown.stage(what)


def through(say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Gives the terminal to another display for the time of a `with` block (see `Stages.through`)."""
    return contextlib.nullcontext() if _shown is None else _shown.through(say)


def silence() -> None:
    """Shows no more: another process of the run speaks."""
    if _shown is not None:
        _shown.silent = True


def _standard_error() -> TextIO:
    """Returns standard error as it is now: TensorFlow's import turns it elsewhere for seconds (`start_up_notes`)."""
    try:
        return open(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
    except (OSError, ValueError, AttributeError):  # none, or one of a test's
        return sys.stderr


@contextlib.contextmanager
def spoken_on(descriptor: int) -> Iterator[None]:
    """Points `sys.stderr` at a descriptor for the time of a `with` block in which stream 2 itself is turned elsewhere.

    It stays open as long as it is used: a logger that is made meanwhile keeps what it found.
    """
    before = sys.stderr
    before.flush()
    try:
        is_redirected = before.fileno() == 2
    except (OSError, ValueError):  # a test's own
        is_redirected = False
    if is_redirected:
        sys.stderr = open(descriptor, "w", buffering=1, encoding=before.encoding, errors=before.errors)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stderr = before
        if not is_redirected:
            os.close(descriptor)


def _said(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def format_duration(seconds: float) -> str:
    """Returns seconds as `m:ss`, from an hour on `h:mm:ss`, from a day on `Dd h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}d {clock}" if days else clock


def format_bytes(count: float) -> str:
    """Returns 1,234 B, 5.6 KiB, 7.8 MiB or 9.0 GiB."""
    if count < 1024:
        return f"{count:,.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            return f"{count:,.1f} {unit}"
    raise AssertionError
