"""`meshway plan` of a recipe that trains: what its figures have to do with each other, and what it refuses."""

import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.planning import aot
from meshway.framework.planning.communication import GRADIENTS, WEIGHTS, Setting
from meshway.framework.planning.products import Product, Uses, Value, Weight
from meshway.framework.planning.search import frontier
from meshway.framework.planning.step_cost import Traffic, Wires
from meshway.framework.planning.topology import topology
from meshway.framework.planning.train_plan import step_cost, traffic_of
from meshway.launch import cli, plan_page, plan_variants, train_plan

LENGTHS = "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 64}"
TINY = (
    "plan",
    "--gin_file=models/t5_1_1/tiny.gin",
    "--gin_file=optimizers/adamw.gin",
    LENGTHS,
    "--gin.BATCH_SIZE=32",
    "--gin.LAYOUT=fsdp_model",
    "--gin.DTYPE=bfloat16",
)


def traced(*words: str) -> dict:
    invocation = cli.parse([*TINY, *words])
    assert invocation is not None
    return train_plan.as_json(train_plan.planner_of(invocation).traced())


def test_a_traced_plan_adds_up() -> None:
    """Two slices of 16 chips: the state of AdamW is two of the parameters and a count, and what goes over the network
    is what the axis across slices sums."""
    found = traced(
        "--topology=v5e:4x4x2slices",
        "--gin.LAYOUT=replica_fsdp_model",
        "--gin.mesh.MeshShape.dcn={'replica': 2}",
    )
    memory = found["memory"]
    kept = ("parameters", "optimizer state", "batch", "padding of these", "gradients", "activations and temporaries")
    assert memory["total"] == sum(memory[name] for name in kept) and memory["fits"]
    assert memory["gradients"] == memory["parameters"] > found["num_params"] * 4 / 32
    assert 0 <= memory["optimizer state"] - 2 * memory["parameters"] < 64
    assert found["topology"]["devices"] == math.prod(found["mesh"].values()) == 32
    assert found["flops"]["hardware"] == pytest.approx(found["flops"]["model"], rel=0.01)
    assert found["flops"]["model"] > found["flops"]["parameters"] > 0
    assert found["flops"]["tokens"] == 32 * (64 + 64)
    time = found["time"]["closed_forms"]
    assert (
        time["dcn"] > 0
        and time["least"] < time["most"]
        and time[time["bound"]] == max(time[name] for name in ("compute", "memory", "ici", "dcn", "latency"))
    )


def test_remat_and_microbatches_move_what_they_should() -> None:
    plain, full, micro = (
        traced("--topology=v5p:2x2x2", "--gin.VOCAB_SIZE=256", *words)
        for words in ((), ("--gin.REMAT=full",), ("--gin.NUM_MICROBATCHES=4",))
    )
    for other in (full, micro):
        assert other["memory"]["activations and temporaries"] < plain["memory"]["activations and temporaries"]
        assert other["flops"]["model"] == plain["flops"]["model"]
    assert full["flops"]["hardware"] == pytest.approx(4 / 3 * full["flops"]["model"], rel=0.15)
    assert micro["time"]["closed_forms"]["ici"] > plain["time"]["closed_forms"]["ici"]


def test_stages_hold_alike_and_would_not_alone() -> None:
    """Four stages of a layer each, eight microbatches: of eleven time steps three are idle. A quarter of each table is
    on every stage, of which the first needs that of tokens, the last that of logits."""
    found = traced(
        "--topology=v5p:2x2x2",
        "--gin.LAYOUT=stage",
        "--gin.mesh.MeshShape.ici={'stage': 4, 'data': 2}",
        "--gin.NUM_ENCODER_LAYERS=4",
        "--gin.NUM_DECODER_LAYERS=4",
    )
    stages, memory, flops = found["stages"], found["memory"], found["flops"]
    assert flops["parameters"] < flops["model"] < flops["hardware"]  # the last with idle stages
    assert [each["number"] for each in stages] == [0, 1, 2, 3]
    held = memory["total"] - memory["padding of these"]
    assert {round(each["here"]) for each in stages} == {held}
    assert all(each["idle"] == each["activations"] * 3 / 11 for each in stages)
    first, second, third, last = (each["ends"] for each in stages)
    table = 4 * 4 * 32128 * 64  # state of AdamW and gradient
    assert second == third == 0 and table < first < 1.01 * table and table < last < 1.01 * table
    assert all(each["waste"] == max(0, each["here"] - each["alone"]) for each in stages)
    assert stages[1]["waste"] > stages[0]["waste"]


def test_wires_have_the_links_of_the_sides_that_an_axis_runs_along() -> None:
    """An axis of 16 along two sides of 4 that wrap around: four links; within a side cut in two, one."""
    where = topology("v4:4x4x4")
    chip = where.chip
    for sizes, axis, links in (({"a": 16, "b": 4}, "a", 4), ({"a": 16, "b": 4}, "b", 2), ({"a": 32, "b": 2}, "b", 1)):
        mesh = MeshShape(ici=sizes).build(aot.described_devices(where))
        ici, dcn, latency = Wires(mesh, where).seconds([Traffic((axis,), "all-gather", 9e9, 0)])
        assert (ici, dcn, latency) == (pytest.approx(9e9 / links / chip.link_bandwidth), 0, 0)


def test_described_devices_tile_as_real_ones() -> None:
    where = topology("tpu7x:2x2x4x2slices")
    made = aot.described_devices(where)
    assert len(made) == where.num_devices == 64 and len(set(made)) == 64
    mesh = MeshShape(ici={"fsdp": 32}, dcn={"data": 2}).build(made)
    assert {each.slice_index for each in mesh.devices[0]} == {0}
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    assert sharding.shard_shape((64, 3)) == (2, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--topology=v5q:4x4",), "no accelerator is called 'v5q'; did you mean 'v5p'"),
        (("--topology=h100:8x2slices",), "slices are of TPUs"),
        (("--topology=v4:2x2x2", "--batch=8"), "--batch of inference"),
        (
            ("--topology=v4:2x2x2", "--analytic", "--gin.mesh.MeshShape.ici={'fsdp': 3, 'model': -1}"),
            "needs a multiple of 3 devices, and there are 8",
        ),
        (("--topology=v4:2x2x2x2slices", "--phase=decode"), "inference is planned for one slice"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str) -> None:
    assert cli.main([*TINY, *words]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else real(name, *rest)
    )
    assert cli.main([*TINY, "--topology=v4:2x2x1"]) == 2
    assert "pip install 'meshway[plan]'; or add --analytic" in capsys.readouterr().err


def test_the_time_of_a_product_is_counted_by_hand() -> None:
    """Rows [batch=8, 16] over data=2, times a bfloat16 weight [16, 32] sharded by fsdp=2, in three layers."""
    weight = Weight("w", (16, 32), jnp.bfloat16, ("embed", "mlp"), ((), ("fsdp",)))
    value, output = Value((8, 16), jnp.bfloat16, 3), Value((8, 32), jnp.bfloat16, 3)
    uses = Uses([Product(weight, value, output, (0,), (), (1,), 3)], [])
    setting = Setting({"data": 2, "fsdp": 2}, frozenset({"data", "fsdp"}), [weight], {}, uses)
    where = topology("v5e:2x2")
    mesh = MeshShape(ici={"data": 2, "fsdp": 2}).build(aot.described_devices(where))
    traffic = traffic_of(setting, microbatches=2, recomputed=1.0)
    cost = step_cost(setting, traffic, mesh, where, 1e15, state=1000.0, microbatches=2, recomputed=1.0)
    assert cost.compute == pytest.approx(1e15 / (4 * where.chip.bfloat16))
    # Four passes, one of them remat's: each microbatch reads the weight, gathered, and a device has rows of a quarter.
    moved = 4 * (2 * 16 * 32 * 2 + 3 * (8 * 16 + 8 * 32) * 2 / 4) + 2 * 1000
    assert cost.memory == pytest.approx(moved / where.chip.memory_bandwidth)
    # Gathered twice, and its gradient scattered once, in each microbatch: half of it each time, in bfloat16.
    sent = {each.what: each.sent for each in traffic if each.axes == ("fsdp",)}
    assert sent[WEIGHTS] == 2 * 2 * 16 * 32 * 2 / 2 and sent[GRADIENTS] == 2 * 16 * 32 * 2 / 2


@pytest.mark.slow
def test_the_compiler_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    """On arguments, but for what chips pad; the parts add up to its total. And a search offers what it confirmed."""
    pytest.importorskip("libtpu")
    assert cli.main([*TINY, "--topology=v5e:2x4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = dict(found["memory"])
    total, capacity, fits = memory.pop("total"), memory.pop("capacity"), memory.pop("fits")
    assert total == sum(memory.values()) < capacity and fits
    assert memory["padding of these"] >= 0 and memory["code"] > 0
    kinds = {each["what"] for each in found["sent_as_compiled"]}
    assert kinds & {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["compile_seconds"] > 0


@pytest.mark.slow
def test_a_search_finds_what_fits_where_the_recipe_does_not() -> None:
    """A batch of 262,144 rows on two chips: without remat and microbatches its activations are too large."""
    invocation = cli.parse([*TINY, "--topology=v5e:1x2", "--gin.BATCH_SIZE=262144", "--gin.VOCAB_SIZE=256"])
    assert invocation is not None
    planner = train_plan.planner_of(invocation)
    given = planner.traced()
    found = plan_variants.fit(planner, given, compiles=False)
    assert not given.fits and found.plans and found.lost
    assert all(each.fits and each.bytes < given.capacity for _, each in found.plans)
    text = plan_page.page(given, [], found)
    assert "activations and temporaries" in text and f"of {len(found.tried):,} ways to train" in text
    assert text.count("<circle") == sum(each.cost is not None for each in found.tried) and "<polyline" in text
    assert all(each.candidate.words in text for each in frontier(found.tried))
