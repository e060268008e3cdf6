"""What gradients are divided by, against the same by hand."""

import jax
import numpy as np
import pytest
from tiers import tiers
from tiny import program

from meshway.framework.errors import UserError
from meshway.framework.training.step import reweighted

SEGMENTS = np.array([[1] * 5 + [2] * 3 + [3] * 8, [1] * 16, [1] * 2 + [2] * 9 + [0] * 5, [0] * 16] * 4, np.int32)


def packed_batch(made):
    batch = dict(made.synthetic_batch(seed=3))
    random = np.random.default_rng(0)
    batch["decoder_segment_ids"] = SEGMENTS
    batch["decoder_loss_weights"] = (random.random(SEGMENTS.shape) * (SEGMENTS > 0)).astype(np.float32)
    batch["decoder_loss_weights"][0, 5:8] = 0  # a sequence without any loss
    return batch


def weights_by_hand(batch):
    weights, segments = batch["decoder_loss_weights"], batch["decoder_segment_ids"]
    expected = np.zeros_like(weights)
    for row in range(len(weights)):
        for segment in set(segments[row]) - {0}:
            own = segments[row] == segment
            if total := weights[row][own].sum():
                expected[row][own] = weights[row][own] / total
    return expected


def gradients(batch, *bindings):
    made = program("lm", *bindings)
    with made.partitioner.activate():
        found, metrics = jax.jit(made._step.gradients)(made.init().params, made.shard_batch(batch), 0)
    return jax.tree.map(np.asarray, found), float(metrics["loss"][1])


@pytest.fixture(scope="module")
def batch():
    return packed_batch(program("lm"))


@pytest.fixture(scope="module")
def plain(batch):
    return gradients(batch)


def scaled(tree, scale):
    return jax.tree.map(lambda x: x * scale, tree)


def same(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


DIVISORS = [("128", 128, 4), ("None", 1, 1), ("'NUM_TOTAL_TARGET_TOKENS'", 256, 4)]


@pytest.mark.parametrize("factor, divisor, microbatches", tiers(DIVISORS, quick=DIVISORS[2:], slow=DIVISORS[:2]))
def test_numbers_none_and_all_targets_divide_the_sum(factor, divisor, microbatches, batch, plain):
    found, _ = gradients(batch, f"LOSS_NORMALIZING_FACTOR={factor}", f"NUM_MICROBATCHES={microbatches}")
    mean, weight = plain
    np.testing.assert_allclose(weight, batch["decoder_loss_weights"].sum(), rtol=1e-5)
    same(scaled(found, divisor / weight), mean)


@pytest.mark.parametrize("microbatches", tiers([1, 4], quick=[4], slow=[1]))
def test_sequences_count_alike_whatever_their_length(microbatches, batch):
    by_hand = batch | {"decoder_loss_weights": weights_by_hand(batch)}
    found, weight = gradients(
        batch, "LOSS_NORMALIZING_FACTOR='AVERAGE_PER_SEQUENCE'", f"NUM_MICROBATCHES={microbatches}"
    )
    assert round(weight, 3) == 23  # sequences that have a loss: 3 + 1 + 2 in four rows each, but one
    same(found, gradients(by_hand)[0])


def test_rows_without_segments_are_sequences():
    weights = np.array([[1, 1, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    found = reweighted("AVERAGE_PER_SEQUENCE", {"decoder_loss_weights": weights, "label": weights})
    np.testing.assert_allclose(found["decoder_loss_weights"], [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found["label"], weights)


@pytest.mark.parametrize("factor, words", [("0", "must be above 0"), ("'MEAN'", "NUM_REAL_TARGET_TOKENS")])
def test_what_nothing_can_be_divided_by_is_refused(factor, words):
    with pytest.raises(UserError, match=words):
        program("lm", f"LOSS_NORMALIZING_FACTOR={factor}")
