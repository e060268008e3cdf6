import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.token_rows import WHOLE, Overlong, check_policy, window_size, windows
from meshway.framework.errors import UserError

SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)
quick = settings(max_examples=50, deadline=None)


def columns(sizes):
    table = np.array(sizes, np.int64).reshape(-1, 2)
    return {"inputs": table[:, 0], "targets": table[:, 1]}


@quick
@given(SIZES, st.integers(1, 40), st.integers(1, 40), st.sampled_from(["truncate", "skip"]))
def test_what_is_kept_and_what_is_lost_is_all(sizes, inputs, targets, policy):
    overlong = Overlong(policy, "a_task", {"inputs": inputs, "targets": targets})
    sizes = columns(sizes)
    parts = overlong.parts(sizes)
    kept = overlong.measure(sizes, np.zeros_like(parts))
    shown = (kept["inputs"] + kept["targets"]) * parts
    np.testing.assert_array_equal(shown + overlong.lost(sizes), sizes["inputs"] + sizes["targets"])
    assert (kept["inputs"] <= inputs).all() and (kept["targets"] <= targets).all()


@quick
@given(st.lists(st.integers(0, 100), max_size=12), st.integers(1, 30))
def test_windows_show_every_token_once(sizes, limit):
    overlong = Overlong("split", "a_task", {"targets": limit})
    sizes = {"targets": np.array(sizes, np.int64)}
    assert not overlong.lost(sizes).any()
    for size, parts in zip(sizes["targets"], overlong.parts(sizes), strict=True):
        pieces = [overlong.cut({"targets": np.arange(size)}, part)["targets"] for part in range(parts)]
        assert [token for piece in pieces for token in piece] == list(range(size))
        measured = overlong.measure({"targets": np.full(parts, size)}, np.arange(parts))["targets"]
        assert [len(piece) for piece in pieces] == measured.tolist()
        assert all(len(piece) for piece in pieces)


def test_by_hand():
    np.testing.assert_array_equal(windows(np.array([0, 1, 4, 5]), 4), [0, 1, 1, 2])
    np.testing.assert_array_equal(window_size(np.array([5, 5, 5]), np.array([0, 1, 2]), 4), [4, 1, 0])
    overlong = Overlong("truncate", "a_task", {"inputs": 2, "targets": 3})
    cut = overlong.cut({"inputs": [1, 0, 3], "targets": [0, 0]}, 0)
    assert [cut["inputs"].tolist(), cut["targets"].tolist()] == [[1, 0], [0, 0]]
    np.testing.assert_array_equal(Overlong("skip", "a_task", {"targets": 3}).parts({"targets": [3, 4]}), [1, 0])


def test_error_names_the_task_the_feature_and_how_many():
    overlong = Overlong("error", "a_task", {"inputs": 5, "targets": 5})
    np.testing.assert_array_equal(overlong.parts(columns([(5, 5), (0, 1)])), [1, 1])
    with pytest.raises(UserError, match="'a_task': 2 of 3 examples.*'inputs' has up to 9 tokens where 5 fit"):
        overlong.parts(columns([(9, 1), (1, 1), (6, 5)]))


def test_policies_are_checked():
    assert check_policy("skip", "Converter", WHOLE) == "skip"
    with pytest.raises(UserError, match="Converter.overlong is 'truncat'.*did you mean 'truncate'"):
        check_policy("truncat", "Converter")
    with pytest.raises(UserError, match="may be one of"):
        check_policy("split", "Converter", WHOLE)
    with pytest.raises(ValueError, match="one feature"):
        Overlong("split", "a_task", {"inputs": 5, "targets": 5})
