"""`meshway bench moe`: each form is run on the recipe's own layer and layout, and what it sends is counted."""

import pytest

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.bench import moe
from meshway.launch.bench.moe import Result, format_table
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

SMALL = (
    "D_MODEL=4",
    "moe.MoeMlp.d_ff=4",
    "bench.moe.measure.batch_size=8",
    "bench.moe.measure.length=16",
    "bench.moe.measure.rounds=1",
)


def arguments(*bindings):
    invocation = Invocation("bench", "moe", ("bench_moe",), (*SMALL, "bench.moe.measure.steps=1", *bindings))
    return config.load(invocation, import_unreferenced=False).build("bench.moe.measure")


def test_a_form_is_timed_under_the_layout_and_its_drops_are_counted(capsys):
    names = "forms.DispatchForms.names=('all_to_all',)"
    (found,) = moe.measure(**arguments("LAYOUT='expert'", "moe.MoeMlp.capacity_factor=0.25", names))
    assert found.name == "all_to_all" and found.seconds > 0 and found.temporary > 0 and found.sent > 0
    assert found.collectives["all-to-all"] == 4  # there and back, forward and backward
    assert found.dropped > 0.5
    assert "128 tokens, forward and backward, on data=2 x expert=4" in capsys.readouterr().out


def test_times_are_compared_with_the_first_form():
    results = [Result("a", 0.25, 2048, 0.0, {}, 0.0), Result("b", 0.5, 1024, 3.0, {"all-to-all": 4}, 0.125)]
    lines = format_table(results, 10, {"data": 1}).splitlines()
    assert lines[2].split() == ["a", "250.0", "ms", "x1.00", "2.0", "KiB", "0", "B", "0.0", "%", "none"]
    assert "x2.00" in lines[3] and "12.5 %" in lines[3] and lines[3].endswith("4 all-to-all")


def test_the_command_line_knows_it_and_numbers_have_a_range():
    assert cli.parse(["bench", "moe", "--gin_file=bench_moe"]).subject == "moe"
    with pytest.raises(UserError, match="bench.moe.measure.rounds must be at least 1, not 0"):
        moe.measure(**arguments("bench.moe.measure.rounds=0"))
