import pickle

import numpy as np
from tasks_in_memory import TOKENS, random_examples

from meshway.framework.data.rows.examples import First, Stepped, numpy_steps


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
