"""The odd one out is named."""

from meshway.framework.distributed.processes import differences, shortened


def test_the_odd_one_out_is_named():
    same = {"recipe": "a", "jax": "1"}
    assert differences({process: same for process in range(4)}) == ""
    found = differences({0: same, 1: same, 2: same | {"recipe": "b"}, 3: same})
    assert found == "recipe: process 2 of 4: 'b'; processes 0, 1, 3 of 4: 'a'"


def test_of_two_the_second_is_compared_with_the_first():
    assert differences({0: {"jax": "1"}, 1: {}}) == "jax: process 1 of 2: 'none'; process 0 of 2: '1'"


def test_long_facts_are_compared_by_hash():
    one, other = shortened({"recipe": "x" * 99}), shortened({"recipe": "x" * 98 + "y"})
    assert one != other and len(one["recipe"]) == 12
    assert shortened({"jax": "0.10.2"}) == {"jax": "0.10.2"}
