"""`meshway plan` of a recipe that trains: what its figures have to do with each other, and what it refuses."""

import contextlib
import importlib.util
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from meshway.framework.errors import UserError
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.framework.planning import aot
from meshway.framework.planning.communication import GRADIENTS, WEIGHTS, Setting
from meshway.framework.planning.products import Product, Uses, Value, Weight
from meshway.framework.planning.search import frontier
from meshway.framework.planning.step_cost import Traffic, Wires
from meshway.framework.planning.topology import topology
from meshway.framework.planning.train_plan import step_cost, traffic_of, with_compiled
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


def test_dies_of_a_chip_exchange_over_their_own_link() -> None:
    """One axis along the two dies of each TPU7x; one along both and a ring waits for the ring."""
    where = topology("tpu7x:4x4x4")
    mesh = MeshShape(ici={"chips": 64, "dies": 2}).build(aot.described_devices(where))
    assert {each.core_on_chip for each in mesh.devices[0]} == {0, 1} and len(
        {each.coords for each in mesh.devices[0]}
    ) == 1
    wires = Wires(mesh, where)
    for axes, bandwidth in ((("dies",), 600e9), (("chips",), 6 * 50e9), (("chips", "dies"), 6 * 50e9)):
        assert wires.seconds([Traffic(axes, "all-gather", 6e11, 0)])[0] == pytest.approx(6e11 / bandwidth)


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
        (("--topology=v4:2x2x2x2slices", "--analytic"), "lies on 2 slices: say which of its axes runs across them"),
        (
            ("--topology=v4:2x2x2", "--analytic", "--gin.mesh.MeshShape.ici={'fsdp': 2, 'model': 2}"),
            "leaves 4 of the 8 devices of v4:2x2x2 idle: make the product of MeshShape's sizes 8",
        ),
        (("--topology=v4:2x2x2", "--analytic", "--html=no_such_folder/plan.html"), "there is no folder no_such_folder"),
        (("--topology=v4:2x2x2", "--analytic", "--gin.BATCH_SIZE=6"), "'batch' of size 6 is not divisible by fsdp=4"),
        (
            ("--topology=v4:2x2x2", "--analytic", "--gin.mesh.MeshShape.ici={'fsdp': 3, 'model': 1}"),
            "a mesh of 3x1 does not tile these 3 TPU v4 devices (they are no block of the torus)",
        ),
        (
            ("--topology=v4:2x2x2", "--analytic", "--gin.ATTENTION_KERNEL=@auto.SplashAttention()"),
            "SplashAttention: it supports no biases",
        ),
        (("--topology=cpu:64",), "cpu:64: this process has begun with 8 simulated devices"),
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


def test_without_the_plugin_for_gpus_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "_is_plugged", lambda name: False)
    assert cli.main([*TINY, "--topology=h100:8"]) == 2
    assert "pip install 'meshway[plan-gpu]'; or add --analytic" in capsys.readouterr().err


def doubled(partitioner: Partitioner) -> jax.stages.Compiled:
    """A product whose sum runs over `model`, compiled."""
    x, kernel = (jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in range(2))
    rows, columns = (
        jax.NamedSharding(partitioner.mesh, PartitionSpec(*spec)) for spec in (("data", "model"), ("model",))
    )
    out = jax.NamedSharding(partitioner.mesh, PartitionSpec("data"))
    return partitioner.compile(jnp.matmul, x, kernel, in_shardings=(rows, columns), out_shardings=out)


def test_a_program_is_compiled_for_simulated_devices() -> None:
    """Sizes and collectives are known by hand: [64, 64] over data=2 and model=4, times [64, 64] over model."""
    where = topology("cpu:8")
    layout = Layout(MeshShape(ici={"data": 2, "model": 4}), [("*", None)], [("*", None)])
    partitioner = Partitioner(layout, aot.compiled_for(where))
    (found,) = aot.compile_programs(partitioner, lambda: doubled(partitioner))
    assert found.arguments == 4 * (32 * 16 + 16 * 64) and found.outputs == 4 * 32 * 64
    (row,) = found.collectives
    assert (row.kind, row.axes, row.array.shape) == ("all-reduce", ("model",), (32, 64))
    assert not found.unread and found.seconds > 0


def test_where_a_compiled_step_cannot_be_read_closed_forms_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """jaxlib reads back only the HLO of its own version: then memory is the compiler's, and the plan says so."""

    def unreadable(self: jax.stages.Compiled) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    layout = Layout(MeshShape(ici={"data": 2, "model": 4}), [("*", None)], [("*", None)])
    partitioner = Partitioner(layout, jax.devices())
    (found,) = aot.compile_programs(partitioner, lambda: doubled(partitioner))
    assert (
        found.collectives == ()
        and found.unread == "INTERNAL: async-update instruction should have 1 operands but sees 3"
    )
    invocation = cli.parse([*TINY, "--topology=v5e:2x4"])
    assert invocation is not None
    planner = train_plan.planner_of(invocation)
    plain = planner.traced()
    plan = with_compiled(plain, planner.program(), found)
    assert plan.bytes == found.total and plan.best_cost == plain.cost and plan.compiled_traffic == ()
    text = train_plan.format_plan(plan)
    assert f"what it sends is by closed forms: the compiled step cannot be read ({found.unread})" in text
    assert all(each.what in text for each in plain.traffic)


def test_what_a_compiler_prints_is_read_where_jaxlib_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of libtpu, which is newer than jaxlib: here XLA:CPU prints."""
    monkeypatch.setattr(aot, "_PRINTING", ("cpu",))
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: pytest.fail("read back"))
    layout = Layout(MeshShape(ici={"data": 2, "model": 4}), [("*", None)], [("*", None)])
    partitioner = Partitioner(layout, jax.devices())
    with jax.enable_compilation_cache(False) if hasattr(jax, "enable_compilation_cache") else contextlib.nullcontext():
        (found,) = aot.compile_programs(partitioner, lambda: doubled(partitioner))
    assert [(row.kind, row.axes) for row in found.collectives] == [("all-reduce", ("model",))]


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: ... HLO temporaries (18.17G) exceeds available HBM (15.75G)",
            aot.TooLarge,
            "18.17G",
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation would exceed memory :: #allocation3 [space=vmem, scoped] :: splash_fwd.1",
            UserError,
            "at the kernel splash_fwd.1, whose blocks",
        ),
        ("INVALID_ARGUMENT: unknown flag xla_tpu_nothing", UserError, "its option xla_tpu_nothing"),
        (
            'UNIMPLEMENTED: AllReduce fusion with 3 sized replica_groups\nop_name="jit(step)/mlp/dot_general"',
            UserError,
            "at jit(step)/mlp/dot_general: UNIMPLEMENTED: AllReduce fusion with 3 sized replica_groups; try a layout",
        ),
    ],
)
def test_a_compilers_refusal_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch, refusal: str, kind: type[UserError], words: str
) -> None:
    def refuses(*_: object, **__: object) -> jax.stages.Compiled:
        raise jax.errors.JaxRuntimeError(refusal)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuses)
    layout = Layout(MeshShape(ici={"data": 2, "model": 4}), [("*", None)], [("*", None)])
    partitioner = Partitioner(layout, jax.devices())
    with pytest.raises(kind, match=re.escape(words)):
        aot.compile_programs(partitioner, lambda: doubled(partitioner))


@pytest.mark.slow
def test_libtpu_s_refusal_of_a_kernel_names_it_and_is_no_matter_of_the_device_s_memory() -> None:
    """One block of 256 MiB is twice a core's vector memory; the eigenvalues of a matrix are not to be had on a TPU."""
    pytest.importorskip("libtpu")
    partitioner = Partitioner(
        Layout(MeshShape(ici={"data": 1}), [("*", None)], [("*", None)]), aot.compiled_for(topology("v5e:1x1"))
    )

    def double(x: jax.Array) -> jax.Array:
        def kernel(given: Any, made: Any) -> None:
            made[...] = given[...] * 2

        return pl.pallas_call(kernel, out_shape=x)(x)

    def compiles(function: Any, size: int) -> Any:
        x = jax.ShapeDtypeStruct((size, size), jnp.float32)
        return lambda: partitioner.compile(
            function, x, in_shardings=(partitioner.replicated,), out_shardings=partitioner.replicated
        )

    with pytest.raises(UserError, match="refuses the step at the kernel double.*SplashAttention.block") as found:
        aot.compile_programs(partitioner, compiles(double, 8192))
    assert not isinstance(found.value, aot.TooLarge)
    with pytest.raises(UserError, match="the step cannot be lowered: .*'eig'"):
        aot.compile_programs(partitioner, compiles(lambda x: jnp.linalg.eigvals(x).real, 8))


def test_options_of_what_a_recipe_lacks_are_not_offered() -> None:
    """AdamW's and the objective's are, by their own names; a decoder's objective is none of T5's."""
    for recipe, objective in (("t5_1_1", "EncoderDecoder"), ("llama", "DecoderOnly")):
        invocation = cli.parse([TINY[0], f"--gin_file=models/{recipe}/tiny.gin", *TINY[2:], "--topology=v5e:2x4"])
        assert invocation is not None
        planner = train_plan.planner_of(invocation)
        plan = SimpleNamespace(num_microbatches=1, batch_size=32, where=planner.where)
        options = [each for bindings in plan_variants._options(planner.recipe(), plan) for each in bindings]
        assert "optimizers.adamw.mu_dtype='bfloat16'" in options
        assert [each for each in options if "num_loss_chunks" in each] == [f"objectives.{objective}.num_loss_chunks=8"]


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
def test_where_nothing_fits_a_search_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gin_file=models/llama/3_8b.gin", "--gin_file=optimizers/adamw.gin", LENGTHS, "--gin.BATCH_SIZE=64")
    assert cli.main([TINY[0], *words, "--gin.LAYOUT=fsdp", "--topology=v5e:2x2", "--analytic", "--fit"]) == 2
    message = capsys.readouterr().err
    assert message.count("reading the recipe ") == 1, "each of the ways tried has one of its own"
    assert "no way to train fits v5e:2x2" in message and "; --topology=v5e:4x4 would hold it, by" in message


@pytest.mark.slow
def test_a_search_finds_meshes_that_the_batch_divides_over(capsys: pytest.CaptureFixture[str]) -> None:
    """6 rows are no multiple of fsdp=8, the recipe's; without --fit that is an error as ever."""
    six = (*TINY, "--gin.BATCH_SIZE=6", "--gin.LAYOUT=fsdp", "--topology=v5e:2x4", "--analytic", "--json")
    assert cli.main(list(six)) == 2
    assert "set BATCH_SIZE to a multiple of 8" in capsys.readouterr().err
    assert cli.main([*six, "--fit"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "BATCH_SIZE" in found["given"] and "fsdp=2, model=4" in found["planned_instead"]
    assert found["fit"]["plans"] and all("'fsdp': 8" not in str(each) for each in found["fit"]["plans"])


@pytest.mark.slow
def test_a_batch_that_divides_over_no_mesh_is_refused_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are cut across slices in every layout for several."""
    odd = ("--gin.BATCH_SIZE=7", "--gin.LAYOUT=replica_fsdp", "--topology=v5e:2x2x2slices", "--analytic", "--fit")
    assert cli.main([*TINY, *odd]) == 2
    message = capsys.readouterr().err
    assert "BATCH_SIZE=7 divides over none" in message and "the nearest that does is 6 or 8" in message


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


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["cpu:8", "h100:16"])
def test_a_step_compiled_for_simulated_devices_and_for_gpus(topology: str, capsys: pytest.CaptureFixture[str]) -> None:
    if topology.startswith("h100"):
        pytest.importorskip("jax_plugins.xla_cuda13")
    small = ("--gin.VOCAB_SIZE=256", "--gin.NUM_ENCODER_LAYERS=1", "--gin.NUM_DECODER_LAYERS=1")
    assert cli.main([*TINY, *small, f"--topology={topology}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    memory = dict(found["memory"])
    total, capacity, fits = memory.pop("total"), memory.pop("capacity"), memory.pop("fits")
    assert total == sum(memory.values()) < capacity and fits
    assert 0 <= memory["padding of these"] < 1024  # neither pads arrays: state and batch are those of the closed forms
    sent = {(each["what"], tuple(each["axes"])) for each in found["sent_as_compiled"]}
    assert {("all-gather", ("fsdp",)), ("all-reduce", ("model",))} <= sent
    assert all(value > 0 for name, value in found["time"]["compiled"].items() if name in ("compute", "memory", "ici"))
