"""The schedule of a pipeline, which stage works on what and when: plain arrays, checked without any device.

A network split into S stages and V repeats is a chain of S * V parts; part p is on stage p % S and runs in repeat
p // S. A batch passes through it as M microbatches. The schedule is of the forward pass; automatic differentiation runs
its mirror image.
"""

from typing import NamedTuple

import numpy as np


class Walk(NamedTuple):
    """A schedule as arrays [time, stages], for a program whose idle stages compute too, to no effect.

    Attributes:
      microbatch, repeat: int32. An idle stage repeats the last microbatch it worked on, or takes the first, in repeat
        0: inputs that occur anyway, so that the discarded results are as finite as the others.
      active: bool, false where a stage is idle.
    """

    microbatch: np.ndarray
    repeat: np.ndarray
    active: np.ndarray


def circular(num_stages: int, num_microbatches: int, num_repeats: int = 1) -> Walk:
    """Returns the schedule that goes `num_repeats` times around the stages.

    With one repeat it is GPipe's (Huang et al. 2019, section 2.3). With more it is the interleaved schedule of
    Narayanan et al. 2021 (section 2.2): microbatches go in groups of S, a group passes all its V repeats before the
    next one starts, and each stage hands on what it made at once. Of two stages, four microbatches and two repeats,
    with "m.v" for microbatch m in repeat v and "-" for an idle stage:

        time      0    1    2    3    4    5    6    7    8
        stage 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1   -
        stage 1   -   0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

    The idle share is (S - 1) / (M V + S - 1).

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
    count = num_microbatches * num_repeats  # what each stage works on, one after the other
    time, stage = np.arange(count + num_stages - 1)[:, None], np.arange(num_stages)
    turn = time - stage  # each stage starts one time step after the one before it
    active = (turn >= 0) & (turn < count)
    turn = np.clip(turn, 0, count - 1)
    microbatch = turn // (group * num_repeats) * group + turn % group
    repeat = np.where(active, turn % (group * num_repeats) // group, 0)
    return Walk(microbatch.astype(np.int32), repeat.astype(np.int32), active)
