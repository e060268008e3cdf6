"""Chunked attention is attention in memory that grows with the length."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import TRANSFORMATIONS, Case, assert_equals_reference, partitioner
from tiers import pairwise, tiers

from meshway.models.layers.kernels.chunked import ChunkedAttention
from meshway.models.layers.masks import make_attention_mask, row_metadata

CHUNKED = ChunkedAttention(5, 4)
EVERYTHING = Case(length=23, causal=True, segments=True, bias=True, alibi=True, window=7, soft_cap=1.5, sinks=True)


@pytest.mark.parametrize(
    "case",
    [
        EVERYTHING,
        Case(length=23, kv_heads=1, window=6, sinks=True),  # both ways
        Case(length=19, kv_length=26, heads=6, soft_cap=2.0, dropout_rate=0.25),
    ],
    ids=str,
)
def test_equals_the_reference(case):
    assert_equals_reference(CHUNKED, case)


OPTIONS = {
    "causal": (False, True),
    "segments": (False, True),
    "window": (None, 6),
    "bias": (False, True),
    "soft_cap": (None, 1.5),
    "sinks": (False, True),
}


# Any two options on beside none of the others, or off beside all of them; of three and three a few.
PAIRS = pairwise(OPTIONS)
COMBINATIONS = [dict(zip(OPTIONS, x)) for x in itertools.product(*OPTIONS.values())]
COMBINATIONS = [case for case in COMBINATIONS if case in PAIRS or sum(map(bool, case.values())) != 3]


@pytest.mark.parametrize("options", tiers(COMBINATIONS, slow=PAIRS), ids=str)
def test_equals_the_reference_in_every_combination(options):
    assert_equals_reference(CHUNKED, Case(length=23, **options))


@pytest.mark.slow
@pytest.mark.parametrize("length, kv_heads", [(24, 4), (23, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_equals_the_reference_at_any_length(length, kv_heads, window):
    assert_equals_reference(CHUNKED, Case(length=length, kv_heads=kv_heads, causal=True, window=window, alibi=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [EVERYTHING, Case(length=24, causal=True, prefix=True, segments=True, window=9)], ids=str
)
@pytest.mark.parametrize("blocks", [(1, 1), (512, 512), (4, 9), (23, 2)], ids=str)
def test_blocks_change_nothing(case, blocks):
    assert_equals_reference(ChunkedAttention(*blocks), case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, rules",
    [
        ((4, 1, 2), {}),
        ((2, 4, 1), {"kv_length": None}),
        ((2, 4, 1), {}),
        ((1, 2, 4), {"kv_heads": None}),
    ],
    ids=str,
)
def test_equals_the_reference_on_a_mesh(mesh, rules):
    case = Case(length=20, causal=True, segments=True, bias=True, alibi=True, window=7, soft_cap=1.5, sinks=True)
    assert_equals_reference(CHUNKED, case, partitioner(mesh, **rules))


def problem(kernel, length, batch=1, heads=2, head_dim=16):
    """Returns a function of (query, key, value) to a scalar, and their shapes."""

    def loss(query, key, value):
        metadata = row_metadata(length)
        return jnp.sum(jnp.square(kernel(query, key, value, mask=make_attention_mask(metadata, metadata, causal=True))))

    return loss, [jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.float32)] * 3


def test_nothing_is_gathered_where_only_rows_and_heads_are_cut():
    on = partitioner((4, 1, 2))
    four = on.sharding(("batch", "length", "heads", "head_dim"), (4, 64, 2, 16))
    function, shapes = problem(ChunkedAttention(16, 16), 64, batch=4)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=four) for x in shapes]
    with on.activate():
        compiled = jax.jit(jax.grad(function, (0, 1, 2)), out_shardings=(four,) * 3).lower(*shapes).compile()
    assert not [kind for kind in ("all-gather", "all-reduce", "all-to-all", "permute") if kind in compiled.as_text()]


@pytest.mark.parametrize(
    "passes, lengths",
    [
        ("both", (1024, 4096, 16384)),
        pytest.param("both", (1024, 2048, 4096, 8192, 16384), marks=pytest.mark.slow),
        pytest.param("forward", (1024, 2048, 4096, 8192, 16384), marks=pytest.mark.slow),
    ],
)
def test_memory_grows_with_the_length(passes, lengths):
    """Temporary bytes a token never grow: those of scores would, sixteenfold, to 2 GiB in all."""
    found = []
    for length in lengths:
        function, shapes = problem(ChunkedAttention(256, 256), length)
        function = jax.grad(function, argnums=(0, 1, 2)) if passes == "both" else function
        found.append(jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)
    print(passes, [f"{length}: {x / 2**20:.1f} MiB" for length, x in zip(lengths, found)])
    each = np.array(found) / np.array(lengths)
    assert all(each[1:] < 1.01 * each[:-1]) and found[-1] < 2**25, found


@pytest.mark.slow
@pytest.mark.parametrize("around", TRANSFORMATIONS)
def test_works_inside_other_transformations(around):
    case = dataclasses.replace(EVERYTHING, length=20)
    assert_equals_reference(CHUNKED, case, partitioner((2, 2, 2), batch=None), around=around)
