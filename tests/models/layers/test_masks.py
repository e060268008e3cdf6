"""Who sees whom, against the rule spelt out token by token."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.models.layers.masks import Sight, visible

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), min_size=6, max_size=6)


def sees(query, key, causal):
    (segment, prefix, place), (key_segment, key_prefix, key_place) = query, key
    if segment != key_segment or key_segment == 0:
        return False
    return not causal or key_place <= place or prefix == key_prefix == 1


@settings(max_examples=30, deadline=None)
@given(ROWS, st.booleans())
def test_a_mask_is_the_rule_for_each_pair(row, causal):
    tokens = [(segment, prefix, place) for place, (segment, prefix) in enumerate(row)]
    segments, prefix, places = (jnp.asarray([column]) for column in zip(*tokens, strict=True))
    sight = Sight(segments, places, prefix)
    wanted = [[sees(query, key, causal) for key in tokens] for query in tokens]
    np.testing.assert_array_equal(visible(sight, sight, causal).dense[0, 0], wanted)


def test_a_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs segments"):
        visible(Sight(), Sight())
