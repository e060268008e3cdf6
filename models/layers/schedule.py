"""The schedule of a pipeline, which stage works on what and when: plain data, checked without any device.

A network split into S stages and V repeats is a chain of S * V parts; part p is on stage p % S and runs in repeat
p // S. A batch passes through it as M microbatches.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Work:
    """One microbatch in one part of the network, on its way forward, or backward as a gradient."""

    microbatch: int
    repeat: int = 0
    backward: bool = False


class Walk(NamedTuple):
    """A table as arrays [time, stages], for a program in which idle stages compute too and their results are discarded.

    Attributes:
      microbatch, repeat: int32. An idle stage repeats the last microbatch it worked on, or takes the first, in repeat
        0: inputs that occur anyway, so that the discarded results are as finite as the others.
      active: bool, false where a stage is idle.
    """

    microbatch: np.ndarray
    repeat: np.ndarray
    active: np.ndarray


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table: time step -> stage -> its work, or None where it is idle. A table that exists is right.

    Without backward work it says how the forward pass runs, and automatic differentiation runs the mirror image of it.
    """

    num_stages: int
    num_microbatches: int
    num_repeats: int
    table: tuple[tuple[Work | None, ...], ...]

    def __post_init__(self) -> None:
        """Raises ValueError where work is missing, double, unknown, or done before what it needs."""
        times = self._times()
        parts = self.num_stages * self.num_repeats
        phases = (False, True) if any(backward for *_, backward in times) else (False,)
        wanted = set(itertools.product(range(self.num_microbatches), range(parts), phases))
        if times.keys() != wanted:
            missing, unknown = sorted(wanted - times.keys()), sorted(times.keys() - wanted)
            raise ValueError(f"schedule: (microbatch, part, backward) missing {missing[:3]}, unknown {unknown[:3]}")
        for (microbatch, part, backward), time in times.items():
            for needed in _needs(microbatch, part, backward, parts):
                if times[needed] >= time:
                    raise ValueError(
                        f"schedule: time {time} works on (microbatch, part, backward) {(microbatch, part, backward)}, "
                        f"which needs {needed}, done at time {times[needed]}"
                    )

    @property
    def idle_share(self) -> float:
        """The share of (time step, stage) pairs without work, in [0, 1): the bubble, counted."""
        works = [work for row in self.table for work in row]
        return works.count(None) / len(works)

    @property
    def peak_live(self) -> int:
        """The most inputs a stage keeps at once for its backward work; a table without any keeps all of them."""
        peak = 0
        for stage in range(self.num_stages):
            live = 0
            for row in self.table:
                work = row[stage]
                if work is not None:
                    live += -1 if work.backward else 1
                    peak = max(peak, live)
        return peak

    @property
    def flows(self) -> bool:
        """Whether each part of the network takes a microbatch up one time step after the part before it: stages then
        hand on what they made, all at once, and store nothing."""
        times = self._times()
        return all(
            time == times[needed] + 1
            for work, time in times.items()
            for needed in _needs(*work, self.num_stages * self.num_repeats)
        )

    def walk(self) -> Walk:
        """Returns the table as arrays."""
        shape = (len(self.table), self.num_stages)
        microbatch, repeat, active = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for time, row in enumerate(self.table):
            for stage, work in enumerate(row):
                here = time, stage
                if work is not None:
                    microbatch[here], repeat[here], active[here] = work.microbatch, work.repeat, True
                elif time:
                    microbatch[here] = microbatch[time - 1, stage]
        return Walk(microbatch, repeat, active)

    def _times(self) -> dict[tuple[int, int, bool], int]:
        """Returns when each (microbatch, part, backward) is worked on."""
        times: dict[tuple[int, int, bool], int] = {}
        for time, row in enumerate(self.table):
            if len(row) != self.num_stages:
                raise ValueError(f"schedule: time {time} has {len(row)} entries for {self.num_stages} stages")
            for stage, work in enumerate(row):
                if work is None:
                    continue
                key = (work.microbatch, work.repeat * self.num_stages + stage, work.backward)
                if key in times:
                    raise ValueError(f"schedule: {work} on stage {stage} at times {times[key]} and {time}")
                times[key] = time
        return times


def circular(num_stages: int, num_microbatches: int, num_repeats: int = 1) -> Schedule:
    """Returns the forward schedule that goes `num_repeats` times around the stages.

    With one repeat it is GPipe's (Huang et al. 2019, section 2.3). With more it is the interleaved schedule of
    Narayanan et al. 2021 (section 2.2): microbatches go in groups of S, a group passes all its V repeats before the
    next one starts, and each stage hands on what it made at once. The idle share is (S - 1) / (M V + S - 1).

    Raises:
      ValueError: a number is below one, or groups of S microbatches do not make up M while V > 1.
    """
    if min(num_stages, num_microbatches, num_repeats) < 1:
        raise ValueError(f"a schedule of {num_stages} stages, {num_microbatches} microbatches, {num_repeats} repeats")
    if num_repeats > 1 and num_microbatches % num_stages:
        groups = num_microbatches // num_stages
        near = [number * num_stages for number in (groups, groups + 1) if number]
        raise ValueError(
            f"num_microbatches={num_microbatches} is no multiple of the {num_stages} stages, around which "
            f"num_repeats={num_repeats} sends microbatches in groups of {num_stages}: use "
            f"{' or '.join(map(str, near))}, or num_repeats=1"
        )
    # With one repeat a group may as well be of one microbatch, so that any number will do.
    group = num_stages if num_repeats > 1 else 1
    table: list[list[Work | None]] = [
        [None] * num_stages for _ in range(num_microbatches * num_repeats + num_stages - 1)
    ]
    for start in range(num_microbatches * num_repeats):
        microbatch = start // (group * num_repeats) * group + start % group
        for stage in range(num_stages):
            table[start + stage][stage] = Work(microbatch, start % (group * num_repeats) // group)
    return Schedule(num_stages, num_microbatches, num_repeats, tuple(map(tuple, table)))


def _needs(microbatch: int, part: int, backward: bool, parts: int) -> list[tuple[int, int, bool]]:
    """Returns what must be done before: the part before (backward, the part after, and the own forward work)."""
    if not backward:
        return [(microbatch, part - 1, False)] if part else []
    after = [(microbatch, part + 1, True)] if part + 1 < parts else []
    return [*after, (microbatch, part, False)]
