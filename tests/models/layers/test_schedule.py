"""Schedules of pipelines: what a table must hold, and the closed forms of the circular one."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshway.models.layers.schedule import Schedule, Work, circular

SIZES = st.builds(  # stages, microbatches, repeats
    lambda stages, groups, repeats, rest: (stages, groups * stages + (rest % stages if repeats == 1 else 0), repeats),
    *[st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5)],
)


@given(SIZES)
def test_circular_does_all_work_once_in_order_and_at_once(sizes):
    stages, microbatches, repeats = sizes
    made = circular(*sizes)
    done = {}
    for time, row in enumerate(made.table):
        for stage, work in enumerate(row):
            if work is not None:
                assert done.setdefault((work.microbatch, work.repeat * stages + stage), time) == time
    assert len(done) == stages * microbatches * repeats
    for (microbatch, part), time in done.items():
        assert part == 0 or done[microbatch, part - 1] == time - 1
    assert made.flows


@given(SIZES)
def test_idle_share_is_the_formula(sizes):
    stages, microbatches, repeats = sizes
    idle = Fraction(stages - 1, microbatches * repeats + stages - 1)
    assert circular(*sizes).idle_share == pytest.approx(float(idle), abs=1e-12)


@given(SIZES)
def test_walk_is_the_table_and_idle_stages_work_on_what_there_is(sizes):
    stages, microbatches, repeats = sizes
    made = circular(*sizes)
    walk = made.walk()
    for time, row in enumerate(made.table):
        for stage, work in enumerate(row):
            here = time, stage
            assert walk.active[here] == (work is not None)
            if work is not None:
                assert (walk.microbatch[here], walk.repeat[here]) == (work.microbatch, work.repeat)
            else:
                assert (walk.microbatch[here], walk.repeat[here]) == (0 if time < stage else microbatches - 1, 0)
    assert walk.active.sum() == stages * microbatches * repeats


def test_two_stages_twice_around():
    """Drawn by hand: microbatches go in pairs, around twice, before the next pair starts."""
    walk = circular(2, 4, 2).walk()
    first = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    np.testing.assert_array_equal(np.stack([walk.microbatch, walk.repeat], -1)[:-1, 0], first)
    np.testing.assert_array_equal(np.stack([walk.microbatch, walk.repeat], -1)[1:, 1], first)


def one_forward_one_backward(stages, microbatches):
    """1F1B (Narayanan et al. 2021, figure 4) as a table: backward work first, and at most stages - s inputs kept."""
    done, rows = {}, []
    while len(done) < 2 * stages * microbatches:
        row = []
        for stage in range(stages):
            forward, backward = (
                [m for m in range(microbatches) if (m, stage, phase) in done] for phase in (False, True)
            )
            here = None
            m = len(backward)
            if m < len(forward) and (stage == stages - 1 or (m, stage + 1, True) in done):
                here = Work(m, backward=True)
            m = len(forward)
            free = m < microbatches and m - len(backward) < stages - stage
            if here is None and free and (stage == 0 or (m, stage - 1, False) in done):
                here = Work(m)
            row.append(here)
        done |= {(work.microbatch, stage, work.backward): 1 for stage, work in enumerate(row) if work is not None}
        rows.append(tuple(row))
    return Schedule(stages, microbatches, 1, tuple(rows))


@pytest.mark.parametrize("stages, microbatches", [(2, 4), (3, 5), (4, 8)])
def test_schedules_with_backward_work_are_data_too(stages, microbatches):
    """1F1B idles as long as GPipe and keeps fewer inputs: one a stage instead of one a microbatch."""
    made = one_forward_one_backward(stages, microbatches)
    assert made.idle_share == pytest.approx(circular(stages, microbatches).idle_share)
    assert made.peak_live == stages
    assert circular(stages, microbatches).peak_live == microbatches
    assert circular(stages, 2 * stages, 2).peak_live == 4 * stages


A, B = Work(0), Work(1)


@pytest.mark.parametrize(
    "table, message",
    [
        ([(A, None), (None, A)], "missing"),
        ([(A, None), (B, A), (A, B)], r"Work\(microbatch=0.*stage 0 at times 0 and 2"),
        ([(A, None), (B, A), (Work(2), B), (None, Work(2))], "unknown"),
        ([(A, A), (B, B)], "which needs"),
        ([(A,), (B,)], "1 entries for 2 stages"),
        ([(A, None), (B, A), (None, B), (Work(0, backward=True), None)], "missing"),
    ],
)
def test_wrong_tables_are_refused(table, message):
    Schedule(2, 2, 1, ((A, None), (B, A), (None, B)))
    with pytest.raises(ValueError, match=message):
        Schedule(2, 2, 1, tuple(table))


def test_groups_must_fill():
    with pytest.raises(ValueError, match="num_microbatches=6 is no multiple of the 4 stages.* use 4 or 8"):
        circular(4, 6, 2)
    with pytest.raises(ValueError, match="use 4, or num_repeats=1"):
        circular(4, 3, 2)
    assert circular(4, 3).idle_share == 0.5
    with pytest.raises(ValueError, match="0 microbatches"):
        circular(4, 0)
