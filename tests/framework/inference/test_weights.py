"""Quantised weights: what they stand for is what the model computes with, in as many bytes as said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from teacher_forced import case, log_probs_at_once
from tiny import greedy, program

from meshway.framework.errors import UserError
from meshway.framework.inference.weights import prepared
from meshway.framework.trees import flatten

LAYERS = ("NUM_LAYERS=2", "BATCH_SIZE=8")
CASES = [("lm", "model_1d"), ("t5_1_1", "fsdp_model"), ("mixtral", "single"), ("lm", "stage")]
CASES += [("lm", "inference/2d", "partitioner.Layout.products='bidirectional'")]


def is_quantized(node):
    return isinstance(node, qwix.QArray)


def stood_for(params):
    return jax.tree.map(
        lambda leaf: qwix.dequantize(leaf) if is_quantized(leaf) else leaf, params, is_leaf=is_quantized
    )


@pytest.mark.parametrize(
    "case", [CASES[0], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[1:])], ids=" ".join
)
def test_a_model_computes_with_what_its_weights_stand_for(case):
    family, layout, *bindings = case
    made = program(family, "BATCH_SIZE=16", *bindings, layout=layout)
    stored = made.init().params
    before = jax.device_get(stored)
    model, batch = made.model, made.shard_batch(made.synthetic_batch())
    _, params = prepared(made.sharded, stored, True, "int8")
    after, summed = stood_for(params), model.summed()
    for path, old in flatten(before).items():
        new = flatten(after)[path]
        new = np.stack(new) if isinstance(new, tuple) else np.asarray(new)
        if path not in summed:
            np.testing.assert_array_equal(new, old)
            continue
        axes = tuple(i for i, name in enumerate(flatten(made.sharded.axes)[path]) if name in summed[path])
        scale = np.abs(old).max(axis=axes, keepdims=True) / 127
        # qwix's integers end half a step beyond the largest entry.
        assert np.all(np.abs(new - old) <= scale * 0.5001)
    with made.partitioner.activate():
        score = jax.jit(model.score)
        np.testing.assert_allclose(score(params, batch), score(after, batch), rtol=1e-4, atol=1e-5)
        predict = jax.jit(lambda params, batch: greedy(model, params, batch, 4, -1))
        np.testing.assert_array_equal(predict(params, batch), predict(after, batch))


def test_bytes_are_those_of_the_entries_and_a_scale_a_channel():
    made = program("lm", "NUM_LAYERS=2", "D_MODEL=128", "D_FF=256")
    entries = {path: leaf.size for path, leaf in flatten(made.sharded.param_shapes).items()}
    _, params = prepared(made.sharded, made.init().params, True, "int8")
    held = {path: sum(x.nbytes for x in jax.tree.leaves(leaf)) for path, leaf in flatten(params).items()}
    kernel = "decoder/block_0/mlp/wi_0/kernel"
    assert held[kernel] == 2 * (128 * 256 + 4 * 256)
    assert held["decoder/block_0/mlp_norm/scale"] == 4 * 2 * 128
    assert 0.5 <= sum(held.values()) / (2 * sum(entries.values())) < 0.53, "of bfloat16's bytes"


@functools.cache
def trained():
    """Parameters of a model that learned 8 rows by heart, and what it makes of them in float32."""
    made = program("lm", *LAYERS)
    given = case(made)
    step, batch, state = made.compile_step(), made.shard_batch(given.batch), made.init()
    for _ in range(60):
        state, metrics = step(state, batch)
    total, weight = metrics["loss"]
    assert total / weight < 1.0, "it learned"
    params = jax.device_get(state.params)
    return params, given, log_probs_at_once(made, params, given)


@pytest.mark.slow
@pytest.mark.parametrize("weights, cache", [("int8", None), (None, "int8"), ("int8", "int8"), (None, "bfloat16")])
def test_a_trained_model_says_nearly_the_same(weights, cache):
    """Through its cache, from prompts of 1 to 8 tokens, in nats a token."""
    params, given, stored = trained()
    made = program("lm", *LAYERS, f"attention.Attention.cache_dtype={cache!r}")
    with made.partitioner.activate():
        sharded, params = prepared(made.sharded, jax.device_put(params, made.state_shardings.params), True, weights)
        found = given.through_cache(sharded.model, params)
    divergence = np.sum(np.exp(stored) * (stored - found), axis=-1)[given.real]
    assert 0 < divergence.mean() < 2e-3
    right = given.targets[given.real]
    accuracy = [np.mean(each.argmax(-1)[given.real] == right) for each in (stored, found)]
    assert accuracy[0] > 0.9 and abs(accuracy[1] - accuracy[0]) < 0.01


def test_what_cannot_be_quantised_is_refused():
    made = program("lm")
    with pytest.raises(UserError, match="weights=int2 is not one of int8, int4"):
        prepared(made.sharded, {}, True, "int2")
    if jax.__version_info__ < (0, 12):  # whose programs for a CPU take no such arrays
        with pytest.raises(UserError, match="weights=int4: programs for cpu take no arrays of int4; use int8"):
            prepared(made.sharded, made.init().params, True, "int4")
    else:
        params = prepared(made.sharded, made.init().params, True, "int4")[1]
        assert any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(params))
    made.sharded.model = object()
    with pytest.raises(UserError, match="object names no parameter that may be quantised"):
        prepared(made.sharded, {}, False, "int8")
