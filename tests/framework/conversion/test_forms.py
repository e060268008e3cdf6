"""Named dimensions against numpy's own reshapes, both ways."""

import numpy as np
import pytest

from meshway.framework.conversion.rules import Form

SIZES = {"part": 3, "heads": 5, "head_dim": 2, "embed": 7}


def numbered(shape):
    return np.arange(np.prod(shape)).reshape(shape)


def test_a_fused_tensor_is_cut_in_parts():
    form = Form("embed (part heads head_dim) -> part embed heads head_dim")
    tensor = numbered(form.their_shape(SIZES))
    assert tensor.shape == (7, 30)
    parts = form.to_ours(tensor, SIZES)
    np.testing.assert_array_equal(parts[1], tensor[:, 10:20].reshape(7, 5, 2))
    np.testing.assert_array_equal(form.to_theirs(parts, SIZES), tensor)


@pytest.mark.parametrize(
    "text", ["(heads head_dim) embed -> embed heads head_dim", "embed (heads head_dim) -> heads head_dim embed"]
)
def test_a_part_of_a_parameter_is_read_from_a_box_of_the_tensor(text):
    form = Form(text)
    tensor = numbered(form.their_shape(SIZES))
    whole = form.to_ours(tensor, SIZES)
    wanted = {"heads": slice(1, 4), "head_dim": slice(1, 2), "embed": slice(2, 6)}
    box, rest, sizes = form.box(wanted, SIZES)
    read = tensor[box]
    assert read.size == 3 * 2 * 4  # a head is read whole, of the rest nothing else
    found = form.to_ours(read, sizes)[tuple(rest.get(name, slice(None)) for name in form.ours)]
    np.testing.assert_array_equal(found, whole[tuple(wanted[name] for name in form.ours)])


def test_both_sides_have_the_same_names():
    with pytest.raises(ValueError, match="same names"):
        Form("a (b c) -> a b")
