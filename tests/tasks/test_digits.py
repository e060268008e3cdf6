import importlib
import sys

import numpy as np
import pytest
from sklearn import datasets

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()

from meshway.tasks import digits  # noqa: E402

SPLITS = ("train", "validation", "test")


def test_splits_divide_the_images_and_equal_ones_stay_together():
    rows = [digits.rows(split) for split in SPLITS]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(1797))
    shares = [len(numbers) / 1797 for numbers in rows]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.02)
    images = datasets.load_digits().images
    pixels = [{image.tobytes() for image in images[numbers]} for numbers in rows]
    assert not pixels[0] & pixels[1] and not pixels[0] & pixels[2] and not pixels[1] & pixels[2]


@pytest.mark.parametrize("split", SPLITS)
def test_images_are_scikit_learns_in_0_to_1(split):
    task = seqio.get_mixture_or_task("digits")
    source = datasets.load_digits()
    examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
    assert len(examples) == task.num_input_examples(split)
    for example in examples:
        assert example["image"].dtype == np.float32 and example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["image"][..., 0] * 16, source.images[example["id"]])
        assert example["label"] == source.target[example["id"]]
    assert {int(example["label"]) for example in examples} == set(range(10))
    assert 0 <= min(e["image"].min() for e in examples) < max(e["image"].max() for e in examples) == 1


def test_text_spells_each_pixel_and_names_the_digit():
    task = seqio.get_mixture_or_task("digits_text")
    source = datasets.load_digits()
    for number, example in zip(digits.rows("test"), task.get_dataset(None, "test", shuffle=False).as_numpy_iterator()):
        heading, *lines = bytes((example["inputs"][:-1] - 3).tolist()).decode().split("\n")
        assert heading == "digit:"
        np.testing.assert_array_equal([[int(pixel, 17) for pixel in line] for line in lines], source.images[number])
        name = bytes((example["targets"][:-1] - 3).tolist()).decode()
        assert digits.NAMES.index(name) == source.target[number]


def test_predictions_are_scored_by_accuracy():
    (metric,) = seqio.get_mixture_or_task("digits").metric_fns
    labels = digits._digits()[1][digits.rows("test")]
    assert metric(labels, labels) == {"accuracy": 100.0}
    assert metric(labels, (labels + 1) % 10) == {"accuracy": 0.0}


def test_registering_reads_nothing_and_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    module = importlib.reload(digits)
    with pytest.raises(ValueError, match=r"'scikit-learn'.*pip install 'meshway\[digits\]'"):
        module._digits()
    monkeypatch.undo()
    assert len(importlib.reload(digits).rows("train")) > 1400
