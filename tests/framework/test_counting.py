"""Numbers of things agree with their nouns and verbs."""

import pytest

from meshway.framework.terminal import count_of


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
