"""The encoder-only model: what it sees, what it is trained on, and its parts against a plain computation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import program

from meshway.framework.errors import UserError
from meshway.framework.inference.decoding import decoding_model

LENGTH = 8


@pytest.fixture(scope="module")
def bert():
    """(model, parameters none of which is at its start, a batch)."""
    made = program("bert", f"TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}", "BATCH_SIZE=2", "NUM_POSITIONS=16")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0.1, 0.3, leaf.shape).astype(np.float32), made.param_shapes)
    return made.model, params, {name: np.array(x) for name, x in made.synthetic_batch().items()}


@pytest.mark.slow
def test_every_place_sees_every_other_of_its_segment_only(bert):
    model, params, batch = bert
    batch = {name: x.copy() for name, x in batch.items()}
    batch["encoder_segment_ids"][:, 5:] = 2
    batch["encoder_positions"][:, 5:] -= 5
    before = model.logits(params, batch, None)
    for place, seen in ((4, slice(0, 5)), (6, slice(5, 8))):
        changed = dict(batch, encoder_input_tokens=batch["encoder_input_tokens"].copy())
        changed["encoder_input_tokens"][:, place] += 1
        difference = np.abs(model.logits(params, changed, None) - before).max(axis=(0, 2))
        assert difference[seen].min() > 1e-3
        assert np.delete(difference, np.r_[seen]).max() < 1e-5
    alone = {name: x[:, 5:] for name, x in batch.items()}
    np.testing.assert_allclose(model.logits(params, alone, None), before[:, 5:], rtol=1e-4, atol=1e-4)


def test_the_loss_is_on_hidden_tokens_alone(bert):
    model, params, batch = bert
    weights = np.zeros((2, LENGTH), np.float32)
    weights[0, 3] = weights[1, 6] = 1
    batch = dict(batch, encoder_loss_weights=weights)
    loss, weight, metrics = model.loss(params, batch, None)
    scores = model.score(params, batch)
    log_probs = jax.nn.log_softmax(model.logits(params, batch, None))
    expected = [log_probs[row, place, batch["encoder_target_tokens"][row, place]] for row, place in ((0, 3), (1, 6))]
    np.testing.assert_allclose([scores[0, 3], scores[1, 6]], expected, rtol=1e-5)
    assert np.count_nonzero(scores) == 2 and float(weight) == 2
    assert math.isclose(loss, -sum(expected), rel_tol=1e-5) and math.isclose(metrics["cross_entropy"][0], loss)


def test_it_is_what_the_paper_draws(bert):
    """Devlin et al. 2019, and its released code, one token and one head at a time."""
    model, params, batch = bert

    def norm(x, p, epsilon=1e-12):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def dense(x, p):
        return x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].reshape(-1)

    tokens = batch["encoder_input_tokens"][0]
    table = params["token_embedding"]["embedding"]
    x = table[tokens] + params["position_embedding"]["embedding"][:LENGTH]
    x = norm(x + params["token_type_embedding"]["embedding"][0], params["embedding_norm"])
    layer = jax.tree.map(lambda leaf: leaf[0], params["encoder"]["block_0"])
    attention = layer["attention"]
    query, key, value = (dense(x, attention[name]).reshape(LENGTH, 4, 16) for name in ("query", "key", "value"))
    scores = np.einsum("qhd,khd->hqk", query, key) / 4
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("hqk,khd->qhd", weights, value).reshape(LENGTH, -1)
    y = y @ attention["out"]["kernel"].reshape(64, 64) + attention["out"]["bias"]
    x = norm(x + y, layer["attention_norm"])
    x = norm(x + dense(gelu(dense(x, layer["mlp"]["wi_0"])), layer["mlp"]["wo"]), layer["mlp_norm"])
    x = norm(gelu(dense(x, params["head"])), params["head_norm"])
    expected = x @ table.T + params["logits"]["bias"]
    np.testing.assert_allclose(model.logits(params, batch, None)[0], expected, rtol=1e-3, atol=1e-3)


def test_it_has_places_for_so_many_tokens_and_produces_none(bert):
    model, params, batch = bert
    longer = {name: np.tile(x, 3) for name, x in batch.items()}
    with pytest.raises(ValueError, match="rows of 24 tokens are longer than the 16 positions"):
        model.logits(params, longer, None)
    with pytest.raises(UserError, match="EncoderOnly has no decoder: it neither predicts nor scores text"):
        decoding_model(model)


def test_token_types_are_told_apart(bert):
    model, params, batch = bert
    network = model.bind(params)
    mask = jnp.ones((1, 1, LENGTH, LENGTH), bool)
    from meshway.models.layers.masks import Mask

    def run(types):
        tokens, positions = batch["encoder_input_tokens"], batch["encoder_positions"]
        return network.score(network.hidden(tokens, positions, Mask(mask), token_types=types))

    zeros = np.zeros((2, LENGTH), np.int32)
    np.testing.assert_allclose(run(None), run(zeros), rtol=1e-5)
    assert np.abs(run(zeros + 1) - run(zeros)).max() > 0.01
