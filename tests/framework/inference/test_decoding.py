"""Decoding with a cache equals the full forward pass."""

import functools
import re

import jax
import numpy as np
import pytest
from teacher_forced import assert_same, case, log_probs_at_once
from tiers import tiers
from tiny import FAMILIES, FOUR_LAYERS, LAYOUTS, greedy, program

from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.decoding import Stop
from meshway.framework.inference.sampling import Sampling

PREFIX = "objectives.DecoderOnly.prefix=True"
GQA, MQA = (("t5_1_1", f"attention.Attention.num_kv_heads={n}") for n in (2, 1))
QUICK = [
    ("t5_1_1", "SCAN=True"),
    ("lm",),
    ("lm", "NUM_KV_HEADS=1", "WINDOW=3", "SCAN=True", PREFIX, "TASK_FEATURE_LENGTHS={'inputs': 7, 'targets': 9}"),
]
SLOW = [
    ("t5_1_1",),
    ("lm", "NUM_KV_HEADS=2", "ROTARY=None", "attention.Attention.alibi=True"),
    GQA,
    MQA,
    ("t5_1_1", "NUM_DECODER_LAYERS=3", "SCAN=True"),
    ("lm", "NUM_KV_HEADS=2", "WINDOW=1"),
    ("lm", PREFIX, "TASK_FEATURE_LENGTHS={'inputs': 7, 'targets': 9}"),
    ("chinchilla",),
    ("gemma2", "WINDOW=4"),
    ("gemma3", "WINDOW=4"),
    ("llama", "ROTARY=@rotary.ReRoPE()", "rotary.ReRoPE.window=3", "rotary.ReRoPE.base=%ROPE_BASE"),
    ("palm",),
    ("t5x_decoder",),
    ("deepseek",),
    ("mixtral",),
]


@pytest.mark.parametrize(
    "words", [*QUICK, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)], ids="-".join
)
def test_a_cache_gives_the_full_forward_pass_from_ragged_prompts(words):
    made = program(*words)
    given = case(made, prefix=PREFIX in words)
    params = jax.device_get(made.init().params)
    assert_same(made, params, given, log_probs_at_once(made, params, given))


ONE_KEY_HEAD = [MQA, ("lm", "NUM_KV_HEADS=1", "WINDOW=3")]
UNDER_LAYOUTS = [
    *ONE_KEY_HEAD,
    ("t5_1_1",),
    ("lm",),
    ("lm", "NUM_KV_HEADS=2", "ROTARY=None", "attention.Attention.alibi=True"),
]


@functools.cache
def reference(words, deep):
    """(parameters, case, log-probabilities at once) on one device, of as many layers as pipelines have if `deep`."""
    made = program(*words, *(FOUR_LAYERS[words[0]] if deep else ()))
    params, given = jax.device_get(made.init().params), case(made)
    return params, given, log_probs_at_once(made, params, given)


# Every kind of heads where heads or lengths are cut; in turn where only rows, weights and layers are.
IN_TURN = [(UNDER_LAYOUTS[n % len(UNDER_LAYOUTS)], layout) for n, layout in enumerate(LAYOUTS)]
CUT = [layout for layout in LAYOUTS if re.search("model|ring|context|ulysses", layout)]
LAID_OUT = [(words, layout) for layout in LAYOUTS for words in UNDER_LAYOUTS if layout in CUT]
LAID_OUT += [case for case in IN_TURN if case[1] not in CUT]
WHERE_HEADS_ARE_CUT = [(words, layout) for words in ONE_KEY_HEAD for layout in ("model_1d", "ring_model", "fsdp_model")]


@pytest.mark.parametrize("words, layout", tiers(LAID_OUT, slow=[*IN_TURN, *WHERE_HEADS_ARE_CUT]))
def test_under_a_layout_a_cache_gives_the_full_forward_pass_of_one_device(words, layout):
    if layout == "ring_model" and words in ONE_KEY_HEAD:
        with pytest.raises(UserError, match="'kv_heads' of size 1 is not divisible by model=2"):
            _ = program(*words, layout=layout).state_shardings
        return
    assert_same(program(*words, layout=layout), *reference(words, layout.startswith("stage")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "expert" in layout])
def test_experts_decode_where_they_lie(layout):
    assert_same(program("mixtral", layout=layout), *reference(("mixtral",), False))


DECODERS = {
    "greedy": Sampling(temperature=0.0),
    "sampling": Sampling(1.2, 20, 0.9, 0.01, repetition_penalty=1.3, frequency_penalty=0.1, num_decodes=2),
    "beams": BeamSearch(3, 2.3),  # short and long predictions score alike
    "beams_as_transformers": BeamSearch(3, 1.0, rules="transformers"),
}
MANY_ENDS = Stop(tuple(range(1, 24)), [(70, 71)])


def decoding(made, decoder, length=6):
    """Returns a function of parameters and a batch."""
    rows, key = made.batch_size, jax.random.key(0)
    return lambda params, batch: decoder(made.model, params, batch, length, MANY_ENDS, np.arange(rows), key)


SHARED = [(family, name) for family in FAMILIES for name in DECODERS]


# Each decoder in CI, families in turn.
@pytest.mark.parametrize("family, name", tiers(SHARED, quick=[("lm", "beams")], slow=[SHARED[0], SHARED[5], SHARED[3]]))
def test_devices_that_share_a_batch_exchange_nothing_but_whether_all_are_done(family, name):
    made = program(family, layout="data")
    with made.partitioner.activate():
        params, batch = made.init().params, made.shard_batch(made.synthetic_batch())
        text = jax.jit(decoding(made, DECODERS[name])).lower(params, batch).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    assert re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", text) == [("pred[]", "all-reduce")]


def test_a_loop_has_the_encoder_s_cache_as_attention_reads_it():
    """XLA moves a swap of axes into the loop if it may, and then copies the whole cache in each step."""
    made = program("t5_1_1", "NUM_HEADS=2", "HEAD_DIM=8", layout="single")
    sharded = made.sharded.by_layer()
    with made.partitioner.activate():
        batch = made.shard_batch(made.synthetic_batch())
        compiled = jax.jit(decoding(made, DECODERS["greedy"])).lower(sharded.param_shapes, batch).compile()
    (carried,) = re.findall(r" = \((.*)\) while\(", compiled.as_text())
    rows, length = batch["encoder_input_tokens"].shape
    assert len(re.findall(rf"f32\[{rows},2,{length},8\]", carried)) == 2  # keys and values of one layer
    assert not re.findall(rf"f32\[{rows},{length},2,8\]", carried)


@functools.cache
def decoded_alone(family, name, deep):
    made = program(family, *(FOUR_LAYERS[family] if deep else ()))
    params = jax.device_get(made.init().params)
    return params, jax.device_get(jax.jit(decoding(made, DECODERS[name]))(params, ragged(made)))


def ragged(made):
    return made.shard_batch(case(made).prompt)


PREDICTED = [
    (family, name, layout)
    for layout in ("fsdp_model", "model_sequence", "ring", "stage_circular")
    for name in ("sampling", "beams")
    for family in FAMILIES
]


# Every layout, decoders and families in turn.
@pytest.mark.parametrize("family, name, layout", tiers(PREDICTED, slow=[*PREDICTED[::8], *PREDICTED[7::8]]))
def test_predictions_under_a_layout_are_those_of_one_device(family, name, layout):
    """There with parameters by layer, except where stages hold them; on one device stacked."""
    params, wanted = decoded_alone(family, name, layout.startswith("stage"))
    made = program(family, layout=layout)
    with made.partitioner.activate():
        placed = made.sharded.by_layer().split(jax.device_put(params, made.state_shardings.params))
        found = jax.jit(decoding(made, DECODERS[name]))(placed, ragged(made))
    assert len(np.unique(wanted.lengths)) > 2
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.lengths, wanted.lengths)
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-5)


@pytest.mark.parametrize("family", tiers(FAMILIES, quick=["lm"], slow=["t5_1_1"]))
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
