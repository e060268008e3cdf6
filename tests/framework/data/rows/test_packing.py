import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.rows import packing

LENGTHS = {"inputs": 12, "targets": 7}
SIZES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 7)), max_size=60)


def items_of(sizes):
    """Items of these sizes; token 0 is among their tokens, and an item's tokens tell it from the others."""
    return [{"inputs": np.arange(n) * (i + 1), "targets": np.arange(m) * -(i + 1)} for i, (n, m) in enumerate(sizes)]


def columns(sizes):
    return {name: np.array([size[k] for size in sizes], int) for k, name in enumerate(LENGTHS)}


def unpack(rows, placement):
    """Reads items back by segment id alone: item -> feature -> tokens."""
    found = []
    for row, segment in zip(placement.rows, placement.segments, strict=True):
        item = {}
        for name in LENGTHS:
            at = rows[f"{name}_segment_ids"][row] == segment
            order = np.argsort(rows[f"{name}_positions"][row][at])
            item[name] = rows[name][row][at][order].tolist()
        found.append(item)
    return found


@settings(deadline=None)
@given(sizes=SIZES, window=st.integers(1, 40))
def test_unpacking_gives_every_item_back_once_zeros_included(sizes, window):
    items = items_of(sizes)
    placement = packing.best_fit(columns(sizes), LENGTHS, window)
    rows = packing.lay_out(items, LENGTHS, placement, pad_id=99)
    assert unpack(rows, placement) == [{name: item[name].tolist() for name in LENGTHS} for item in items]
    for k, name in enumerate(LENGTHS):
        assert rows[name].shape == (placement.num_rows, LENGTHS[name])
        assert (rows[f"{name}_segment_ids"] > 0).sum() == sum(size[k] for size in sizes)
        assert (rows[name][rows[f"{name}_segment_ids"] == 0] == 99).all()
    assert set(placement.rows) == set(range(placement.num_rows))  # no row is empty
    for row in range(placement.num_rows):
        assert sorted(placement.segments[placement.rows == row]) == list(range(1, 1 + (placement.rows == row).sum()))


@settings(deadline=None)
@given(sizes=SIZES)
def test_no_two_rows_fit_in_one_where_rows_are_never_closed(sizes):
    """Best fit opens a row only for an item that no open row has room for."""
    placement = packing.best_fit(columns(sizes), {"inputs": 12, "targets": 10**6}, window=1000)
    used = np.bincount(placement.rows, columns(sizes)["inputs"], placement.num_rows)
    half_empty = np.sort(used)[:2]
    assert len(half_empty) < 2 or half_empty.sum() > 12 or 0 in half_empty


def test_segments_count_from_one_and_positions_from_zero():
    items = [{"x": [0, 0]}, {"x": [7]}, {"x": [8, 9, 0]}]
    placement = packing.best_fit({"x": np.array([2, 1, 3])}, {"x": 4})
    rows = packing.lay_out(items, {"x": 4}, placement, pad_id=-1)
    np.testing.assert_array_equal(rows["x"], [[7, 8, 9, 0], [0, 0, -1, -1]])
    np.testing.assert_array_equal(rows["x_segment_ids"], [[1, 2, 2, 2], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows["x_positions"], [[0, 0, 1, 2], [0, 1, 0, 0]])


def test_one_each_gives_each_item_its_row():
    sizes = [(3, 2), (0, 7), (12, 1)]
    rows = packing.lay_out(items_of(sizes), LENGTHS, packing.one_each(3, list(LENGTHS)))
    for name, size in columns(sizes).items():
        np.testing.assert_array_equal(rows[f"{name}_segment_ids"], np.arange(LENGTHS[name]) < size[:, None])
        for index, item in enumerate(items_of(sizes)):
            np.testing.assert_array_equal(rows[name][index, : size[index]], item[name])


@pytest.mark.parametrize("lengths", [{"inputs": 512, "targets": 114}, {"sequence": 2048}])
def test_log_normal_examples_pack_to_95_percent(lengths):
    random = np.random.default_rng(0)
    sizes = {name: np.clip(random.lognormal(5 - 2 * k, 0.8, 16384), 1, lengths[name]) for k, name in enumerate(lengths)}
    sizes = {name: column.astype(int) for name, column in sizes.items()}
    rows = packing.best_fit(sizes, lengths).num_rows
    assert max(sizes[name].sum() / (rows * length) for name, length in lengths.items()) > 0.95


def test_nothing_packs_to_no_rows():
    placement = packing.best_fit(columns([]), LENGTHS)
    assert packing.lay_out([], LENGTHS, placement)["inputs"].shape == (0, 12)


def test_too_long_an_item_is_refused():
    with pytest.raises(ValueError, match="item 1 has 8 tokens of 'targets'"):
        packing.best_fit(columns([(1, 1), (1, 8)]), LENGTHS)
    with pytest.raises(ValueError, match="window must be at least 1"):
        packing.best_fit(columns([]), LENGTHS, window=0)
