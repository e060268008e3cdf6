"""Cross entropy: against numpy, and in chunks as in one piece, without ever holding all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiers
from tiny import losses, program

from meshway.models.layers.side_outputs import Reports
from meshway.models.losses import CrossEntropy


def test_cross_entropy_against_numpy():
    random = np.random.default_rng(0)
    logits = random.standard_normal((2, 3, 7)).astype(np.float32) * 3
    targets, weights = random.integers(0, 7, (2, 3)), np.array([[1, 1, 0], [1, 0.5, 0]], np.float32)
    smoothing, z_loss = 0.1, 0.01
    log_z = np.log(np.exp(logits).sum(-1))
    log_probs = logits - log_z[..., None]
    soft = np.full((2, 3, 7), smoothing / 6)
    np.put_along_axis(soft, targets[..., None], 1 - smoothing, -1)
    expected = (-(soft * log_probs).sum(-1) + (soft * np.log(soft)).sum(-1) + z_loss * log_z**2) * weights
    loss, weight, metrics = CrossEntropy(z_loss, smoothing)(lambda x: x, logits, targets, weights)
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    assert float(weight) == 3.5
    plain = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics["cross_entropy"][0], (plain * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"][0], ((logits.argmax(-1) == targets) * weights).sum())


def test_losses_of_layers_are_added_for_each_token():
    logits, targets, weights = (
        np.zeros((1, 4, 7), np.float32),
        np.zeros((1, 4), int),
        np.array([[1, 1, 1, 0]], np.float32),
    )
    plain, _, _ = CrossEntropy()(lambda x: x, logits, targets, weights)
    said = Reports(losses={"router": jnp.array([0.5, 0.25])})
    loss, weight, metrics = CrossEntropy()(lambda x: x, logits, targets, weights, said)
    np.testing.assert_allclose(loss, plain + 3 * 0.75, rtol=1e-6)
    assert [float(x) for x in metrics["router"]] == [2.25, 3.0] and float(weight) == 3


NETWORKS = {
    "t5_1_1": ("objectives.EncoderDecoder", ()),
    "t5": ("objectives.EncoderDecoder", ()),  # scores by its embedding
    "lm": ("objectives.DecoderOnly", ()),
    "gemma2": ("objectives.DecoderOnly", ()),  # caps its logits
    "mixtral": ("objectives.DecoderOnly", ("lm.LanguageModel.logits_bias=True",)),  # and adds its routers' losses
    "bert": ("objectives.EncoderOnly", ()),
}


@pytest.mark.parametrize("family", tiers(NETWORKS, slow=("gemma2", "t5_1_1", "mixtral")))
def test_loss_gradients_and_scores_in_chunks_are_those_of_one_piece(family):
    objective, bindings = NETWORKS[family]
    bindings = (*bindings, "LABEL_SMOOTHING=0.1", "Z_LOSS=0.001")
    whole = program(family, *bindings).model
    params = whole.init(jax.random.key(0))
    batch = program(family, *bindings).synthetic_batch(seed=1)
    batch = {name: x * (np.arange(x.shape[1]) < 13) if "weights" in name else x for name, x in batch.items()}

    def found(model):
        def loss(params):
            total, weight, metrics = model.loss(params, batch, None)
            return total, (weight, metrics)

        return jax.jit(lambda p: (jax.value_and_grad(loss, has_aux=True)(p), model.score(p, batch)))(params)

    expected = found(whole)
    for chunks in (4, 5):  # of 16 tokens: 5 asks for padding
        chunked = program(family, *bindings, f"{objective}.num_loss_chunks={chunks}").model
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found(chunked), expected)


@pytest.mark.parametrize("family", tiers(("t5_1_1", "lm", "bert"), quick=("lm",), slow=("t5_1_1", "bert")))
def test_all_logits_are_never_held(family):
    """In the whole of a training step's and of scoring's program, no array is as large as all logits."""
    objective = NETWORKS[family][0]

    def largest(chunks):
        made = program(family, "VOCAB_SIZE=2048", f"{objective}.num_loss_chunks={chunks}")
        params, batch = made.param_shapes, made.abstract_batch
        sizes = [max(_sizes(made.trace_gradients().jaxpr))]
        sizes.append(max(_sizes(jax.make_jaxpr(made.model.score)(params, batch).jaxpr)))
        return sizes

    all_logits = 16 * 16 * 2048
    assert min(largest(1)) >= all_logits
    assert max(largest(8)) < all_logits


def _sizes(jaxpr):
    """Yields the number of elements of every array that a program makes, those of its parts included."""
    for equation in jaxpr.eqns:
        yield from (np.prod(out.aval.shape, dtype=int) for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from _sizes(inner)


ON_MESHES = [("t5_1_1", "fsdp_model"), ("lm", "context"), ("t5_1_1", "ring_model"), ("lm", "zero_1")]


@pytest.mark.parametrize(("family", "layout"), tiers(ON_MESHES, slow=[("lm", "context")]))
def test_chunks_on_meshes_train_as_one_device_does(family, layout):
    chunks = f"{NETWORKS[family][0]}.num_loss_chunks=4"
    expected, _ = losses(program(family), 3)
    found, _ = losses(program(family, chunks, layout=layout), 3)
    np.testing.assert_allclose(found, expected, rtol=2e-5)
