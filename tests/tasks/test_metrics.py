import pytest

from meshway.tasks.metrics import exact_match, token_f1


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
