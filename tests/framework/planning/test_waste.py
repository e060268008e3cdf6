"""Warnings of what layouts waste: state and activations held many times, and resharding no rule asks for."""

import pytest
import tiny

from meshway.framework.partitioning.sharded_model import Row
from meshway.framework.planning.collectives import Collective
from meshway.framework.planning.communication import Setting
from meshway.framework.planning.hlo import Array
from meshway.framework.planning.products import Uses
from meshway.framework.planning.waste import activation_waste, resharding_waste, state_waste
from meshway.launch import inspection

MESH = {"data": 4, "model": 2}


def row(name: str, shape: tuple[int, ...], rules: str, parts: int = 1) -> Row:
    size = 4
    for length in shape:
        size *= length
    axes = tuple(rule.partition("->")[0] for rule in rules.split())
    return Row(name, axes, shape, "float32", "", size // parts, size, 8 // parts, rules)


def test_state_that_an_axis_could_cut_is_reported_once_an_axis_above_the_limit():
    rows = [
        row("params/wide", (64, 100), "embed->None mlp->model", 2),
        row("opt_state/mu", (64, 100), "embed->data mlp->model", 8),
        row("params/scale", (6,), "embed->None"),  # no axis of 4 divides it; one of 2 does, and it is small
        row("batch/tokens", (1024, 1024), "batch->None length->None"),
    ]
    (found,) = state_waste(rows, MESH, 0.1)
    assert (found.what, found.where) == ("replicated state", "mesh axis data=4")
    assert found.how_much.startswith("80 % of the state on a device (12.5 KiB)") and "params/wide" in found.how_much
    assert "'data'" in found.advice and "embed, mlp" in found.advice
    assert state_waste(rows, MESH, 0.81) == []
    assert {each.where for each in state_waste(rows, MESH, 0.001)} == {"mesh axis data=4", "mesh axis model=2"}


@pytest.mark.parametrize(
    "layout, expected",
    [("fsdp", []), ("model_1d", [("replicated activations", "mesh axis model=2")])],
)
def test_activations_that_are_the_same_along_an_axis_are_reported(layout, expected):
    program = tiny.program("lm", layout=layout)
    found = activation_waste(program.trace_loss(), 0.5)
    assert [(each.what, each.where) for each in found] == expected
    assert all("(batch, length, embed)" in each.how_much for each in found)


def test_an_axis_that_cuts_no_activation_is_idle():
    program = tiny.program("lm", "mesh.MeshShape.ici={'data': 4, 'spare': 2}", layout="data")
    (found,) = activation_waste(program.trace_loss(), 0.5)
    assert (found.what, found.where) == ("idle mesh axis", "mesh axis spare=2")
    assert found.how_much.startswith("100 %")


def collective(kind: str, axes: tuple[str, ...], origin: str, sources: set[str], elements: int = 1000) -> Collective:
    return Collective(kind, axes, 2, 1, Array("f32", (elements, 10)), origin, f"%{kind}.1", frozenset(sources))


def test_resharding_is_what_no_kernel_wrote_and_no_rule_asks_for():
    setting = Setting(MESH, frozenset({"data"}), [], {}, Uses(), stream=frozenset({"stream"}))
    both, weights = {"state.params", "batch"}, {"state.params"}
    fine = [
        collective("all-reduce", ("model",), "jit(f)/jvp()/dot_general", both, 20000),
        collective("all-to-all", ("data",), "jit(f)/jvp()/shard_map/all_to_all", both),
        collective("collective-permute", ("data",), "jit(f)/jvp()/shard_map/ppermute", both),
        collective("all-gather", ("stream",), "jit(f)/jvp()/dot_general", both),
        collective("all-gather", ("data",), "jit(f)/jvp()/dot_general", weights),
        collective("all-gather", ("data",), "jit(f)/jvp()/gather", {"batch"}),
    ]
    assert resharding_waste(setting, fine, 0.01) == []
    moved = collective("all-to-all", ("data",), "jit(f)/jvp()/gather", both)
    stray = collective("all-gather", ("model",), "jit(f)/jvp()/gather", weights)
    found = resharding_waste(setting, [*fine, moved, stray], 0.01)
    assert [(each.what, each.where) for each in found] == [
        ("resharded activations", "mesh data=4"),
        ("resharded weights", "mesh model=2"),
    ]
    assert "f32[1000,10] at jit(f)/jvp()/gather" in found[0].how_much
    assert resharding_waste(setting, [*fine, moved, stray], 0.5) == []


def test_inspect_warns_without_compiling_and_compiled_says_what_is_sent():
    program = tiny.program("lm", layout="model_1d")
    plain = inspection.layout(program)
    assert "warning: replicated state, mesh axis data=4" in plain and "sent by" not in plain
    assert "warning" not in inspection.layout(program, replicated_state=1.0, replicated_activations=1.0)
    compiled = inspection.layout(program, compile=True)
    assert "sent by the compiled step (data=4, model=2):" in compiled
    assert [line.split()[:2] for line in compiled.splitlines() if line.startswith("  model  activations")]
    assert compiled.endswith(plain.partition("warning:")[2])
