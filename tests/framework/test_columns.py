"""Tables of text: cells of a column begin or end together, and nothing trails."""

import pytest

from meshway.framework.terminal import format_columns


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_with_text():
    rows = [("name", "", "count", "note"), ("a", "", "1,000", ""), ("longer", "", "7", "seen twice")]
    assert format_columns(rows) == ["name      count  note", "a         1,000", "longer    7      seen twice"]
    assert format_columns(iter(rows), right=(2,)) == [
        "name      count  note",
        "a         1,000",
        "longer        7  seen twice",
    ]
    assert format_columns(rows, right=range(1, 4))[1] == "a         1,000"
    assert format_columns([]) == []


@pytest.mark.parametrize("rows", [[("a", "b"), ("c",)], [("a",), ("b", "c")]])
def test_rows_have_as_many_cells(rows):
    with pytest.raises(ValueError):
        format_columns(rows)
