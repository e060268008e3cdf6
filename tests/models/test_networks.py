"""Laws of the networks: causality, segments, prefixes, and T5 itself against T5X."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, greedy, program

from meshway.models.layers import attention, positions, rotary

GOLDENS = Path(__file__).parent.parent / "goldens"


def model_of(family, size, *bindings):
    from meshway.launch.invocation import Invocation
    from meshway.launch.recipe import config

    invocation = Invocation(
        verb="bench",
        subject="train",
        gin_files=(f"models/{family}/{size}.gin", "optimizers/adafactor.gin"),
        bindings=("TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}", "LAYOUT='single'", *bindings),
    )
    return config.load(invocation, import_unreferenced=False).build("bench.train.measure")["program"]


@pytest.mark.slow
def test_t5_is_t5x():
    """A checkpoint of T5X's own T5 1.1 gives T5X's loss, logits, scores and greedy decodes.

    The file was made from a randomly initialised T5X model (2026-04 sources): its parameters under our names, a padded
    batch, and what T5X computed from it.
    """
    golden = np.load(GOLDENS / "t5x_encoder_decoder.npz")
    made = model_of(
        "t5_1_1", "tiny", "VOCAB_SIZE=128", "D_MODEL=32", "NUM_HEADS=3", "HEAD_DIM=8", "D_FF=48", "Z_LOSS=0.0"
    )
    params = {}
    for name in golden.files:
        if name.startswith("params/"):
            *parents, last = name.split("/")[1:]
            node = params
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = golden[name]
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, made.param_shapes)
    batch = {name.removeprefix("batch/"): golden[name] for name in golden.files if name.startswith("batch/")}
    batch["encoder_segment_ids"] = (batch["encoder_input_tokens"] > 0).astype(np.int32)
    batch["decoder_segment_ids"] = (batch["decoder_target_tokens"] > 0).astype(np.int32)
    loss, _, _ = made.model.loss(params, batch, None)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)
    np.testing.assert_allclose(made.model.score(params, batch).sum(axis=1), golden["score"], rtol=1e-6)
    length = golden["greedy"].shape[1]
    found = jax.jit(lambda params, batch: greedy(made.model, params, batch, length, 1))(params, batch)
    np.testing.assert_array_equal(found, golden["greedy"])


def scores(made, params, batch):
    return np.asarray(jax.jit(made.model.score)(params, batch))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    made = program(request.param)
    return made, made.init().params, made.synthetic_batch()


def test_no_token_sees_a_later_one(family):
    made, params, batch = family
    before = scores(made, params, batch)
    later = dict(batch)
    tokens = batch["decoder_input_tokens"].copy()
    tokens[:, 9:] = (tokens[:, 9:] + 7) % 200 + 3
    later["decoder_input_tokens"] = tokens
    after = scores(made, params, later)
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-5)
    assert np.abs(after[:, 9:] - before[:, 9:]).max() > 0.01


def test_segments_do_not_see_each_other(family):
    """Two examples packed in a row score as they do alone."""
    made, params, batch = family
    sides = {"encoder": 24, "decoder": 16}
    packed = {name: x.copy() for name, x in batch.items()}
    alone = {name: np.zeros_like(x) for name, x in batch.items()}
    for side, length in sides.items():
        if f"{side}_segment_ids" not in batch:
            continue
        half = length // 2
        packed[f"{side}_segment_ids"][:, half:] = 2
        packed[f"{side}_positions"][:, half:] -= half
        for name in batch:
            if name.startswith(side):
                alone[name][:, :half] = packed[name][:, half:]
        alone[f"{side}_segment_ids"][:, :half] = 1
    together = scores(made, params, packed)[:, 8:]
    np.testing.assert_allclose(scores(made, params, alone)[:, :8], together, atol=2e-5)


def test_padding_changes_nothing(family):
    made, params, batch = family
    cut = {name: x.copy() for name, x in batch.items()}
    for name in cut:
        if name.endswith(("segment_ids", "weights")):
            cut[name][:, 10:] = 0
    other = {name: x.copy() for name, x in cut.items()}
    for name in other:
        if name.endswith("tokens"):
            other[name][:, 10:] = 77
    np.testing.assert_allclose(scores(made, params, other), scores(made, params, cut), atol=1e-6)


def test_a_prefix_sees_both_ways():
    made = model_of("lm", "tiny", "objectives.DecoderOnly.prefix=True", "VOCAB_SIZE=256", "BATCH_SIZE=4")
    params, batch = made.init().params, made.synthetic_batch()
    batch["decoder_prefix_mask"] = np.zeros((4, 16), np.int32)
    batch["decoder_prefix_mask"][:, :8] = 1
    changed = dict(batch)
    changed["decoder_input_tokens"] = batch["decoder_input_tokens"].copy()
    changed["decoder_input_tokens"][:, 7] += 5
    difference = np.abs(scores(made, params, changed) - scores(made, params, batch))
    assert difference[:, 0].min() > 1e-6, "the first token of a prefix sees its last"
    causal = dict(batch, decoder_prefix_mask=np.zeros((4, 16), np.int32))
    changed["decoder_prefix_mask"] = causal["decoder_prefix_mask"]
    difference = np.abs(scores(made, params, changed) - scores(made, params, causal))
    assert difference[:, :7].max() < 1e-6


def test_what_has_no_weight_bears_no_loss():
    """As inputs of a prefix language model: neither value nor gradient depends on what is to be predicted there."""
    made = model_of("lm", "tiny", "objectives.DecoderOnly.prefix=True", "VOCAB_SIZE=256", "BATCH_SIZE=4")
    params, batch = made.init().params, made.synthetic_batch()
    batch["decoder_prefix_mask"] = (np.arange(16) < 8) * np.ones((4, 1), np.int32)
    batch["decoder_loss_weights"] = 1.0 - batch["decoder_prefix_mask"].astype(np.float32)
    changed = dict(batch, decoder_target_tokens=batch["decoder_target_tokens"].copy())
    changed["decoder_target_tokens"][:, :8] += 3

    @jax.jit
    def loss(params, batch):
        (total, weight), gradients = jax.value_and_grad(
            lambda params: made.model.loss(params, batch, None)[:2], has_aux=True
        )(params)
        return total, weight, gradients

    found, wanted = loss(params, changed), loss(params, batch)
    assert wanted[1] == 4 * 8
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    beyond = dict(batch, decoder_target_tokens=batch["decoder_target_tokens"] + (np.arange(16) == 12))
    assert loss(params, beyond)[0] != wanted[0], "a target with a weight does bear it"


def test_grouped_queries_equal_repeated_heads():
    random = np.random.default_rng(0)
    query = random.standard_normal((2, 5, 6, 4)).astype(np.float32)
    key, value = random.standard_normal((2, 2, 7, 2, 4)).astype(np.float32)
    found = attention.dot_product_attention(query, key, value)
    for head in range(6):
        logits = np.einsum("bqd,bkd->bqk", query[:, :, head], key[:, :, head // 3])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        expected = np.einsum("bqk,bkd->bqd", weights, value[:, :, head // 3])
        np.testing.assert_allclose(found[:, :, head], expected, atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)
    rotate = rotary.Rotary()

    def score(i, j):
        return float(jnp.sum(rotate(query, np.array([[i]])) * rotate(key, np.array([[j]]))))

    assert math.isclose(score(3, 1), score(103, 101), rel_tol=1e-4)
    assert not math.isclose(score(3, 1), score(4, 1), rel_tol=1e-2)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_against_their_definition(bidirectional):
    """Exact up to a quarter (half when causal) of the buckets, then logarithmic up to distance 128."""
    relative = np.arange(-200, 201)
    found = np.asarray(positions.relative_position_bucket(jnp.asarray(relative), bidirectional, 32, 128))
    for position, bucket in zip(relative.tolist(), found.tolist(), strict=True):
        buckets, offset, distance = 32, 0, -position
        if bidirectional:
            buckets, offset, distance = 16, 16 if distance < 0 else 0, abs(distance)
        distance, exact = max(distance, 0), buckets // 2
        if distance >= exact:
            log = math.log(distance / exact) / math.log(128 / exact) * (buckets - exact)
            # A float32 logarithm may fall on the other side of a whole number.
            choices = {min(exact + int(log + epsilon), buckets - 1) for epsilon in (-1e-5, 1e-5)}
        else:
            choices = {distance}
        assert bucket - offset in choices, position


def test_bfloat16_compute_keeps_float32_parameters():
    made = program("t5_1_1", "DTYPE='bfloat16'")
    params, batch = made.init().params, made.synthetic_batch()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    full, half = (
        jax.jit(lambda params, batch, model=model: model.loss(params, batch, None)[0])(params, batch)
        for model in (program("t5_1_1").model, made.model)
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, rtol=0.02)
    assert float(half) != float(full)
