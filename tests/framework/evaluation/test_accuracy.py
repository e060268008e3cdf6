"""What quantised weights cost is what their logits say."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from teacher_forced import case
from tiny import LENGTHS, program

from meshway.framework.evaluation.accuracy import Accuracy, Comparison, format_accuracy
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.inference.weights import prepared

MORE = [("lm", "float32"), ("t5_1_1", "float32"), ("t5_1_1", "int8")]


@pytest.mark.slow
def test_the_divergence_is_that_of_both_logits_at_targets_with_weight():
    made = program("lm", "BATCH_SIZE=8", layout="model_1d")
    params, batch = made.init().params, dict(made.synthetic_batch())
    batch["decoder_loss_weights"] = np.array(batch["decoder_loss_weights"])
    batch["decoder_loss_weights"][:, 5:] = 0
    lengths = {"targets": LENGTHS["targets"]}
    task = SimpleNamespace(name="x", batch_size=8, lengths=lengths, batches=lambda: iter([(batch, 8)] * 3))
    comparison = Comparison(made.sharded, params, "int8", Evaluation(max_batches=2))
    divergence, agreement = comparison._divergence(task)
    with made.partitioner.activate():
        logits = jax.jit(lambda params, batch: jax.nn.log_softmax(made.model.logits(params, batch, None)))
        known = np.asarray(logits(params, batch))[:, :5]
        found = np.asarray(logits(prepared(made.sharded, params, False, "int8")[1], batch))[:, :5]
    wanted = np.sum(np.exp(known) * (known - found), axis=-1).mean()
    assert wanted > 0
    np.testing.assert_allclose(divergence, wanted, rtol=1e-2)
    np.testing.assert_allclose(agreement, np.mean(known.argmax(-1) == found.argmax(-1)))


@pytest.mark.parametrize(
    "family, cache", [("lm", "int8"), *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_what_a_cache_costs_is_that_of_the_first_example_of_each_row(family, cache):
    """Packed rows: nothing where a cache keeps float32, and something where it rounds."""
    given, kept = (program(family, f"attention.Attention.cache_dtype={dtype!r}") for dtype in (None, cache))
    params, batch = given.init().params, dict(case(given).batch)
    for side in {name.split("_")[0] for name in batch}:
        segments, positions = np.ones_like(batch[f"{side}_segment_ids"]), np.array(batch[f"{side}_positions"])
        segments[:, 9:], positions[:, 9:] = 2, positions[:, : positions.shape[1] - 9]
        batch |= {f"{side}_segment_ids": segments, f"{side}_positions": positions}
    task = SimpleNamespace(name="x", batch_size=16, lengths=given.lengths, batches=lambda: iter([(batch, 16)]))
    comparison = Comparison(given.sharded, params, None, Evaluation(), kept.sharded)
    divergence, agreement = comparison._divergence(task)
    assert divergence < 1e-10 if cache == "float32" else 1e-8 < divergence < 1e-4
    assert agreement > (0.98 if cache == "float32" else 0.8), "of random parameters"


def test_metrics_stand_beside_each_other():
    lines = format_accuracy(
        Accuracy("dates", 1e-3, 0.995, {"loss": 2.0, "own": 1.0}, {"loss": 2.5}), "int8"
    ).splitlines()
    assert lines[0] == "dates: KL divergence 1.00e-03 nats a token, the same likeliest token for 99.50 %"
    assert [line.split() for line in lines[1:]] == [["checkpoint", "int8"], ["loss", "2", "2.5"]]
