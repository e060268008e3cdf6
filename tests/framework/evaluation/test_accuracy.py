"""What quantised weights cost is what their logits say."""

from types import SimpleNamespace

import jax
import numpy as np
from tiny import LENGTHS, program

from meshway.framework.evaluation.accuracy import Accuracy, Comparison, format_accuracy
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.inference.weights import prepared


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


def test_metrics_stand_beside_each_other():
    lines = format_accuracy(
        Accuracy("dates", 1e-3, 0.995, {"loss": 2.0, "own": 1.0}, {"loss": 2.5}), "int8"
    ).splitlines()
    assert lines[0] == "dates: KL divergence 1.00e-03 nats a token, the same likeliest token for 99.50 %"
    assert [line.split() for line in lines[1:]] == [["checkpoint", "int8"], ["loss", "2", "2.5"]]
