import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.passthrough import PassThrough
from meshway.framework.data.rows.packing import Placement, one_each
from meshway.framework.errors import UserError

SHAPES = {"image": (2, 3, 1), "label": ()}
DTYPES = {"image": "float32", "label": "int32"}
DIGITS = TaskInfo("digits", {"image": FeatureInfo("uint8", (2, 3, 1)), "label": FeatureInfo("int64", ())})


def example(number):
    return {"image": np.full((2, 3, 1), number, np.uint8), "label": np.int64(number)}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=6), st.integers(0, 3))
def test_rows_are_the_examples_then_padding(numbers, padding):
    converter = PassThrough(SHAPES, DTYPES)
    objective = converter.bind(DIGITS, {})
    items = [objective.convert(example(number), i, 0, 0, 0) for i, number in enumerate(numbers)]
    count = len(numbers)
    rows = objective.lay(items, Placement(np.arange(count), np.ones(count, np.int32), {}, count + padding))
    assert {n: (a.shape, a.dtype) for n, a in rows.items()} == converter.spec({}, count + padding)
    assert rows["label"].tolist() == numbers + [0] * padding
    assert rows["image"][:, 1, 2, 0].tolist() == numbers + [0] * padding
    assert rows["loss_weights"].tolist() == [1] * count + [0] * padding


def test_an_item_an_example_and_nothing_lost():
    objective = PassThrough(SHAPES, DTYPES).bind(DIGITS, {})
    sizes = {"image": np.array([2, 2, 2])}
    assert objective.parts(sizes).tolist() == [1, 1, 1]
    assert objective.lost(sizes).tolist() == [0, 0, 0]
    assert dict(objective.row_lengths) == {} and objective.measure(sizes, None) == {}
    rows = objective.lay([objective.convert(example(3), 0, 0, 0, 0)], one_each(1, []))
    assert rows["label"].tolist() == [3]


def test_an_example_of_another_shape_or_size_is_named():
    varying = TaskInfo("digits", {"image": FeatureInfo("uint8", (None, None, 1)), "label": FeatureInfo("int64", ())})
    objective = PassThrough(SHAPES, DTYPES).bind(varying, {})
    with pytest.raises(UserError, match=r"'digits': feature 'image' of example 7 has shape \[3, 2, 1\]"):
        objective.convert({"image": np.zeros((3, 2, 1), np.uint8), "label": 0}, 7, 0, 0, 0)
    with pytest.raises(UserError, match="feature 'label' of example 7 has integers from 4294967301 .* int32"):
        objective.convert(example(0) | {"label": np.int64(2**32 + 5)}, 7, 0, 0, 0)


@pytest.mark.parametrize(
    ("features", "lengths", "message"),
    [
        ({"images": FeatureInfo("uint8", (2, 3, 1))}, {}, "'digits' has no feature 'image'.*did you mean 'images'"),
        ({"image": FeatureInfo("uint8", (2, 3))}, {}, r"'image' has shape \[2, 3\] .* gives \[2, 3, 1\]"),
        ({"image": FeatureInfo("uint8", (2, 4, 1))}, {}, r"'image' has shape \[2, 4, 1\]"),
        ({"image": FeatureInfo("bytes", (2, 3, 1))}, {}, "'image' is bytes, which cannot be cast to float32"),
        ({"label": FeatureInfo("float32", ())}, {}, "'label' is float32, which cannot be cast to int32"),
        ({}, {"targets": 5}, "'targets', which PassThrough.shapes does not list"),
        ({}, {"image": 5}, "leave 'image' out"),
    ],
)
def test_what_does_not_fit_is_named(features, lengths, message):
    found = dict(DIGITS.features) | features
    if "images" in features:
        del found["image"]
    with pytest.raises(UserError, match=message):
        PassThrough(SHAPES, DTYPES).bind(TaskInfo("digits", found), lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, {}), "at least one"),
        ((SHAPES, {"image": "float32"}), "must name the same features"),
        (({"image": (2, None)}, {"image": "float32"}), "shapes.'image'. must be whole numbers"),
        (({"image": (2,)}, {"image": "flot32"}), "dtypes.'image'. is 'flot32'"),
        (({"image": (2,)}, {"image": "S3"}), "must be one of bool, integers or floats"),
        ((SHAPES, DTYPES, "label"), "the name of a feature"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        PassThrough(*arguments)
