"""Buckets: each example in the smallest that holds it, whatever else there is."""

import pytest

from meshway.framework.errors import UserError
from meshway.framework.inference.rows import Buckets, doubling


def test_lengths_halve_together_until_they_are_short():
    assert doubling({"inputs": 100}).shapes == [{"inputs": 13}, {"inputs": 25}, {"inputs": 50}, {"inputs": 100}]
    assert doubling({"inputs": 64, "targets": 6}).shapes == [
        {"inputs": 16, "targets": 2},
        {"inputs": 32, "targets": 3},
        {"inputs": 64, "targets": 6},
    ]
    assert doubling({"targets": 3}).shapes == [{"targets": 3}]


def test_an_example_belongs_to_the_first_bucket_that_holds_all_of_it():
    buckets = doubling({"inputs": 64, "targets": 6})
    assert [buckets.of({"inputs": n, "targets": 1}) for n in (0, 16, 17, 64, 65)] == [0, 0, 1, 2, None]
    assert buckets.of({"inputs": 1, "targets": 3}) == 1 and buckets.of({"inputs": 1, "targets": 7}) is None
    assert buckets.largest == {"inputs": 64, "targets": 6}


@pytest.mark.parametrize("shapes", [[], [{"a": 2}, {"a": 2}], [{"a": 4}, {"a": 2}], [{"a": 0}], [{"a": 1}, {"b": 2}]])
def test_buckets_that_do_not_grow_are_refused(shapes):
    with pytest.raises(UserError, match="buckets"):
        Buckets(shapes)
