"""A run goes on from another one's checkpoint: its step, its schedules, its optimizer's state, or none of them."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import losses, program

from meshway.framework.checkpoints import continuation
from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.conversion import mesh_tensorflow
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.optimizers.optimizer_state import counted_from
from meshway.framework.optimizers.optimizers import Optimizer, ParameterAverage, adafactor, adamw
from meshway.framework.optimizers.schedules import t5_factors
from meshway.framework.training.loop import Periods
from meshway.framework.training.step import TrainState

SHAPES = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
AXES = {"w": ("embed", "mlp")}


@pytest.fixture
def trained(tmp_path):
    """A run with checkpoints of parameters at steps 3 and 12."""
    save(tmp_path / "trained", 3, 12)
    return str(tmp_path / "trained")


def test_the_first_step_is_zero_unless_it_counts_on(trained):
    assert continuation.first_step(None) == 0 == continuation.first_step(Initial(trained))
    assert continuation.first_step(Initial(trained, count_on=True)) == 12
    assert continuation.first_step(Initial(trained, step=3), relative=20) == 3
    for relative, count_on, total, end in ((None, False, 7, 7), (20, True, None, 32), (20, False, 5, 32)):
        initial = Initial(trained, count_on=count_on)
        periods = Periods(total=total, relative=relative)
        assert periods.counted_from(continuation.first_step(initial, relative)).last == end


def save(folder, *steps):
    """Adds checkpoints of a parameter that is its step to a run."""
    checkpoints = Checkpoints(folder / "checkpoints")
    for step in steps:
        checkpoints.save_params({"w": jnp.full((4, 6), step, jnp.float32)}, step)
    checkpoints.close()


def test_all_is_read_from_the_checkpoint_that_was_found_first(tmp_path, trained):
    """The run that it starts from trains on meanwhile."""
    initial = Initial(trained, count_on=True)
    first = continuation.first_step(initial)
    save(tmp_path / "trained", 20)
    state = state_of(adafactor)
    continuation.check(initial, state, AXES)
    begun = continuation.begin(initial, program_of(state), first)
    assert first == 12 == int(begun.step) and float(begun.params["w"].max()) == 12
    assert Initial(trained).known_step() == 20


@pytest.mark.parametrize("given", [None, 12])
def test_all_processes_read_the_checkpoint_that_the_first_one_found(trained, monkeypatch, given):
    asked = []
    monkeypatch.setattr(processes, "barrier", lambda *args: asked.append(args) or {0: "3", 1: args[2]})
    initial = Initial(trained, step=given)
    begun = continuation.begin(initial, program_of(state_of(adafactor)), 0)
    assert initial.known_step() == float(begun.params["w"].max()) == (3 if given is None else 12)
    assert len(asked) == (given is None)


def test_a_process_that_comes_too_late_reads_what_the_first_one_found(tmp_path, monkeypatch):
    """Its own latest was removed as it looked; what fails in process 0 fails in all."""
    folder = tmp_path / "trained"
    (folder / "checkpoints").mkdir(parents=True)
    told = ["12"]
    monkeypatch.setattr(processes, "barrier", lambda *args: save(folder, 12) or {0: told[0], 1: args[2]})
    assert Initial(str(folder)).known_step() == 12
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    told[0] = "failed"
    with pytest.raises(UserError, match="no complete checkpoint|neither a run directory|no checkpoint"):
        Initial(str(folder)).known_step()


def test_a_run_is_no_tensorflow_checkpoint_whatever_else_lies_there(tmp_path, trained):
    (tmp_path / "trained" / "notes.index").write_text("of someone's own")
    assert Initial(trained).known_step() == 12 and not mesh_tensorflow.is_checkpoint(tmp_path / "trained")
    (tmp_path / "trained" / "notes.data-00000-of-00001").write_text("and its like")
    assert Initial(trained).known_step() == 12


def test_a_run_of_its_own_knows_where_it_began(tmp_path):
    own = Checkpoints(tmp_path / "own" / "checkpoints")
    own.first_step = 12
    own.save_params({"w": jnp.ones(2)}, 15)
    own.close()
    again = Checkpoints(tmp_path / "own" / "checkpoints", read_only=True)
    assert continuation.first_step(Initial("moved/away", count_on=True), 20, again) == 12


def test_what_cannot_be_counted_is_told(trained):
    with pytest.raises(UserError, match="TRAIN_STEPS_RELATIVE=20 counts from the step .* starts from none"):
        continuation.first_step(None, 20)
    with pytest.raises(UserError, match="TRAIN_STEPS=10 is the step at which training ends.* counts on from step 12"):
        Periods(total=10).counted_from(12)
    with pytest.raises(UserError, match="TRAIN_STEPS is None: set"):
        Periods(total=None).counted_from(12)
    with pytest.raises(UserError, match="Initial.count_on is set, and there is nothing .* INITIAL_CHECKPOINT_PATH"):
        Initial(None, count_on=True)
    with pytest.raises(UserError, match="Initial.optimizer_state and Initial.renames"):
        Initial(trained, optimizer_state=True, renames=[("a", "b")])
    unknown = SimpleNamespace(path="gpt2", count_on=True, known_step=lambda: None)
    with pytest.raises(UserError, match="TRAIN_STEPS_RELATIVE=5: .* is a Hugging Face directory, which has no step"):
        continuation.first_step(unknown, 5)


def test_schedules_that_start_again_are_noted(trained):
    note = continuation.restart_note(Initial(trained), 0)
    assert "steps start from 0" in note and "trained for 12 steps" in note and "count_on = True" in note
    assert continuation.restart_note(Initial(trained), 12) == "" == continuation.restart_note(None, 0)


def test_schedules_count_on_and_fresh_moments_do_not():
    rate = t5_factors("constant * linear_warmup", base_learning_rate=1.0, warmup_steps=10)
    bound = Optimizer(adamw, rate).bind(AXES, SHAPES)
    state = counted_from(bound.init({"w": jnp.ones((4, 6))}), 5)
    assert state.step == 5 and bound.learning_rate(state.step) == 0.5
    kinds = (optax.ScaleByAdamState, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    found = {type(node).__name__: int(node.count) for node in nodes if isinstance(node, kinds)}
    assert found == {"ScaleByAdamState": 0, "ScaleByScheduleState": 5}


def state_of(optimizer):
    bound = Optimizer(optimizer, 0.1).bind(AXES, SHAPES)
    params = {"w": jnp.ones((4, 6))}
    return TrainState(jnp.int32(0), params, bound.init(params), jnp.int32(0), jnp.int32(0))


def program_of(state):
    """A program of a fresh state, as far as a beginning looks at it."""
    return SimpleNamespace(init=lambda: state, axes=AXES, average=None, with_average=lambda begun: begun)


def test_averages_are_not_warmed_up_where_steps_count_on(trained):
    """Whoever begins: a run, or a model at hand."""
    program = program_of(state_of(adafactor))
    program.average = ParameterAverage(0.5, warmup=True)
    assert int(continuation.begin(Initial(trained), program, 0).step) == 0
    with pytest.raises(UserError, match="EMA_WARMUP counts steps from 0, and this run counts on from step 12"):
        continuation.begin(Initial(trained, count_on=True), program, 12)


def test_another_optimizers_state_is_refused_before_it_is_read(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path / "with" / "checkpoints")
    checkpoints.save(state_of(adafactor), 4, {}, {})
    checkpoints.close()
    initial = Initial(str(tmp_path / "with"), optimizer_state=True)
    continuation.check(initial, state_of(adafactor), AXES)
    with pytest.raises(UserError, match="the state of another optimizer than this recipe's: .*not in the checkpoint"):
        continuation.check(initial, state_of(adamw), AXES)
    with pytest.raises(UserError, match="has no optimizer state, only parameters"):
        continuation.check(Initial(trained, optimizer_state=True), state_of(adafactor), AXES)


@pytest.mark.slow
def test_training_goes_on_as_if_uninterrupted(tmp_path):
    """With its step and its optimizer's state, bit for bit; the state of the run stays as it was."""
    made = program("lm", optimizer="adafactor", layout="fsdp_model")
    expected, last = losses(made, 4)
    _, halfway = losses(made, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(halfway, 2, {}, {})
    checkpoints.close()
    initial = Initial(str(tmp_path), optimizer_state=True, count_on=True)
    state = continuation.begin(initial, made, continuation.first_step(initial))
    found, end = losses(made, 2, state, first=2)
    assert found == expected[2:]
    jax.tree.map(np.testing.assert_array_equal, end, last)
    fresh = continuation.begin(dataclasses.replace(initial, count_on=False), made, 0)
    assert int(fresh.step) == 0 == int(fresh.opt_state.step) and int(fresh.opt_state.inner[0].step) == 2
