"""`meshway bench attention`: each kernel is run at each length under the layout, unless it needs too much memory."""

import numpy as np
import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench import attention
from meshway.launch.bench.attention import Result, format_table
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config
from meshway.models.layers.forms import KernelForms
from meshway.models.layers.kernels.reference import dot_product_attention

HEADS = ("num_heads=2", "num_kv_heads=1", "head_dim=4")
SMALL = (
    "bench.attention.measure.lengths=(32, 64)",
    "bench.attention.measure.rounds=1",
    *(f"forms.KernelForms.{h}" for h in HEADS),
)


def arguments(*bindings):
    invocation = Invocation("bench", "attention", ("bench_attention",), (*SMALL, *bindings))
    return config.load(invocation, import_unreferenced=False).build("bench.attention.measure")


def test_kernels_are_timed_at_each_length_unless_they_need_too_much(capsys):
    options = ("chunked.ChunkedAttention.query_block=16", "chunked.ChunkedAttention.kv_block=16")
    found = attention.measure(**arguments(*options, "bench.attention.measure.most_bytes=60_000"))
    assert [(each.name, each.length) for each in found] == [
        (name, length) for length in (32, 64) for name in ("reference", "chunked")
    ]
    assert [each.seconds is None for each in found] == [False, False, True, False]
    assert found[2].temporary > 60_000 > found[3].temporary > found[1].temporary
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x length, float32, forward and backward, on data=1"
    assert "x1.00" in lines[2] and "not run" in lines[4]


@pytest.mark.parametrize("how", [{}, {"causal": False}, {"window": 5}, {"causal": False, "window": 3, "segments": 3}])
def test_operations_are_counted_for_what_is_seen(how):
    forms = KernelForms({"reference": dot_product_attention}, num_heads=2, head_dim=4, **how)
    mask = forms._mask(13)
    pairs = 13 * 13 if mask is None else np.sum(np.asarray(mask.dense))
    assert forms.flops(3, 13, backward=False) == 4 * 3 * 2 * 4 * pairs
    assert forms.flops(3, 13, backward=True) == 12 * 3 * 2 * 4 * pairs


def test_times_are_compared_with_the_first_kernel_of_a_length():
    results = [Result("a", 1024, 0.25, 2048, 1e9), Result("b", 1024, 0.5, 1024, 1e9), Result("a", 2048, None, 0, 4e9)]
    lines = format_table(results, "this", {"data": 1}).splitlines()
    assert lines[2].split() == ["1,024", "a", "250.0", "ms", "x1.00", "4.0", "2.0", "KiB"]
    assert lines[3].split() == ["1,024", "b", "500.0", "ms", "x2.00", "2.0", "1.0", "KiB"]
    assert lines[4].split() == ["2,048", "a", "not", "run", "0", "B"]


def test_the_command_line_knows_it_and_numbers_have_a_range():
    assert cli.parse(["bench", "attention", "--gin_file=bench_attention"]).subject == "attention"
    with pytest.raises(UserError, match="bench.attention.measure.lengths must be at least 1, not 0"):
        attention.measure(**arguments("bench.attention.measure.lengths=()"))
