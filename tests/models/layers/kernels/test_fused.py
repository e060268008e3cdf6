"""Splash attention computes what the reference does (interpreted: there is no TPU here); cuDNN's is lowered only."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from attention_cases import TRANSFORMATIONS, Case, arrays, assert_equals_reference, attend, partitioner

from meshway.models.layers.kernels.auto import CudnnAttention, SplashAttention, _block

SPLASH = SplashAttention(block=128, interpret=True)
PACKED = Case(length=256, causal=True, segments=True, window=100, soft_cap=2.0, sinks=True)


def test_splash_equals_the_reference():
    assert_equals_reference(SPLASH, PACKED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(length=256, kv_heads=1, window=100),
        Case(length=128, kv_length=256, kv_heads=4, segments=True),
        Case(length=384, causal=True, soft_cap=1.0),
        Case(length=128),
    ],
    ids=str,
)
def test_splash_equals_the_reference_in_other_cases(case):
    assert_equals_reference(SPLASH, case)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, rules", [((2, 1, 2), {}), ((1, 1, 4), {"kv_heads": None})], ids=str)
def test_splash_works_on_each_devices_rows_and_heads(mesh, rules):
    assert_equals_reference(SPLASH, PACKED, partitioner(mesh, **rules))


def test_blocks_divide_the_length():
    assert [_block(length, 512) for length in (128, 384, 640, 1024, 1152)] == [128, 384, 128, 512, 384]


@pytest.mark.parametrize(
    "kernel, case, message",
    [
        (SPLASH, Case(length=128, bias=True), "SplashAttention: it supports no biases; chunked.ChunkedAttention as "),
        (SPLASH, Case(length=100), "multiples of 128, not 100 and 100"),
        (SplashAttention(block=8192), Case(length=8192, causal=True), r"takes 256 MiB, .* for 64: .*\(8192\) must be"),
        (CudnnAttention(), Case(), "CudnnAttention: it computes in bfloat16 or float16, not float32"),
    ],
)
def test_what_they_cannot_do_is_refused(kernel, case, message):
    operands, _, _ = arrays(case)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda *x: attend(kernel, case, *x)[0], *operands)


@pytest.mark.parametrize(
    "case, mask",
    [(Case(length=64, causal=True, window=16), "CAUSAL"), (Case(length=64, kv_length=32), "NO_MASK")],
    ids=str,
)
def test_cudnn_is_lowered_for_cuda(case, mask, monkeypatch):
    """As far as a machine without a GPU goes: forward and backward become cuDNN's calls, with mask and window."""
    stablehlo = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91000)
    shapes = [
        jax.ShapeDtypeStruct((2, length, heads, 16), jnp.bfloat16)
        for length, heads in ((64, 4), (case.kv_length or 64, 2))
    ]

    def loss(query, key, value):
        operands = arrays(case)[0]
        return jnp.sum(attend(CudnnAttention(), case, query, key, value, *operands[3:])[0].astype(jnp.float32))

    lowered = (
        jax.jit(jax.grad(loss, (0, 1, 2))).trace(shapes[0], shapes[1], shapes[1]).lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    assert "__cudnn$fmhaSoftmax(" in text.replace('"', "(") and "__cudnn$fmhaSoftmaxBackward" in text
    assert f"{mask}" in text and ("sliding_window_length" in text)


@pytest.mark.slow
@pytest.mark.parametrize("around", TRANSFORMATIONS)
def test_works_inside_other_transformations(around):
    case = dataclasses.replace(PACKED, length=128)
    assert_equals_reference(SPLASH, case, partitioner((2, 1, 2), batch=None), around=around)
