import numpy as np
import pytest

from meshway.framework.data import packing

LENGTHS = {"inputs": 12, "targets": 7}


def examples(count, seed=0, low=0):
    """Random examples whose tokens include 0, which is data."""
    rng = np.random.default_rng(seed)
    return [
        {name: rng.integers(0, 5, rng.integers(low, length + 1)) for name, length in LENGTHS.items()}
        for _ in range(count)
    ]


def unpack(rows, names):
    """Reads examples back out of rows by segment id: (row, segment) -> feature -> tokens."""
    found = {}
    for name in names:
        segments = rows[f"{name}_segment_ids"]
        for row, segment in sorted(set(zip(*np.nonzero(segments), strict=True))):
            key = (row, segments[row, segment])
            at = segments[row] == key[1]
            order = np.argsort(rows[f"{name}_positions"][row][at])
            found.setdefault(key, {})[name] = rows[name][row][at][order].tolist()
    return list(found.values())


def as_sorted(items):
    return sorted(str({name: list(map(int, item[name])) for name in LENGTHS}) for item in items)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_unpacking_a_pack_gives_the_examples_back_zeros_included(window):
    given = examples(200, low=1)
    rows = packing.pack(given, LENGTHS, window=window)
    assert as_sorted(unpack(rows, LENGTHS)) == as_sorted(given)


def reference_first_fit(given, window):
    """The rule in plain Python: which examples lie in which row."""
    rows, first_open = [], 0
    for index, example in enumerate(given):
        for row in rows[first_open:]:
            if all(sum(len(given[i][n]) for i in row) + len(example[n]) <= LENGTHS[n] for n in LENGTHS):
                row.append(index)
                break
        else:
            rows.append([index])
            first_open = max(first_open, len(rows) - window)
    return rows


@pytest.mark.parametrize("window", [1, 2, 5, 64])
def test_first_fit_equals_its_reference(window):
    given = examples(150, seed=window)
    rows = packing.pack(given, LENGTHS, window=window)
    expected = {name: np.zeros((0, length), int) for name, length in LENGTHS.items()}
    for row in reference_first_fit(given, window):
        for name, length in LENGTHS.items():
            tokens = np.concatenate([given[i][name] for i in row])
            line = np.pad(tokens, (0, length - len(tokens)))
            expected[name] = np.vstack([expected[name], line])
    for name in LENGTHS:
        np.testing.assert_array_equal(rows[name], expected[name])


def test_segments_count_from_one_and_positions_from_zero():
    rows = packing.pack([{"x": [0, 0]}, {"x": [7]}, {"x": [8, 9, 0]}], {"x": 4}, pad_id=-1)
    np.testing.assert_array_equal(rows["x"], [[0, 0, 7, -1], [8, 9, 0, -1]])
    np.testing.assert_array_equal(rows["x_segment_ids"], [[1, 1, 2, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(rows["x_positions"], [[0, 1, 0, 0], [0, 1, 2, 0]])


def test_pad_gives_each_example_its_row():
    given = examples(20)
    rows = packing.pad(given, LENGTHS)
    for name, length in LENGTHS.items():
        assert rows[name].shape == (20, length)
        for index, example in enumerate(given):
            size = len(example[name])
            np.testing.assert_array_equal(rows[name][index, :size], example[name])
            np.testing.assert_array_equal(rows[f"{name}_segment_ids"][index], np.arange(length) < size)


def test_nothing_packs_to_no_rows():
    assert packing.pack([], LENGTHS)["inputs"].shape == (0, 12)


def test_too_long_an_example_is_refused():
    with pytest.raises(ValueError, match="example 1 has 8 tokens of 'targets'"):
        packing.pack([{"inputs": [1], "targets": [1]}, {"inputs": [1], "targets": [1] * 8}], LENGTHS)
    with pytest.raises(ValueError, match="window must be at least 1"):
        packing.pack([], LENGTHS, window=0)
