"""The partitioner refuses what flax and T5X let pass silently."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from meshway.framework.axes import constrain, mesh_axes, sharded_by
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.framework.partitioning.rules import Rules

SIZES = {"data": 2, "model": 4}
TABLE = [
    ("embed", "data"),
    ("mlp", "model"),
    ("heads", "model"),
    ("wide", ("data", "model")),
    ("length", None),
]


def resolve(names, shape, table=TABLE):
    return Rules(table, SIZES, "Layout.parameters").resolve(names, shape, "parameter a/b")


def test_rules_give_specs_and_say_which_fired():
    found = resolve(("embed", "mlp"), (4, 8))
    assert found.spec == PartitionSpec("data", "model")
    assert found.rules == ("embed->data", "mlp->model")
    assert resolve(("wide", "length", None), (8, 3, 5)).spec == PartitionSpec(("data", "model"), None, None)


@pytest.mark.parametrize(
    "names, shape, words",
    [
        (("emebd", "mlp"), (4, 8), ["parameter a/b", "'emebd'", "did you mean 'embed'", "('emebd', None)"]),
        (("heads", "mlp"), (4, 8), ["both 'heads' and 'mlp'", "'model'"]),
        (("embed", "mlp"), (4, 6), ["'mlp' of size 6", "model=4"]),
        (("wide", "embed"), (8, 4), ["both 'wide' and 'embed'", "'data'"]),
    ],
)
def test_refusals_name_the_tensor_and_the_nearest_right_thing(names, shape, words):
    with pytest.raises(UserError) as error:
        resolve(names, shape)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    "table, word",
    [
        ([("embed", "modle")], "did you mean 'model'"),
        ([("embed", "data"), ("embed", "model")], "two rules"),
        ([("embed", 5)], "5 is neither a mesh axis, nor several, nor None"),
        (["embed"], "a rule is"),
    ],
)
def test_bad_tables_are_refused(table, word):
    with pytest.raises(UserError, match=word):
        Rules(table, SIZES, "Layout.parameters")


def test_a_rule_that_matches_nothing_is_told():
    rules = Rules([*TABLE, ("emebd", None), ("vocab", "model"), ("expert", None)], SIZES, "Layout.parameters")
    told = " ".join(rules.unmatched(rules.resolve(("embed", "mlp"), (4, 8), "x").fired))
    assert "'emebd'" in told and "did you mean 'embed'" in told  # outside the vocabulary: misspelt
    assert "'vocab'" in told  # would cut something, and cuts nothing
    assert "'expert'" not in told  # replication of a known name that this model lacks
    assert "'embed'," not in told


def test_the_other_names_are_replicated_where_that_is_written_down():
    rules = Rules([("embed", "data"), ("*", None)], SIZES, "Layout.parameters")
    found = rules.resolve(("embed", "mlp"), (4, 8), "x")
    assert found.spec == PartitionSpec("data", None)
    assert rules.axes_of("heads") == () and rules.unmatched(found.fired) == []
    with pytest.raises(UserError, match="'haeds', which no rule of Layout.parameters maps.*did you mean 'heads'"):
        rules.resolve(("haeds",), (4,), "x")
    with pytest.raises(UserError, match=r"Layout.parameters: \('\*', 'data'\): the other names can only be replicated"):
        Rules([("*", "data")], SIZES, "Layout.parameters")
    rules = Rules([("vocab", "model"), ("*", None)], SIZES, "Layout.parameters")
    assert "'vocab'" in " ".join(rules.unmatched(rules.resolve(("embed",), (4,), "x").fired))


def test_mesh_sizes():
    assert dict(MeshShape({"data": -1, "model": 2}).build().shape) == {"data": 4, "model": 2}
    assert MeshShape({"data": 2}).build().size == 2
    assert MeshShape({"data": 2, "model": 2}, {"replica": 1}).names == ("replica", "data", "model")


@pytest.mark.parametrize(
    "shape, word",
    [
        (MeshShape({"data": 16}), "needs 16 devices, and there are 8"),
        (MeshShape({"data": -1, "model": 3}), "multiple of 3"),
        (MeshShape({"data": -1, "model": -1}), "may be -1"),
        (MeshShape({"data": 0}), "positive"),
        (MeshShape({"data": 8}, {"replica": 2}), "needs 16 devices, and there are 8"),
    ],
)
def test_impossible_meshes_are_refused(shape, word):
    with pytest.raises(UserError, match=word):
        shape.build()


def test_simulated_devices_play_slices():
    mesh = MeshShape({"fsdp": 2, "model": 2}, {"replica": 2}).build()
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "model": 2}
    np.testing.assert_array_equal(mesh.device_ids.reshape(2, 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    mesh = MeshShape({"data": 2, "model": 2}, {"data": 2}).build()  # the slow part of an axis is outermost
    np.testing.assert_array_equal(mesh.device_ids, [[0, 1], [2, 3], [4, 5], [6, 7]])


ALTERNATIVES = [
    ("heads", "model"),
    ("mlp", "data + model"),
    ("length", "model | data | None"),
    ("embed", "model | None"),
]


@pytest.mark.parametrize(
    "names, shape, spec",
    [
        (("length", "heads"), (8, 8), ("data", "model")),  # heads stand first in the table
        (("heads", "length"), (8, 8), ("model", "data")),
        (("length", "embed"), (8, 8), ("model", None)),
        (("embed",), (6,), (None,)),  # model=4 does not divide it
        (("length",), (6,), ("data",)),
        (("length", "mlp"), (8, 8), (None, ("data", "model"))),
        (("length", "length"), (8, 8), ("model", "data")),
    ],
)
def test_alternatives_take_the_first_that_is_free_and_fits(names, shape, spec):
    rules = Rules(ALTERNATIVES, {"data": 2, "model": 4}, "Layout.activations")
    assert tuple(rules.resolve(names, shape, "x").spec) == spec


def test_the_last_alternative_is_complained_about():
    rules = Rules([("heads", "model"), ("length", "model | data")], {"data": 2, "model": 4}, "Layout.activations")
    with pytest.raises(UserError, match="'length' of size 7 is not divisible by data=2"):
        rules.resolve(("length", "heads"), (7, 8), "x")
    with pytest.raises(UserError, match="names mesh axis 'modle'.*did you mean 'model'"):
        Rules([("heads", "modle | None")], {"data": 2, "model": 4}, "Layout.activations")


def test_a_single_position_is_not_cut():
    table, sizes = [("batch", "data"), ("length", "model")], {"data": 2, "model": 4}
    rules = Rules(table, sizes, "Layout.activations", whole_when_single=("length",))
    assert tuple(rules.resolve(("batch", "length"), (2, 1), "x").spec) == ("data", None)
    with pytest.raises(UserError, match="'batch' of size 1"):
        rules.resolve(("batch", "length"), (1, 4), "x")


def test_compiler_options_reach_the_compiler_of_their_platform():
    def compile_with(options):
        made = Partitioner(Layout(MeshShape({"data": 2}), [], [], compiler_options=options))
        return made.compile(lambda x: x, 1.0, in_shardings=made.replicated, out_shardings=made.replicated)

    compile_with({"cpu": {"xla_cpu_enable_fast_math": False}, "tpu": {"xla_unheard_of": 1}})
    with pytest.raises(UserError, match="Layout.compiler_options: .*xla_unheard_of"):
        compile_with({"cpu": {"xla_unheard_of": 1}})
    with pytest.raises(UserError, match="platform 'cuda', not one of"):
        compile_with({"cuda": {}})


def partitioner(**activations):
    rules = {"batch": "data", "embed": "model"} | activations
    return Partitioner(Layout(MeshShape({"data": 2, "model": 4}), [], list(rules.items())))


def test_constraints_are_emitted_inside_and_absent_outside():
    def f(x):
        return constrain(x, ("batch", "embed")) * 2

    x = np.ones((4, 8), np.float32)
    assert "sharding_constraint" not in str(jax.make_jaxpr(f)(x))
    with partitioner().activate():
        assert str(jax.make_jaxpr(f)(x)).count("sharding_constraint") == 1


def test_a_mesh_without_a_layout_is_refused():
    with jax.set_mesh(partitioner().mesh), pytest.raises(ValueError, match="no layout"):
        constrain(np.ones((4, 8)), ("batch", "embed"))


def test_constrain_refuses_a_wrong_rank_and_an_unknown_name():
    with pytest.raises(ValueError, match="2 axis names"):
        constrain(np.ones(4), ("batch", "embed"))
    with partitioner().activate(), pytest.raises(UserError, match="'tokens'"):
        constrain(np.ones((4, 8)), ("batch", "tokens"))


def test_batches_are_placed_and_indivisible_ones_refused():
    spec = {"tokens": ArraySpec((4, 6), np.dtype("int32"), ("batch", None))}
    part = partitioner()
    shardings = part.batch_shardings(spec)
    placed = part.put_batch({"tokens": np.arange(24, dtype=np.int32).reshape(4, 6)}, shardings, 4)
    assert placed["tokens"].addressable_shards[0].data.shape == (2, 6)
    assert part.process_rows(4) == slice(0, 4)
    with pytest.raises(UserError, match="set BATCH_SIZE to a multiple of 2"):
        part.process_rows(5)


def test_what_a_model_asks_for_is_returned_and_kept_nowhere_else():
    part, x = partitioner(), jax.ShapeDtypeStruct((4, 8), np.float32)
    with part.activate() as first:
        jax.eval_shape(lambda x: constrain(constrain(x, ("batch", None)), ("batch", "embed")), x)
        assert mesh_axes("embed") == ("model",)
    with part.activate() as second:
        assert mesh_axes("batch") == ("data",)
    assert first.names == {"batch", "embed"} and second.names == {"batch"}
    assert {tuple(spec) for _, _, spec in first.constrained} == {("data", "model"), ("data", None)}
    assert not second.constrained
    part.check_rules_matched({"batch": first.names})
    with pytest.raises(UserError, match=r"match no axis of this model: Layout.activations: \('embed', 'model'"):
        part.check_rules_matched({"batch": second.names})
    prompts = Layout(MeshShape(ici={"data": 2}), [("*", None)], [("*", None)], prefill=[("bacth", "data"), ("*", None)])
    with pytest.raises(UserError, match=r"Layout.prefill: \('bacth', 'data'\); did you mean 'batch'"):
        Partitioner(prompts).check_rules_matched({"batch": {"batch"}})


def test_a_spec_is_read_dimension_by_dimension():
    spec = PartitionSpec("data", None, ("fsdp", "model"), PartitionSpec.UNCONSTRAINED)
    assert sharded_by(spec) == (("data",), (), ("fsdp", "model"), ())
    assert sharded_by(PartitionSpec("data"), 3) == (("data",), (), ())
    assert sharded_by(PartitionSpec()) == ()
