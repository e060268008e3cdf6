"""`timeline.jsonl`: how the time of a run is spent, by phase."""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import io_errors

# All of a process's time is counted for one of these.
PHASES = ("startup", "compile", "training", "data_wait", "checkpoint", "evaluation")

_ALIVE_SECONDS = 60.0  # at most between lines
_IMPORTED = time.time()


def process_began() -> float:
    """Returns when the kernel started this process, in seconds since 1970 (Linux); elsewhere, when this was imported.

    Python starts some time later, and the imports of a training run take seconds.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _IMPORTED
    return min(time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK"), _IMPORTED)


class Timeline:
    """A stopwatch that always counts for one phase, and a file with a line at every report and at least every minute.

    Use it as a context manager: leaving it writes how this attempt ended. Each line is complete in itself:

        {"began": 1795377761.25, "time": 1795377803.5, "event": "report", "start_step": 100, "step": 200,
         "seconds": {"startup": 5.25, "compile": 9.5, "training": 27.5, ...}}

    It has the seconds of each phase from `began`, which identifies the attempt, to `time`: their sum is `time - began`.
    So a line that is lost to kill -9 loses only the time since the line before it. Lines are only appended, by one
    process of a run, each in one write.

    Attributes:
      step: the last step that was started.
      outcome: "done" or "stopped": written at the end of an attempt without an error.
    """

    def __init__(self, path: Path | None, start_step: int = 0, began: float | None = None) -> None:
        """Starts the stopwatch in the phase "startup".

        Args:
          path: `MODEL_DIR/timeline.jsonl`; None counts without writing, on all processes but the first.
          start_step: the step that this attempt resumes from.
          began: when the attempt began, in seconds since 1970; None means now. If that is before the file's last line
            (two runs in one process), the time of that line is taken instead.

        Raises:
          UserError: the file cannot be written.
        """
        now = time.time()
        self._offset = now - time.perf_counter()  # later changes of the wall clock do not matter
        self._path, self._file = path, None
        began = now if began is None else began
        if path is not None:
            with io_errors(path):
                self._file, last = _open(path)
            began = max(began, last) if last <= now else began
        self._began = self._since = began
        self._phase, self._seconds = "startup", dict.fromkeys(PHASES, 0.0)
        self._start_step = self.step = start_step
        self._written = began
        self.outcome = "done"

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase since the attempt began; their sum is the time since then."""
        now = self._now()
        self._seconds[self._phase] += now - self._since
        self._since = now
        return dict(self._seconds)

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Counts the time inside for `phase`, one of `PHASES`."""
        before = self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def move(self, seconds: float, phase: str) -> None:
        """Moves seconds from the current phase to another one."""
        self._seconds[self._phase] -= seconds
        self._seconds[phase] += seconds

    def reached(self, step: int) -> None:
        """Notes that a step was started; cheap enough to call at every step."""
        self.step = step
        if self._now() - self._written > _ALIVE_SECONDS:
            self.mark("alive")

    def mark(self, event: str, step: int | None = None, **more: str | int) -> None:
        """Writes a line: `event` has just happened, at `step` (the last that was started, if None).

        Raises:
          UserError: the file cannot be written.
        """
        seconds = self.seconds()
        self._written = self._since
        line = {
            "began": round(self._began, 3),
            "time": round(self._since, 3),
            "event": event,
            "start_step": self._start_step,
            "step": self.step if step is None else step,
            **more,
            "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        }
        if self._path is not None and self._file is not None:
            data = memoryview(json.dumps(line).encode() + b"\n")
            with io_errors(self._path):
                while data:
                    data = data[self._file.write(data) :]

    def end(self, outcome: str) -> None:
        """Writes the attempt's last line, with its outcome, and closes the file; a second call does nothing."""
        if self._file is None:
            return
        try:
            self.mark("end", outcome=outcome)
        finally:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end(self.outcome)
        else:
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            with contextlib.suppress(UserError, EnvironmentFailure):  # the error itself is what is told
                self.end(f"failed: {type(error).__name__}{': ' if reason else ''}{reason}")

    def _enter(self, phase: str) -> str:
        self.seconds()
        before, self._phase = self._phase, phase
        return before

    def _now(self) -> float:
        return self._offset + time.perf_counter()


def parse_line(text: str) -> dict[str, Any] | None:
    """Returns the object of a valid line of the file; None for any other text, such as half a line."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("seconds"), dict):
        return None
    numbers = [line.get("began"), line.get("time"), *(line["seconds"].get(phase) for phase in PHASES)]
    steps = [line.get("start_step"), line.get("step")]
    if not all(_is_number(number) for number in numbers) or not all(_is_step(step) for step in steps):
        return None
    return line


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _open(path: Path) -> tuple[Any, float]:
    """Returns (the file, opened to append whole lines; the time of its last line, 0 while there is none)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b", buffering=0)
    file.seek(0)
    text = file.read()
    if text and not text.endswith(b"\n"):
        file.write(b"\n")  # an incomplete last line stays a line of its own
    lines: list[Mapping[str, Any] | None] = [parse_line(line) for line in text.decode("utf-8", "replace").split("\n")]
    return file, max((line["time"] for line in lines if line), default=0.0)
