import pickle

import numpy as np
import pytest
from tasks_in_memory import TOKENS, random_examples

from meshway.framework.data.rows.examples import First, Stepped, numpy_steps, with_problems


def test_sizes_are_those_of_what_is_read():
    examples = random_examples(40)
    steps = numpy_steps([{"step": "append_eos_after_trim", "features": {"targets": 1}}], {"targets": TOKENS})
    for limits in ({}, {"targets": 7}):
        stepped = pickle.loads(pickle.dumps(Stepped(examples, steps, limits)))
        read = stepped.read(range(40))
        assert [len(example["targets"]) for example in read] == stepped.sizes["targets"].tolist()
        assert all(example["targets"][-1] == 1 for example in read)
        kept = stepped.sizes["targets"].sum() - 40
        assert kept + stepped.lost.sum() == examples.sizes["targets"].sum()


def test_the_first_few():
    examples = random_examples(40)
    assert len(First(examples, 5)) == 5 and len(First(examples, 99)) == 40
    np.testing.assert_array_equal(First(examples, 5).sizes["inputs"], examples.sizes["inputs"][:5])


def test_a_wrong_id_is_told_before_what_fails_to_be_read_after_it():
    def read():
        yield {"targets": np.array([5])}
        yield {"targets": np.array([99])}
        raise OSError("a damaged file")

    found = with_problems(read(), {"targets": 10})
    assert [next(found)[1][:37] for _ in range(2)] == ["", "feature 'targets' holds the token id "]
    with pytest.raises(OSError, match="a damaged file"):
        next(found)
    assert [why for _, why in with_problems([{"targets": np.array([5])}] * 600, {"targets": 10})] == [""] * 600
