"""Nested dicts of parameters by path: order, empty dicts and leaves that are tuples."""

import numpy as np

from meshway.framework.trees import axis_sizes, block_of, flatten, map_paths, merge, pattern_lengths, select, unflatten

TREE = {"b": {"y": 1, "x": ("batch", None)}, "a": 2, "none": {}}


def test_paths_keep_the_order_of_the_tree_and_leaves_are_all_but_dicts():
    flat = flatten(TREE)
    assert list(flat.items()) == [("b/y", 1), ("b/x", ("batch", None)), ("a", 2)]
    assert unflatten(flat) == {"b": TREE["b"], "a": 2}


def test_a_mapped_or_merged_tree_has_the_structure_of_the_first_and_a_selected_one_no_empty_dict():
    assert map_paths(lambda path, leaf: path, TREE) == {"b": {"y": "b/y", "x": "b/x"}, "a": "a", "none": {}}
    merged = merge(TREE, {"b": {"x": 3}})
    assert merged == {"b": {"y": 1, "x": 3}, "a": 2, "none": {}}
    assert list(merged) == list(TREE) and list(merged["b"]) == ["y", "x"]
    assert select(TREE, {"b/x", "elsewhere"}) == {"b": {"x": ("batch", None)}}


def test_blocks_of_a_pattern_are_told_by_their_paths():
    names = ["decoder/block_0/mlp/wi", "decoder/block_2/mlp/wi", "block_1/scale", "logits/kernel"]
    block = block_of(names[1])
    assert (block.stack, block.index, block.at(5)) == ("decoder/", 2, "decoder/block_5/mlp/wi")
    assert block_of(names[-1]) is None
    assert pattern_lengths(names) == {"decoder/": 3, "": 2}


def test_sizes_of_an_axis_are_those_of_all_parameters_that_have_it():
    axes = {"table": ("vocab", "embed"), "logits": {"kernel": ("embed", "vocab")}, "scale": ("embed",)}
    shapes = {"scale": np.ones(4), "table": np.ones((8, 4)), "logits": {"kernel": np.ones((4, 16))}}
    assert sorted(axis_sizes(axes, shapes, "vocab")) == [8, 16]
    assert axis_sizes(axes, shapes, "expert") == []
