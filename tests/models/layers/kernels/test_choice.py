"""Who computes attention, by platform and by what is asked for; nobody is given what it cannot do."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import pytest
from attention_cases import Case, arrays, assert_equals_reference, attend, partitioner

from meshway.models.layers.kernels.attention_shards import attention_sharding
from meshway.models.layers.kernels.auto import (
    REFERENCE_SCORES,
    AutoAttention,
    Call,
    choose,
    cudnn_refuses,
    describe,
    splash_refuses,
)
from meshway.models.layers.kernels.chunked import ChunkedAttention
from meshway.models.layers.masks import Mask, local_window, make_attention_mask, row_metadata

SHORT = Call(length=512, kv_length=512, head_dim=64, causal=True)
LONG = Call(length=4096, kv_length=4096, head_dim=64, dtype="bfloat16", causal=True)
PACKED = {"segments": True}

CHOICES = [
    ("cpu", SHORT, {}, "reference", "512 x 512 scores are few"),
    ("cpu", SHORT, {"kv_length": 513, "causal": False}, "chunked", "512 x 513 scores are many"),
    ("cuda", SHORT, {"kv_length": 513, "causal": False}, "reference", "512 x 513 scores are few"),
    ("cpu", LONG, {}, "chunked", "4096 x 4096 scores are many"),
    ("cpu", LONG, {"by_blocks": False}, "reference", "dense array only"),
    ("cpu", LONG, {"sharded": ("head_dim",)}, "reference", "shards head_dim"),
    ("cpu", LONG, {"sharded": ("length", "kv_length")}, "chunked", "many"),
    ("cpu", LONG, {"sharded": ("kv_length",), "apart": True}, "reference", "by other axes than the queries'"),
    ("rocm", LONG, {}, "chunked", "many"),
    ("tpu", SHORT, PACKED, "splash", "fastest on tpu"),
    ("tpu", LONG, {"window": 512, "soft_cap": True, "sinks": True}, "splash", "fastest on tpu"),
    ("tpu", LONG, {"kv_length": 1024, "causal": False}, "splash", "fastest on tpu"),
    ("tpu", LONG, {"kv_length": 1024}, "chunked", "no splash: it assumes that queries and keys stand at 0"),
    ("tpu", LONG, {"ordered": False}, "chunked", "no splash: it assumes that queries and keys stand at 0"),
    ("tpu", LONG, {"length": 4097, "kv_length": 4097}, "chunked", "no splash: its lengths are multiples of 128"),
    ("tpu", LONG, {"table": True}, "chunked", "no splash: it supports no biases"),
    ("tpu", LONG, {"slopes": True}, "chunked", "no splash: it supports no biases"),
    ("tpu", LONG, {"prefix": True}, "chunked", "no splash: it supports no prefixes"),
    ("tpu", SHORT, {"dropout": True}, "reference", "few; no splash: it supports no dropout"),
    ("tpu", LONG, {"sharded": ("length",)}, "chunked", "no splash: the layout shards length"),
    ("cuda", LONG, {}, "cudnn", "fastest on cuda"),
    ("cuda", LONG, {"window": 512}, "cudnn", "fastest on cuda"),
    ("cuda", LONG, {"window": 512, "causal": False}, "chunked", "no cudnn: its windows are causal"),
    ("cuda", LONG, PACKED, "chunked", "no cudnn: it supports no segments"),
    ("cuda", LONG, {"soft_cap": True}, "chunked", "no cudnn: it supports no soft caps"),
    ("cuda", LONG, {"sinks": True}, "chunked", "no cudnn: it supports no sinks"),
    ("cuda", SHORT, {}, "reference", "few; no cudnn: it computes in bfloat16 or float16, not float32"),
    ("cuda", LONG, {"head_dim": 256}, "chunked", "up to 128, not 256"),
]


@pytest.mark.parametrize("platform, call, changed, name, reason", CHOICES, ids=str)
def test_the_choice_by_platform_and_call(platform, call, changed, name, reason):
    choice = choose(platform, dataclasses.replace(call, **changed))
    assert choice.name == name and reason in choice.reason


def described(on=None, bias=None, mask=None, rate=0.0):
    found = []

    def inside(query, key):
        rng, how = jax.random.key(0), {"soft_cap": 1.0, "sinks": None, "dropout_rate": rate}
        found.append(
            describe(query, key, bias=bias, mask=mask, rng=rng, sharding=attention_sharding(query, key), **how)
        )

    shapes = [jax.ShapeDtypeStruct((4, 8, heads, 16), jnp.bfloat16) for heads in (4, 2)]
    if on is None:
        jax.eval_shape(inside, *shapes)
    else:
        with on.activate():
            jax.eval_shape(inside, *shapes)
    return found[0]


def test_a_call_is_described_by_its_arguments():
    segments = jnp.ones((4, 8), jnp.int32)
    metadata = row_metadata(8, segments)
    plain = Call(8, 8, 16, "bfloat16", soft_cap=True)
    assert described() == plain
    narrow = local_window(make_attention_mask(metadata, metadata, causal=True), 3, metadata, metadata)
    assert described(mask=narrow) == dataclasses.replace(plain, causal=True, window=3, segments=True)
    moved = dataclasses.replace(metadata, ordered=False)
    assert not described(mask=make_attention_mask(metadata, moved)).ordered
    assert not described(mask=Mask(narrow.dense)).by_blocks and not described(bias=jnp.zeros(3)).by_blocks
    assert described(rate=0.5).dropout
    assert described(on=partitioner((1, 4, 2))).sharded == ("length", "kv_length")
    assert not described(on=partitioner((1, 4, 2))).apart
    assert described(on=partitioner((4, 1, 2))).sharded == ()
    assert described(on=partitioner((1, 4, 2), kv_length="model", heads=None)).apart
    assert described(on=partitioner((1, 4, 2), length=None)).apart


def test_what_is_chosen_is_logged_once_for_each_kind_of_call(caplog):
    case = Case(length=21, causal=True)
    operands, _, _ = arrays(case)
    with caplog.at_level(logging.INFO, "meshway.models.layers.kernels.auto"):
        for _ in range(2):
            jax.eval_shape(lambda *x: attend(AutoAttention(), case, *x)[0], *operands)
    assert [record.getMessage() for record in caplog.records] == [
        "attention on cpu (21 x 21, head_dim 4, float32): reference, since 21 x 21 scores are few"
    ]


@pytest.mark.slow
def test_whoever_is_chosen_computes_the_same(monkeypatch):
    monkeypatch.setitem(REFERENCE_SCORES, "cpu", 100)
    taken = []

    def chunked(*arguments, **how):
        taken.append(1)
        return ChunkedAttention(5, 4)(*arguments, **how)

    case = Case(length=22, causal=True, segments=True, window=9, alibi=True)
    assert_equals_reference(AutoAttention(chunked=chunked), case)
    assert taken
    assert_equals_reference(AutoAttention(chunked=chunked), dataclasses.replace(case, length=9))
    assert len(taken) == 1
    even = dataclasses.replace(case, length=24)
    with partitioner((1, 4, 2), kv_length="model", heads=None).activate():  # which chunked attention refuses
        jax.eval_shape(lambda *x: attend(AutoAttention(), even, *x)[0], *arrays(even)[0])


def test_the_fused_kernels_refuse_all_that_they_are_not_given():
    assert splash_refuses(LONG) is None and cudnn_refuses(LONG) is None
    for changed in ({"by_blocks": False}, {"sharded": ("kv_length",)}, {"dropout": True}):
        assert splash_refuses(dataclasses.replace(LONG, **changed)) and cudnn_refuses(
            dataclasses.replace(LONG, **changed)
        )
