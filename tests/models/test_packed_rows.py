"""What packing must not change: each example is scored in its packed row as it is alone."""

import jax
import numpy as np
import pytest
from tasks_in_memory import lay, task
from tiny import LENGTHS, program

from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.rows.examples import InMemory

CASES = {
    "t5": ("t5_1_1", EncoderDecoder(), LENGTHS, ()),
    "lm": ("lm", LanguageModel(), {"targets": 32}, ("TASK_FEATURE_LENGTHS={'targets': 32}",)),
    "prefix_lm": ("lm", PrefixLanguageModel(), LENGTHS, ("objectives.DecoderOnly.prefix=True",)),
}


def examples(features):
    """Examples with token 0 among their tokens, and some of a single token."""
    random = np.random.default_rng(0)
    sizes = [1, 1, 2, 5, 3, 8, 4, 7]
    return InMemory([{name: random.integers(0, 4, size).astype(np.int32) for name in features} for size in sizes])


def scores(model, params, arrays):
    """Returns (tokens, scores) of every example's real targets, sorted."""
    found = np.asarray(jax.jit(model.score)(params, arrays))
    segments, weights = arrays["decoder_segment_ids"], arrays["decoder_loss_weights"]
    result = []
    for row, segment in sorted(set(zip(*np.nonzero(segments), strict=True))):
        at = (segments[row] == segments[row, segment]) & (weights[row] > 0)
        if segment == np.argmax(segments[row] == segments[row, segment]):  # once a segment, at its head
            result.append((arrays["decoder_target_tokens"][row][at].tolist(), found[row][at].tolist()))
    return sorted(result)


@pytest.mark.parametrize("case", CASES)
def test_a_packed_example_is_scored_as_alone(case):
    family, converter, lengths, bindings = CASES[case]
    built = program(family, *bindings)
    objective = converter.bind(task(*converter.task_features), lengths)
    params = built.model.init(jax.random.key(0))
    given = examples(converter.task_features)
    packed, alone = (lay(objective, given, packed=packed) for packed in (True, False))
    assert len(packed["decoder_positions"]) <= len(alone["decoder_positions"]) / 2
    with built.partitioner.activate():
        mine, theirs = (scores(built.model, params, arrays) for arrays in (packed, alone))
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
    for (_, left), (_, right) in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
