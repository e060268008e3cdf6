"""`timeline.jsonl`: how the time of a run is spent, by phase.

Goodput is computed from it alone, over all attempts of the run: the share of the time spent on steps that count towards
the final model, and where the rest went.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import AppendedFile, io_errors, open_to_append
from meshway.framework.terminal import format_duration

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

    def flush(self) -> None:
        """Returns once what was written is where a crash of this process leaves it; raises as `mark`."""
        if self._path is not None and self._file is not None:
            with io_errors(self._path):
                self._file.flush()

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


def _open(path: Path) -> tuple[AppendedFile, float]:
    """Returns (the file, opened to append whole lines; the time of its last line, 0 while there is none)."""
    file, text = open_to_append(path), b""
    with contextlib.suppress(FileNotFoundError):
        text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        file.write(b"\n")  # an incomplete last line stays a line of its own
    lines: list[Mapping[str, Any] | None] = [parse_line(line) for line in text.decode("utf-8", "replace").split("\n")]
    return file, max((line["time"] for line in lines if line), default=0.0)


# Key -> title of each way time is spent; they add up to all of a run's time.
KINDS = {
    "productive": "productive",  # steps that count
    "lost": "lost",  # steps that a later attempt repeated
    "restart": "restart",  # between attempts: no process was running, or none that wrote a line
    "startup": "start-up",  # from the start of the process to the first step, and after the last one
    "compile": "compile",  # the train step; evaluation compiles its own programs within "evaluation"
    "data_wait": "data wait",  # the devices were idle because there was no batch
    "checkpoint": "checkpoint",  # restoring, and the part of saving that blocked training
    "evaluation": "evaluation",
}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the run, by a process or a group of processes.

    Attributes:
      began: seconds since 1970.
      start_step: the step it resumed from.
      last_step: the last step it is known to have started.
      devices: number of devices of its mesh; None if it ended before it built one.
      outcome: "done", "stopped", "failed: ..."; None if it wrote no end: it was killed, or is still running.
      seconds: by kind, all of `KINDS`; "restart" is the time between the attempt before it and this one.
    """

    began: float
    start_step: int
    last_step: int
    devices: int | None
    outcome: str | None
    seconds: Mapping[str, float]

    @property
    def ended(self) -> float:
        """The time of its last line, in seconds since 1970."""
        return self.began + sum(self.seconds.values()) - self.seconds["restart"]


@dataclasses.dataclass(frozen=True)
class Goodput:
    """The attempts of a run and how their time was spent."""

    attempts: Sequence[Attempt]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by kind, of all attempts; their sum is `wall`."""
        return {kind: sum(attempt.seconds[kind] for attempt in self.attempts) for kind in KINDS}

    @property
    def wall(self) -> float:
        """Seconds from the start of the first attempt to the last line of the last one."""
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """Each kind's share of `wall`; that of "productive" is the goodput."""
        wall = self.wall
        return {kind: value / wall if wall else 0.0 for kind, value in self.seconds.items()}


def goodput(lines: Iterable[Mapping[str, Any]]) -> Goodput:
    """Sums the lines of a timeline, in the order of the file.

    An attempt's steps after the one that a later attempt resumed from are lost. Their time is interpolated linearly
    between the attempt's two lines around that step.

    Where clocks disagree (an attempt begins before the previous one ended), "restart" between the two is 0.

    Args:
      lines: what `timeline.parse_line` returned.
    """
    by_attempt: dict[float, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_attempt.setdefault(line["began"], []).append(line)
    groups = list(by_attempt.values())
    # For each attempt, the lowest step that any later one resumed from.
    starts = [lines[-1]["start_step"] for lines in groups]
    resumed_from = [min(starts[index + 1 :], default=None) for index in range(len(groups))]
    attempts: list[Attempt] = []
    for lines, step in zip(groups, resumed_from, strict=True):
        attempts.append(_attempt(lines, step, attempts[-1].ended if attempts else None))
    return Goodput(attempts)


def read_goodput(path: Path) -> Goodput:
    """Reads a timeline; invalid lines, such as one cut short by kill -9, are ignored.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return goodput(line for line in map(parse_line, text.split("\n")) if line)


def in_one_line(found: Goodput) -> str:
    """Returns a line for a terminal: `goodput 83 % of 12:34: compile 9 %, evaluation 5 %, start-up 3 %`."""
    shares = found.shares
    productive = shares.pop("productive")
    rest = sorted(shares.items(), key=lambda item: -item[1])
    parts = [f"{KINDS[kind]} {100 * share:.0f} %" for kind, share in rest if share >= 0.005]
    attempts = f" in {len(found.attempts)} attempts" if len(found.attempts) > 1 else ""
    head = f"goodput {100 * productive:.0f} % of {format_duration(found.wall)}{attempts}"
    return f"{head}: {', '.join(parts)}" if parts else head


def _attempt(lines: Sequence[Mapping[str, Any]], resumed_from: int | None, before: float | None) -> Attempt:
    """Returns an attempt whose steps after `resumed_from` are lost (None: none is); `before` is the end of the one
    before."""
    last = lines[-1]
    training = last["seconds"]["training"]
    last_step = max(line["step"] for line in lines)
    productive = training
    if resumed_from is not None and resumed_from < last_step:
        productive = min(training, _training_until(lines, resumed_from))
    seconds = dict.fromkeys(KINDS, 0.0) | {kind: last["seconds"][kind] for kind in KINDS if kind in last["seconds"]}
    seconds["productive"], seconds["lost"] = productive, training - productive
    seconds["restart"] = 0.0 if before is None else max(0.0, last["began"] - before)
    devices = [line["devices"] for line in lines if type(line.get("devices")) is int]
    outcome = last.get("outcome")
    return Attempt(
        began=last["began"],
        start_step=last["start_step"],
        last_step=last_step,
        devices=devices[-1] if devices else None,
        outcome=outcome if isinstance(outcome, str) else None,
        seconds=seconds,
    )


def _training_until(lines: Sequence[Mapping[str, Any]], step: int) -> float:
    """Returns the seconds of training until `step` was done."""
    steps = list(itertools.accumulate([lines[-1]["start_step"], *(line["step"] for line in lines)], max))
    times = list(itertools.accumulate([0.0, *(line["seconds"]["training"] for line in lines)], max))
    after = bisect.bisect_left(steps, step)
    if after == len(steps):
        return times[-1]
    if after == 0:
        return 0.0
    share = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return times[after - 1] + share * (times[after] - times[after - 1])
