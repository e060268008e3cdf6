import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshway.framework.telemetry.timeline import KINDS, PHASES, Goodput, goodput, in_one_line


def line(began: float, start_step: int, step: int, event: str = "report", **seconds: Any) -> dict[str, Any]:
    """A line of a timeline; `outcome` and `devices` are of the line, all else are seconds since `began`."""
    more = {name: seconds.pop(name) for name in ("outcome", "devices") if name in seconds}
    spent = dict.fromkeys(PHASES, 0.0) | seconds
    where = {"began": began, "time": began + sum(spent.values()), "start_step": start_step, "step": step}
    return where | {"event": event, "seconds": spent} | more


def test_a_killed_attempt_and_the_one_that_went_on() -> None:
    found = goodput(
        [
            line(1000, 0, 0, "ready", startup=10),
            line(1000, 0, 0, "compiled", startup=10, compile=20, devices=8),
            line(1000, 0, 100, startup=11, compile=20, training=50, data_wait=2),
            line(1000, 0, 100, "checkpoint", startup=11, compile=20, training=51, data_wait=2, checkpoint=4),
            line(1000, 0, 200, startup=11, compile=20, training=131, data_wait=2, checkpoint=4),  # then kill -9
            line(1300, 150, 150, "ready", startup=9, checkpoint=3),
            line(1300, 150, 250, startup=9, compile=12, checkpoint=3, training=70, evaluation=6, devices=4),
            line(1300, 150, 250, "end", startup=9, compile=12, checkpoint=5, training=70, evaluation=6, outcome="done"),
        ]
    )
    first, second = found.attempts
    # Step 150 is half way between those of 51 and 131 seconds; the second attempt began 300 s after the first, which
    # was last heard of after 168.
    assert first.seconds == {
        "productive": 91.0,
        "compile": 20.0,
        "startup": 11.0,
        "data_wait": 2.0,
        "checkpoint": 4.0,
        "evaluation": 0.0,
        "lost": 40.0,
        "restart": 0.0,
    }
    assert (first.outcome, first.devices, first.last_step, first.ended) == (None, 8, 200, 1168.0)
    assert second.seconds["restart"] == 132.0 and second.seconds["lost"] == 0.0
    assert (second.outcome, second.devices, second.start_step, second.ended) == ("done", 4, 150, 1402.0)
    assert found.wall == sum(found.seconds.values()) == 402.0
    assert found.shares["productive"] == (91 + 70) / 402
    assert in_one_line(found) == (
        "goodput 40 % of 6:42 in 2 attempts: restart 33 %, lost 10 %, compile 8 %, start-up 5 %, checkpoint 2 %, "
        "evaluation 1 %"
    )


def test_a_clean_stop_loses_nothing() -> None:
    found = goodput(
        [
            line(0, 0, 60, startup=5, training=60),
            line(0, 0, 73, "end", startup=5, training=73, checkpoint=1, outcome="stopped"),
            line(100, 73, 100, "end", startup=5, training=27, outcome="done"),
        ]
    )
    assert found.seconds["lost"] == 0.0 and found.seconds["productive"] == 100.0
    assert found.seconds["restart"] == 21.0 and found.wall == 132.0


def test_time_after_the_last_step_is_not_lost_where_that_step_is_not() -> None:
    stopped = [line(0, 0, 73, training=73), line(0, 0, 73, "end", training=73.5, outcome="stopped")]
    found = goodput([*stopped, line(100, 73, 100, training=27)])
    assert found.seconds["lost"] == 0.0 and found.seconds["productive"] == 100.5


def test_a_later_attempt_that_goes_back_further_throws_away_the_work_of_several() -> None:
    found = goodput(
        [
            line(0, 0, 100, training=100),
            line(100, 80, 120, training=40),
            line(140, 50, 60, training=10),
            line(150, 55, 70, "end", training=15, outcome="done"),
        ]
    )
    assert [attempt.seconds["lost"] for attempt in found.attempts] == [50.0, 40.0, 5.0, 0.0]


def test_what_comes_after_a_step_is_of_the_next_one() -> None:
    lines = [line(0, 0, 100, "report", training=50), line(0, 0, 100, "checkpoint", training=51)]
    found = goodput([*lines, line(0, 0, 101, training=60), line(100, 100, 110, training=5)])
    assert found.attempts[0].seconds["productive"] == 50.0


def test_a_run_begun_anew_has_lost_all_before() -> None:
    found = goodput([line(0, 0, 100, training=100), line(100, 0, 10, training=10)])
    assert [attempt.seconds["productive"] for attempt in found.attempts] == [0.0, 10.0]


def test_steps_after_the_last_line_of_a_killed_attempt_are_in_a_checkpoint_all_the_same() -> None:
    found = goodput([line(0, 0, 100, training=100), line(200, 150, 200, training=50)])
    assert found.seconds["lost"] == 0.0 and found.seconds["productive"] == 150.0


def test_clocks_that_disagree_make_no_time() -> None:
    found = goodput([line(1000, 0, 100, training=100), line(900, 100, 200, training=100)])
    assert found.seconds["restart"] == 0.0 and found.wall == 200.0


def test_nothing_is_known_of_an_empty_timeline() -> None:
    assert goodput([]) == Goodput([])
    assert goodput([]).wall == 0.0 and set(goodput([]).shares.values()) == {0.0}
    assert in_one_line(goodput([])) == "goodput 0 % of 0:00"


SECONDS = st.floats(0, 1e4)
STEP = st.fixed_dictionaries({phase: SECONDS for phase in PHASES})
ATTEMPT = st.tuples(SECONDS, st.floats(0, 1), st.lists(STEP, min_size=1, max_size=6), st.integers(1, 3))


@given(st.lists(ATTEMPT, min_size=1, max_size=5))
def test_all_time_is_of_one_kind_and_each_lost_step_costs_what_it_took(attempts) -> None:
    """Attempts with a line every so many steps: compared with a count step by step."""
    now, lines, trained, reached = 0.0, [], [], 0
    for gap, share, reports, stride in attempts:
        now += gap
        start, began = int(share * reached), now
        steps = range(start + stride, start + stride * len(reports) + 1, stride)
        sums = dict.fromkeys(PHASES, 0.0)
        for step, spent in zip(steps, reports, strict=True):
            sums = {phase: sums[phase] + spent[phase] for phase in PHASES}
            lines.append(line(began, start, step, **sums))
        of_each = itertools.chain(*([spent["training"] / stride] * stride for spent in reports))
        trained.append((start, list(zip(itertools.count(start + 1), of_each))))
        now, reached = lines[-1]["time"], steps[-1]
    found = goodput(lines)
    assert found.wall == pytest.approx(lines[-1]["time"] - lines[0]["began"], rel=1e-9, abs=1e-6)
    assert all(value >= -1e-6 for attempt in found.attempts for value in attempt.seconds.values())
    assert all(set(attempt.seconds) == set(KINDS) for attempt in found.attempts)
    for index, (attempt, (_, steps)) in enumerate(zip(found.attempts, trained, strict=True)):
        later = [start for start, _ in trained[index + 1 :]]
        lost = sum(cost for step, cost in steps if later and step > min(later))
        assert attempt.seconds["lost"] == pytest.approx(lost, rel=1e-9, abs=1e-6)
