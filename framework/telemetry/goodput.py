"""Goodput: the share of a run's time spent on steps that count towards its final model, and where the rest went.

It is computed from `timeline.jsonl` alone, over all attempts of the run.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.telemetry.timeline import parse_line
from meshway.framework.terminal import format_duration

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
