"""What a step keeps and leaves out where a recipe asks: averages of parameters, spikes, statistics of weights, batch
statistics; and batches of several sizes. Off, they change nothing."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import Descent, Quadratic, loaded, program

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.checkpoints.stored import StoredParams
from meshway.framework.errors import UserError
from meshway.framework.optimizers.optimizers import Optimizer, ParameterAverage
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.training.loop import SizedSteps
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import SpikeGuard, TrainState, TrainStep, WeightStatistics
from meshway.framework.trees import flatten

EMA = {"average": ParameterAverage(0.9, warmup=True, evaluate=True), "spikes": SpikeGuard(loss=3.0)}


def small(model=None, batch_size=8, transform=optax.adam, **options):
    """A program of two small tables, sharded over eight devices."""
    rules = [("codes", "fsdp"), ("*", None)]
    layout = Layout(MeshShape(ici={"fsdp": 8}), rules, [("batch", "fsdp"), ("codes", None), ("*", None)])
    model = model or loaded("models/bigram.py").Bigram(32, 16)
    return TrainProgram(model, Optimizer(transform, 0.1), layout, batch_size, {"targets": 8}, **options)


def trained(made, count, state=None, first=0):
    """Returns the state after `count` batches, which are numbered from `first`, and each step's metrics."""
    step, state, seen = made.compile_step(), made.init() if state is None else state, []
    for index in range(first, first + count):
        batch = {name: value % 32 for name, value in made.synthetic_batch(index).items()}
        state, metrics = step(state, made.shard_batch(batch))
        seen.append(metrics)
    return state, seen


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def test_without_options_a_state_and_its_checkpoint_have_no_more_parts(tmp_path):
    made = small()
    state = made.init()
    assert state.average == {} and state.spikes == {} and made.evaluated(state) is state.params
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, {}, {})
    checkpoints.wait()
    assert {name.split("/")[0] for name in checkpoints.recipe(1)["schema"]} == {
        "step", "params", "opt_state", "skipped", "skipped_in_a_row",
    }  # fmt: skip


@pytest.fixture(scope="module")
def averaged():
    """(program, parameters after each of four steps from the first, the last state) under fsdp."""
    made = small(**EMA)
    state = made.init()
    seen = [jax.device_get(state.params)]
    for index in range(4):
        state, _ = trained(made, 1, state, index)
        seen.append(jax.device_get(state.params))
    return made, seen, state


def test_an_average_follows_parameters_in_their_shards(averaged):
    made, seen, state = averaged
    expected = seen[0]
    for t, params in enumerate(seen[1:]):
        decay = min(0.9, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, p, decay=decay: decay * a + (1 - decay) * p, expected, params)
    found = flatten(jax.device_get(state.average))
    for path, value in flatten(expected).items():
        np.testing.assert_allclose(found[path], value, rtol=1e-5, atol=1e-7)
    equal(made.evaluated(state), state.average)
    where = flatten(made.state_shardings.average)
    assert where == flatten(made.state_shardings.params) and any("fsdp" in leaf.spec for leaf in where.values())
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(seen[-1]), strict=True))


def test_averages_are_saved_restored_exactly_and_read_alone(averaged, tmp_path):
    made, seen, state = averaged
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 4, {}, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(4, made.abstract_state)
    equal(restored, state)
    shapes = made.sharded.abstract_params
    equal(Checkpoints(tmp_path, read_only=True, averaged=True).load_params(4, shapes), state.average)
    equal(Checkpoints(tmp_path, read_only=True).load_params(4, shapes), state.params)
    run = tmp_path / "run" / "checkpoints"
    saved = Checkpoints(run)
    saved.save(state, 4, {}, {})
    saved.close()
    schema = checkpoints.recipe(4)["schema"]
    for averaged, expected in ((True, state.average), (False, state.params)):
        equal(Initial(str(run.parent), averaged=averaged).restore(made.init().params, made.axes), expected)
        stored = StoredParams(tmp_path / "4" / "state", schema, averages=checkpoints.averages(4) if averaged else ())
        equal({name: stored._read(name, ()) for name in stored.shapes}, expected)
    with pytest.raises(UserError, match="was saved with EMA_DECAY, and the recipe has none"):
        checkpoints.restore(4, small().abstract_state)
    checkpoints.save(dataclasses.replace(state, average={}, spikes={}), 5, {}, {})
    checkpoints.wait()
    with pytest.raises(UserError, match="has no averaged parameters"):
        Checkpoints(tmp_path, read_only=True, averaged=True).load_params(5, shapes)
    with pytest.raises(UserError, match="was saved without EMA_DECAY"):
        checkpoints.restore(5, made.abstract_state)


def test_an_average_begins_at_the_parameters_that_a_run_starts_from(averaged):
    made, seen, _ = averaged
    params = jax.device_put(seen[-1], made.state_shardings.params)
    state = made.with_average(dataclasses.replace(made.init(), params=params))
    equal(state.average, seen[-1])
    trained(made, 1, state)  # nothing is donated twice


def test_microbatches_of_another_size_of_batch_divide_over_the_mesh():
    made = small(batch_size=32, num_microbatches=2)
    found = {size: made.of_size(size) for size in (16, 40, 48, 56, 72, 1048)}
    counts = {size: each.num_microbatches for size, each in found.items()}
    assert counts == {16: 1, 40: 5, 48: 3, 56: 7, 72: 9, 1048: 131}, "rows of each: 16 or 8, over 8 devices"
    for each in found.values():
        each.trace_loss()
    with pytest.raises(UserError, match="BATCH_SIZE_SCHEDULE: batch feature .* set BATCH_SIZE to a multiple of 8"):
        made.of_size(20)


def test_the_flops_of_a_step_are_those_of_the_batch_that_it_had():
    """Where batches are left out, batch and step have not the same number; that of step 4 has 32 rows here."""

    def of_size(size):
        return SimpleNamespace(flops=float(size), compile_step=lambda: lambda state, batch: (state, {}))

    steps = SizedSteps(SimpleNamespace(batch_size=16, of_size=of_size), [(6, 32)], 2, 8, [(3, 4)])
    for rows in (16, 32, 32, 16):
        steps(None, {"x": np.zeros((rows, 2))})
    assert [steps.flops(step) for step in (3, 4, 5, 6)] == [16, 32, 32, 16]


def test_only_trained_parameters_have_an_average():
    axes, shapes = {"a": ("embed",), "b": ("embed",)}, dict.fromkeys("ab", jax.ShapeDtypeStruct((2,), jnp.bfloat16))
    bound = Optimizer(optax.sgd, 0.1, frozen=["b"]).bind(axes, shapes)
    average = ParameterAverage(0.5).init({"a": jnp.ones(2, jnp.bfloat16)})
    params = {"a": jnp.zeros(2, jnp.bfloat16), "b": jnp.zeros(2)}
    found = ParameterAverage(0.5).update(average, params, jnp.zeros((), jnp.int32))
    assert bound.trainable == {"a"} and set(found) == {"a"} and found["a"].dtype == jnp.float32
    np.testing.assert_array_equal(found["a"], 0.5)
    with pytest.raises(UserError, match=r"decay = 1.0: it must be at least 0 and below 1"):
        ParameterAverage(1.0)


def run_guarded(guard, scales, state=None):
    """Trains on rows of ones times each scale, from parameters that do not move far; returns (state, metrics)."""
    zero, seen = jnp.zeros((), jnp.int32), []
    step = jax.jit(TrainStep(Quadratic(), Slowly(), seed=0, spikes=guard))
    state = state or TrainState(zero, {"w": jnp.ones(2)}, (), zero, zero, {}, guard.init())
    for scale in scales:
        state, metrics = step(state, {"rows": jnp.full((4, 2), scale)})
        seen.append({name: float(total) / max(float(weight), 1e-9) for name, (total, weight) in metrics.items()})
    return state, seen


class Slowly(Descent):
    def update(self, gradients, state, params):
        return super().update(jax.tree.map(lambda g: 1e-3 * g, gradients), state, params)


def test_the_update_of_a_spike_is_left_out_and_counted():
    guard = SpikeGuard(loss=2.0, decay=0.5, warmup_steps=2)
    state, seen = run_guarded(guard, [1.0, 3.0, 1.0, 4.0, 1.0])
    assert [each["spikes"] for each in seen] == [0, 0, 0, 1, 0], "a spike in the first steps is none"
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (1, 0, 5)
    # Means are of what was done before: losses of 2 * scale**2 at w = 1, weighed by 1/2, 1/4, 1/8 from the last.
    assert seen[0]["loss_mean"] == 0 and seen[2]["loss_mean"] == pytest.approx((18 / 2 + 2 / 4) / 0.75, rel=0.05)
    assert seen[4]["loss_mean"] == seen[3]["loss_mean"], "what was left out is not in the mean"
    before, _ = run_guarded(guard, [1.0, 3.0, 1.0])
    at, _ = run_guarded(guard, [1.0, 3.0, 1.0, 4.0])
    equal(before.params, at.params)
    assert int(at.spikes["count"]) == 3


def test_a_spike_of_the_gradient_alone_and_an_infinity_are_left_out():
    guard = SpikeGuard(grad_norm=1.5, warmup_steps=1)
    state, seen = run_guarded(guard, [1.0, 1.3, np.inf, 1.0])
    assert [each["spikes"] for each in seen] == [0, 1, 0, 0] and int(state.skipped) == 2
    assert np.isfinite([float(leaf) for leaf in state.spikes.values()]).all()
    with pytest.raises(UserError, match="SpikeGuard.loss = 1.0: a multiple of the mean must be above 1"):
        SpikeGuard(loss=1.0)


def test_a_guard_resumes_exactly():
    guard, scales = SpikeGuard(loss=1.5, grad_norm=1.5, decay=0.9, warmup_steps=2), [1.0, 1.1, 2.0, 1.0, 1.5, 1.0]
    whole, _ = run_guarded(guard, scales)
    half, _ = run_guarded(guard, scales[:3])
    again, _ = run_guarded(guard, scales[3:], jax.tree.map(jnp.asarray, jax.device_get(half)))
    equal(whole, again)


@pytest.mark.slow
def test_statistics_of_weights_are_those_of_t5x_every_few_steps():
    """By the formulas of T5X's WeightMetricsComputer, over single parameters and over a group."""
    made = small(transform=optax.sgd, statistics=WeightStatistics(2))
    state, (first,) = trained(made, 1)
    names = [name for name in first if name.startswith("weight_")]
    assert len(names) == 5 * len(flatten(state.params)) and not any(float(first[name][1]) for name in names)
    before = flatten(jax.device_get(state.params))
    state, (metrics,) = trained(made, 1, state, 1)
    for path, new in flatten(jax.device_get(state.params)).items():
        value = {name.split("/")[0]: float(metrics[name][0]) for name in names if name.endswith(f"/{path}")}
        change, old = new - before[path], before[path]
        ratio = change[old != 0] / old[old != 0]
        for name, expected in (("rms", new), ("update_rms", change), ("update_divided_by_weight_rms", ratio)):
            np.testing.assert_allclose(value[f"weight_{name}"], np.sqrt(np.mean(np.square(expected))), rtol=1e-4)
        np.testing.assert_allclose(value["weight_max"], np.max(np.abs(new)), rtol=1e-6)
    gradients = WeightStatistics(1, [("all", ".*")])
    trees = {"x": {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[4.0]])}}
    found = gradients(jnp.ones((), jnp.int32), trees, jax.tree.map(lambda p: 2 * p, trees), trees)
    assert {name: round(float(value), 5) for name, (value, _) in found.items()} == {
        "weight_rms/all": round(2 * 7**0.5, 5),
        "weight_gradient_rms/all": round(7**0.5, 5),
        "weight_update_rms/all": round(7**0.5, 5),
        "weight_update_divided_by_weight_rms/all": 1.0,
        "weight_max/all": 8.0,
    }
    with pytest.raises(UserError, match="WeightStatistics.groups: 'decodr' matches no"):
        WeightStatistics(1, [("d", "decodr")]).members(["decoder/x"])


@pytest.mark.slow
def test_options_do_not_change_what_is_trained():
    plain, with_options = trained(small(), 3), trained(small(**EMA, statistics=WeightStatistics(1)), 3)
    equal([each["loss"] for each in plain[1]], [each["loss"] for each in with_options[1]])
    equal(plain[0].params, with_options[0].params)


BINDINGS = (
    "EMA_DECAY=0.9", "EMA_WARMUP=True", "EMA_EVALUATE=True", "SPIKE_LOSS=3.0", "SPIKE_GRAD_NORM=2.0",
    "WEIGHT_STATISTICS_PERIOD=7",
)  # fmt: skip


def test_macros_reach_the_step():
    step = program("lm", *BINDINGS)._step
    assert step.average == ParameterAverage(0.9, True, True) and step.spikes == SpikeGuard(3.0, 2.0)
    assert step.statistics == WeightStatistics(7)
    plain = program("lm")._step
    assert (plain.average, plain.spikes, plain.statistics) == (None, None, None)
