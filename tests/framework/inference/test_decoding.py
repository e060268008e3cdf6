"""Decoding with a cache equals the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FAMILIES, greedy, program


def cached_scores(model, params, batch, prompt, targets):
    """Feeds `targets` one by one through the cache; returns the log-probability of each."""
    _, start, cache = model.prefill(params, prompt, targets.shape[1])
    first = model.prefill(params, prompt, targets.shape[1])[0]

    def advance(carry, inputs):
        tokens, cache = carry
        index, target = inputs
        logits, cache = model.decode(params, tokens, start + index, cache)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], 1)[:, 0]
        return (target[:, None], cache), chosen

    steps = (jnp.arange(targets.shape[1]), targets.T)
    return jax.lax.scan(advance, (first, cache), steps)[1].T


@pytest.mark.parametrize("extra", [[], ["SCAN=True"]])
def test_encoder_decoder_cache_equals_full_forward(extra):
    made = program("t5_1_1", *extra)
    params, batch = made.init().params, dict(made.synthetic_batch())
    batch["encoder_segment_ids"][:, 20:] = 0
    targets = batch["decoder_target_tokens"]
    batch["decoder_input_tokens"] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    full = jax.jit(made.model.score)(params, batch)
    cached = jax.jit(lambda *a: cached_scores(made.model, *a))(params, batch, batch, targets)
    np.testing.assert_allclose(cached, full, atol=1e-5)


@pytest.mark.parametrize("extra", [[], ["NUM_KV_HEADS=2"], ["NUM_KV_HEADS=1", "SCAN=True"]])
def test_decoder_only_cache_equals_full_forward_with_ragged_prompts(extra):
    made = program("lm", *extra)
    params, batch = made.init().params, dict(made.synthetic_batch())
    rows, length = batch["decoder_input_tokens"].shape
    tokens = batch["decoder_target_tokens"]
    batch["decoder_input_tokens"] = np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
    full = np.asarray(jax.jit(made.model.score)(params, batch))
    prompt_lengths = 1 + np.arange(rows) % 8
    prompt = {name: x.copy() for name, x in batch.items()}
    prompt["decoder_segment_ids"] = (np.arange(length) < prompt_lengths[:, None]).astype(np.int32)
    prompt["decoder_input_tokens"] *= prompt["decoder_segment_ids"]
    # Row r has read `n` inputs (bos and n - 1 tokens): it goes on with tokens n-1, n, ...
    following = prompt_lengths[:, None] - 1 + np.arange(8)
    targets = np.take_along_axis(tokens, following, 1)
    cached = jax.jit(lambda *a: cached_scores(made.model, *a))(params, batch, prompt, targets)
    np.testing.assert_allclose(cached, np.take_along_axis(full, following, 1), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_takes_the_likeliest_token_and_stops_at_eos(family):
    """By full forward passes, one token at a time."""
    made = program(family)
    model, params = made.model, made.init().params
    batch = dict(made.synthetic_batch())
    steps = 5
    if family == "lm":
        batch["decoder_segment_ids"][:, 6:] = 0
    fast = np.asarray(jax.jit(lambda p, b: greedy(model, p, b, steps, -1))(params, batch))
    start = 5 if family == "lm" else 0
    inputs = batch["decoder_input_tokens"].copy()
    if family == "t5_1_1":
        inputs[:, 0] = 0
    logits_of = jax.jit(model.logits)
    for index in range(steps):
        full = dict(batch, decoder_input_tokens=inputs)
        full["decoder_segment_ids"] = np.ones_like(inputs)
        chosen = np.asarray(logits_of(params, full, None))[:, start + index].argmax(-1)
        np.testing.assert_array_equal(fast[:, index], chosen)
        inputs[:, start + index + 1] = chosen
    eos = int(fast[0, 2])
    cut = np.asarray(jax.jit(lambda p, b: greedy(model, p, b, steps, eos))(params, batch))
    for row, whole in zip(cut, fast, strict=True):
        end = list(whole).index(eos) + 1 if eos in whole else steps
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert not row[end:].any()
