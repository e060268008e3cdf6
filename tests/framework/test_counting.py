"""Numbers of things agree with their nouns and verbs, and long lists say how long they are."""

import pytest

from meshway.framework.terminal import count_of, listed


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((1, "tensor", "is"), "1 tensor is"),
        ((2, "tensor", "is"), "2 tensors are"),
        ((0, "file"), "0 files"),
        ((1200, "child", "has", "children"), "1,200 children have"),
    ],
)
def test_one_and_several(arguments, words):
    assert count_of(*arguments) == words


@pytest.mark.parametrize(
    "number, separator, words",
    [(0, ", ", ""), (2, ", ", "0, 1"), (3, ", ", "0, 1 and 1 more"), (5, "; ", "0; 1; and 3 more")],
)
def test_long_lists_are_cut(number, separator, words):
    assert listed(range(number), 2, separator) == words
