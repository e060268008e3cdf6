"""Who sees whom, against the rule spelt out token by token."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.models.layers.masks import AttentionMetadata, Mask, local_window, make_attention_mask, row_metadata

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
    metadata = AttentionMetadata(segments, places, prefix)
    wanted = [[sees(query, key, causal) for key in tokens] for query in tokens]
    np.testing.assert_array_equal(make_attention_mask(metadata, metadata, causal).dense[0, 0], wanted)


@settings(max_examples=30, deadline=None)
@given(ROWS, st.booleans(), st.integers(1, 7))
def test_a_window_narrows_a_mask_to_what_is_near(row, causal, window):
    tokens = [(segment, prefix, place) for place, (segment, prefix) in enumerate(row)]
    metadata = row_metadata(
        6, jnp.asarray([[segment for segment, _ in row]]), jnp.asarray([[prefix for _, prefix in row]])
    )
    mask = make_attention_mask(metadata, metadata, causal)
    wanted = np.array([[sees(q, k, causal) and abs(q[2] - k[2]) < window for k in tokens] for q in tokens])
    narrow = local_window(mask, window, metadata, metadata)
    np.testing.assert_array_equal(narrow.dense[0, 0], wanted)
    # So are one of a cache, whose slots are places, and one that lacks places and is given them.
    np.testing.assert_array_equal(local_window(Mask(mask.dense), window, metadata, metadata).dense[0, 0], wanted)
    if not causal:
        bare = AttentionMetadata(metadata.segments)
        given = local_window(make_attention_mask(bare, bare), window, metadata, metadata)
        np.testing.assert_array_equal(given.dense[0, 0], wanted)
        assert given.queries.ordered and given.keys.ordered
    assert local_window(narrow, 3, metadata, metadata).window == min(window, 3)


def test_a_window_alone_is_a_mask():
    near = local_window(None, 2, row_metadata(3), row_metadata(4)).dense[0, 0]
    np.testing.assert_array_equal(near, [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]])


def test_a_mask_of_nothing_is_refused():
    with pytest.raises(ValueError, match="needs segments"):
        make_attention_mask(AttentionMetadata(), AttentionMetadata())
