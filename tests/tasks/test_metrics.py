import sys

import numpy as np
import pytest

from meshway.tasks.metrics import accuracy, chrf, exact_match, token_f1


@pytest.mark.parametrize(
    ("target", "prediction", "f1"),
    [
        ("Return the name.", "return THE name", 100.0),
        ("a b c d", "a b x y", 50.0),
        ("a a b", "a", 50.0),
        ("a", "", 0.0),
        ("...", "", 100.0),
    ],
)
def test_token_f1(target, prediction, f1):
    assert token_f1([target], [prediction]) == {"token_f1": pytest.approx(f1)}


def test_means_are_over_examples():
    assert token_f1(["a", "b"], ["a", "c"]) == {"token_f1": 50.0}
    assert exact_match(["a  b", "c", "d", "e"], ["a b ", "C", "d.", ""]) == {"exact_match": 25.0}
    assert exact_match([], []) == {"exact_match": 0.0}


def test_accuracy_is_over_class_numbers_of_any_integer_type():
    assert accuracy(np.array([1, 2, 3, 4], np.int32), [1, np.int64(2), 0, 4]) == {"accuracy": 75.0}
    assert accuracy([], []) == {"accuracy": 0.0}


def brute_chrf(target, prediction, order=6):
    """Popovic 2015 with beta = 2, white space apart: mean precision and recall over the orders."""
    target, prediction = ("".join(text.split()) for text in (target, prediction))
    precisions, recalls = [], []
    for n in range(1, order + 1):
        wanted, found = ([text[i : i + n] for i in range(len(text) - n + 1)] for text in (target, prediction))
        shared = sum(min(wanted.count(gram), found.count(gram)) for gram in set(found))
        precisions.append(shared / len(found))
        recalls.append(shared / len(wanted))
    precision, recall = sum(precisions) / order, sum(recalls) / order
    return 100 * 5 * precision * recall / (4 * precision + recall)


def test_chrf_is_the_f_score_of_character_ngrams():
    target, prediction = "the quick brown fox", "the quack brown ox"
    assert chrf([target], [prediction]) == {"chrf": pytest.approx(brute_chrf(target, prediction), abs=0.01)}
    assert chrf(["Żółw", "b"], ["Żółw", "b"]) == {"chrf": 100.0}
    assert chrf([], []) == {"chrf": 0.0}


def test_the_extra_that_chrf_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"'sacrebleu'.*pip install 'meshway\[gettext\]'"):
        chrf(["a"], ["a"])
