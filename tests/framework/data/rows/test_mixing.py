import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.rows.mixing import Interleaving, Rates, periods
from meshway.framework.errors import UserError

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3)


@settings(deadline=None)
@given(weights=WEIGHTS, first=st.integers(0, 2**40), count=st.integers(0, 300))
def test_counts_are_what_was_dealt(weights, first, count):
    interleaving = Interleaving(np.array(weights))
    dealt = np.bincount(interleaving.sources(first, count), minlength=len(weights))
    assert (interleaving.counts(first + count) - interleaving.counts(first) == dealt).all()
    assert interleaving.counts(first).sum() == first
    assert not dealt[np.array(weights) == 0].any()


@pytest.mark.parametrize("weights", [[1, 1], [0.7, 0.2, 0.1], [5, 0.01, 1, 3], list(range(1, 100))])
def test_every_stretch_has_the_shares_to_within_a_few_rows(weights):
    interleaving = Interleaving(np.array(weights, float))
    shares = np.array(weights) / np.sum(weights)
    for first, count in ((0, 100_000), (123_457, 100_000), (999, 1000), (7, 64)):
        dealt = interleaving.counts(first + count) - interleaving.counts(first)
        assert np.abs(dealt - shares * count).max() <= 2 * np.log2(first + count + 2)
    dealt = interleaving.counts(100_000)
    assert np.abs(dealt / 100_000 - shares).max() < 2e-4


def test_equal_rates_take_turns():
    assert Interleaving(np.array([1, 1])).sources(0, 6).tolist() == [0, 1, 0, 1, 0, 1]


def test_periods_carry_rates_on():
    changes = [Rates(10, {"b": 3}), Rates(20, {"a": 0})]
    found = [(step, rates.tolist()) for step, rates in periods(["a", "b"], {"a": 1, "b": 1}, changes)]
    assert found == [(0, [1, 1]), (10, [1, 3]), (20, [0, 3])]
    assert periods(["a"], {"a": 1}, [Rates(0, {"a": 5})])[0][1].tolist() == [5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([Rates(5, {"tsak": 1})], "no task 'tsak'; did you mean 'task'"),
        ([Rates(5, {"task": 2}), Rates(5, {"task": 1})], "in order of from_step; 5 follows 5"),
        ([Rates(5, {"task": 0})], "from step 5 leave no task"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        periods(["task"], {"task": 1.0}, changes)


def test_rates_are_numbers_from_zero_up():
    with pytest.raises(UserError, match="task 'a' must be at least 0, not -1"):
        Rates(5, {"a": -1})
    with pytest.raises(UserError, match="from_step must be a step"):
        Rates(-1, {"a": 1})


def test_rates_that_begin_with_nothing_are_refused():
    """Once an IndexError from within numpy."""
    with pytest.raises(UserError, match="rates of 'a', 'b' are all 0 before step 100: add Rates with from_step 0"):
        periods(["a", "b"], {"a": 0.0, "b": 0.0}, [Rates(100, {"a": 1})])
    with pytest.raises(UserError, match="rates of 'a' are all 0: one must be above 0"):
        periods(["a"], {"a": 0.0}, [])
    assert len(periods(["a"], {"a": 0.0}, [Rates(0, {"a": 1}), Rates(9, {"a": 2})])) == 2
