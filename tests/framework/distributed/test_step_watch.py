"""Which steps are late: by a clock of the test's own."""

import pytest

from meshway.framework.distributed.barrier import Deadlines
from meshway.framework.distributed.processes import StepWatch
from meshway.framework.errors import UserError


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def after_steps(count, seconds=1.0, **options):
    clock = Clock()
    watch = StepWatch(**{"times": 10.0, "least": 5.0, "hang": 100.0, "clock": clock} | options)
    for step in range(1, count + 1):
        clock.now += seconds
        watch.finished(step)
    return clock, watch


def test_ten_times_the_median_is_late_once():
    clock, watch = after_steps(20)
    clock.now += 9.9
    assert watch.late() is None
    clock.now += 0.2
    assert watch.late() == (pytest.approx(10.1), 1.0)
    clock.now += 50.0
    assert watch.late() is None, "said already"
    watch.finished(21)
    clock.now += 11.0
    assert watch.late() == (pytest.approx(11.0), 1.0), "one slow step does not move the median"


def test_short_steps_are_never_late_before_the_least():
    clock, watch = after_steps(20, seconds=0.01)
    clock.now += 4.9
    assert watch.late() is None
    clock.now += 0.2
    assert watch.late() is not None


def test_warm_up_is_not_counted():
    clock = Clock()
    watch = StepWatch(least=0.0, clock=clock)
    for step, seconds in enumerate([60.0, 60.0, *[1.0] * 4], start=1):
        clock.now += seconds
        watch.finished(step)
    clock.now += 1000.0
    assert watch.late() is None, "too few steps for a median"
    watch.finished(7)
    clock.now += 11.0
    assert watch.late() is not None, "the median is that of 1, 1, 1, 1, 1000: the first two are left out"


def test_pauses_are_left_out():
    clock, watch = after_steps(20)
    clock.now += 3.0
    with watch.paused():
        clock.now += 500.0
        assert watch.late() is None and watch.hangs() is None
    clock.now += 6.0
    assert watch.late() is None
    clock.now += 2.0
    assert watch.late() == (pytest.approx(11.0), 1.0)


def test_a_step_that_hangs():
    clock, watch = after_steps(3)
    assert watch.hangs() is None
    clock.now += 101.0
    assert watch.hangs() == 101.0


def test_deadlines_come_from_the_environment():
    assert Deadlines.of({}).heartbeat == 30.0
    assert Deadlines.of({"MESHWAY_HEARTBEAT_SECONDS": "2.5"}).heartbeat == 2.5
    for wrong in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(UserError, match="MESHWAY_HANG_SECONDS"):
            Deadlines.of({"MESHWAY_HANG_SECONDS": wrong})
