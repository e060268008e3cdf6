"""Schedules of pipelines: what they must hold, and their closed forms."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshway.models.layers.pipeline import circular

SIZES = st.builds(  # stages, microbatches, repeats
    lambda stages, groups, repeats, rest: (stages, groups * stages + (rest % stages if repeats == 1 else 0), repeats),
    *[st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5)],
)


@given(SIZES)
def test_circular_does_all_work_once_in_order_and_at_once(sizes):
    stages, microbatches, repeats = sizes
    walk = circular(*sizes)
    done = {}
    for time, stage in np.argwhere(walk.active):
        part = walk.repeat[time, stage] * stages + stage
        assert done.setdefault((walk.microbatch[time, stage], part), time) == time
    assert len(done) == stages * microbatches * repeats == walk.active.sum()
    for (microbatch, part), time in done.items():
        assert part == 0 or done[microbatch, part - 1] == time - 1


@given(SIZES)
def test_idle_share_is_the_formula(sizes):
    stages, microbatches, repeats = sizes
    idle = Fraction(stages - 1, microbatches * repeats + stages - 1)
    assert idle_share(circular(*sizes)) == pytest.approx(float(idle), abs=1e-12)


@given(SIZES)
def test_idle_stages_work_on_what_there_is(sizes):
    stages, microbatches, _ = sizes
    walk = circular(*sizes)
    for time, stage in np.argwhere(~walk.active):
        here = time, stage
        assert (walk.microbatch[here], walk.repeat[here]) == (0 if time < stage else microbatches - 1, 0)


def idle_share(walk):
    return 1 - walk.active.mean()


def test_two_stages_twice_around():
    """Drawn by hand: microbatches go in pairs, around twice, before the next pair starts."""
    walk = circular(2, 4, 2)
    first = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    np.testing.assert_array_equal(np.stack([walk.microbatch, walk.repeat], -1)[:-1, 0], first)
    np.testing.assert_array_equal(np.stack([walk.microbatch, walk.repeat], -1)[1:, 1], first)


def test_groups_must_fill():
    with pytest.raises(ValueError, match="num_microbatches=6 is no multiple of the 4 stages.* use 4 or 8"):
        circular(4, 6, 2)
    with pytest.raises(ValueError, match="use 4, or num_repeats=1"):
        circular(4, 3, 2)
    assert idle_share(circular(4, 3)) == 0.5
    with pytest.raises(ValueError, match="0 microbatches"):
        circular(4, 0)
