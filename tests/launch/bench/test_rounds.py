"""Rounds: who has a turn when, which passes count, and that results are waited for."""

import itertools

import pytest

from meshway.framework.errors import UserError
from meshway.launch.bench import rounds
from meshway.launch.bench.rounds import require_at_least, time_in_turn


def test_passes_take_turns_and_medians_of_turns_count(monkeypatch):
    """On a clock that passes themselves advance: the untimed first pass of each takes 100 s."""
    clock, order = [0.0], []
    seconds = {"a": [100, 1, 2, 9, 3, 4, 9, 50, 60, 70], "b": [100, *[7] * 9]}
    taken = {name: iter(each) for name, each in seconds.items()}

    def once(name):
        order.append(name)
        clock[0] += next(taken[name])

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    found = time_in_turn({"b": lambda: once("b"), "a": lambda: once("a")}, steps=3, rounds=3)
    assert list(found.items()) == [("b", 7), ("a", 4)]  # a's turns: 2, 4 and 60
    assert [(name, len(list(run))) for name, run in itertools.groupby(order)] == [("b", 1), ("a", 1)] + 3 * [
        ("b", 3),
        ("a", 3),
    ]


def test_results_are_waited_for_within_the_time(monkeypatch):
    clock = [0.0]

    class Late:
        def block_until_ready(self):
            clock[0] += 5
            return self

    monkeypatch.setattr(rounds.time, "perf_counter", lambda: clock[0])
    assert time_in_turn({"late": lambda: {"loss": Late()}}, steps=2, rounds=1) == {"late": 5}
    assert time_in_turn({}, steps=1, rounds=1) == {}


def test_numbers_have_a_range_and_none_is_left_open():
    require_at_least(1, "bench.this", steps=1, batches=None, seconds=1.5)
    with pytest.raises(UserError, match=r"^bench\.this\.rounds must be at least 1, not 0$"):
        require_at_least(1, "bench.this", steps=1, rounds=0, seeds=-1)
    with pytest.raises(UserError, match="bench.this.workers must be at least 0, not -1"):
        require_at_least(0, "bench.this", workers=-1)
