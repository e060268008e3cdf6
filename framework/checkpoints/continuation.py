"""How a run goes on from another one's checkpoint: from its parameters, and on request from its step and from its
optimizer's state, as T5X's fine-tuning does."""

import dataclasses
from typing import Any

import jax

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.mapping import Initial, Tensors
from meshway.framework.checkpoints.sources import Schema, differences, schema_of
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Axes, Params
from meshway.framework.optimizers.optimizer_state import counted_from, counter_like
from meshway.framework.training.loop import Periods
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import TrainState


def counted(
    program: TrainProgram, periods: Periods, initial: Initial | None, own: Checkpoints | None
) -> tuple[int, Periods, Initial | None]:
    """Finds the step that a run begins with, or began with.

    Args:
      program: what is trained.
      periods: as the recipe has them.
      initial: what the run starts from; None, or one without a path, for fresh parameters.
      own: the run's checkpoints where it has some.

    Returns:
      (that step, the periods with a total, what the run starts from: None for fresh parameters).

    Raises:
      UserError: as `first_step` and `Periods.counted_from`; or averages are warmed up, and steps count on.
    """
    initial = None if initial is None or initial.path is None else initial
    first = first_step(initial, periods.relative, own)
    _check_warmup(program, first)
    return first, periods.counted_from(first), initial


def _check_warmup(program: TrainProgram, first: int) -> None:
    if first and program.average is not None and program.average.warmup:
        raise UserError(
            f"EMA_WARMUP counts steps from 0, and this run counts on from step {first}, where it does nothing: leave "
            "it out"
        )


def first_step(initial: Initial | None, relative: int | None = None, own: Checkpoints | None = None) -> int:
    """Returns the step that a run begins with, or began with: 0, or that of the checkpoint which it counts on from.

    Args:
      initial: what the run starts from.
      relative: the number of steps beyond (`Periods.relative`), None where their end is given.
      own: the run's checkpoints where it has some: they know, whatever became of `initial`.

    Raises:
      UserError: `relative` is given and there is no such checkpoint, or it has no step.
    """
    if own is not None:
        return own.read_first_step()
    if relative is None and (initial is None or not initial.count_on):
        return 0
    if initial is None:
        raise UserError(
            f"TRAIN_STEPS_RELATIVE={relative} counts from the step of the checkpoint that a run starts from, and this "
            "recipe starts from none: bind INITIAL_CHECKPOINT_PATH, or set TRAIN_STEPS"
        )
    step = initial.known_step()
    if step is None:
        asked = "Initial.count_on" if relative is None else f"TRAIN_STEPS_RELATIVE={relative}"
        raise UserError(
            f"{asked}: Initial.path={initial.path!r} is a Hugging Face directory, which has no step to count on from; "
            "leave it out, and set TRAIN_STEPS"
        )
    return step


def restart_note(initial: Initial | None, first: int) -> str:
    """Returns a note where steps start from 0 and those of the parameters did not, '' elsewhere.

    Args:
      initial: what the run starts from.
      first: the step that it begins with.
    """
    trained = None if initial is None or first else initial.known_step()
    if initial is None or not trained:
        return ""
    return (
        f"steps start from 0, and learning-rate schedules with them: {initial.path} was trained for {trained} steps. "
        "To count on from there, as T5X does, set mapping.Initial.count_on = True"
    )


def begin(initial: Initial, program: TrainProgram, first: int) -> TrainState:
    """Returns a fresh state, of sharded arrays, begun from a checkpoint; averages of parameters begin with them.

    Where steps count on, so do schedules. The moments of a fresh optimizer's state have counted no update.

    Args:
      initial: the checkpoint, and what is taken from it.
      program: what is trained.
      first: the step that the run begins with.

    Raises:
      UserError: as `Initial.restore` and `check`; or averages are warmed up, and steps count on.
    """
    _check_warmup(program, first)
    state = program.init()
    opt_state = _optimizer_state(initial, state, program.axes) if initial.optimizer_state else state.opt_state
    if first or initial.optimizer_state:
        opt_state = counted_from(opt_state, first)
    begun = dataclasses.replace(state, step=counter_like(state.step, first), opt_state=opt_state)
    begun = dataclasses.replace(begun, params=initial.restore(state.params, program.axes))
    return program.with_average(begun)


def check(initial: Initial, shapes: TrainState, axes: Axes) -> None:
    """Finds what `begin` would read, without reading it.

    Args:
      initial: as for `begin`.
      shapes: the state's.
      axes: the logical axis names of each parameter.

    Raises:
      UserError: as `Initial.check`; or `initial.optimizer_state` is set, and there is none or another optimizer's.
    """
    initial.check(shapes.params, axes)
    if initial.optimizer_state:
        opened = initial.opened
        if isinstance(opened, Tensors):
            _of_tensors(initial, opened, shapes.params, axes, shapes.opt_state)
        else:
            _compare(initial, opened[0].recipe(opened[1])["schema"], shapes.opt_state)


def _optimizer_state(initial: Initial, state: TrainState, axes: Axes) -> Any:
    """Returns the optimizer's state in the checkpoint, sharded like that of `state`."""
    wanted, opened = state.opt_state, initial.opened
    if isinstance(opened, Tensors):
        from meshway.framework.conversion.values import fill_leaf  # training itself reads no other formats

        return jax.tree.map(fill_leaf, wanted, _of_tensors(initial, opened, state.params, axes, wanted))
    checkpoints, step = opened
    _compare(initial, checkpoints.recipe(step)["schema"], wanted)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), wanted)
    return checkpoints.restore_part(step, {"opt_state": abstract})["opt_state"]


def _of_tensors(initial: Initial, tensors: Tensors, params: Params, axes: Axes, wanted: Any) -> Any:
    """Returns another system's optimizer state, a tree like `wanted` of values that are still to be read."""
    if tensors.optimizer_state is None:
        raise UserError(f"Initial.optimizer_state: {initial.path!r} is a Hugging Face directory, which has none")
    found = tensors.optimizer_state(params, axes)
    _compare(initial, schema_of({"opt_state": found}), wanted)
    return found


def _compare(initial: Initial, schema: Schema, wanted: Any) -> None:
    """Raises UserError where the optimizer's state in a checkpoint is not like `wanted`."""
    saved = {name: spec for name, spec in schema.items() if name.startswith("opt_state/")}
    if not saved:
        raise UserError(
            f"Initial.optimizer_state: {initial.path!r} has no optimizer state, only parameters (meshway convert "
            "--optimizer_state takes that of a T5X checkpoint in). Set Initial.optimizer_state = False for a fresh one"
        )
    if found := differences(saved, schema_of({"opt_state": wanted})):
        raise UserError(
            f"Initial.optimizer_state: {initial.path!r} holds the state of another optimizer than this recipe's: "
            f"{found}. Give the optimizer that it was trained with (config.gin beside its checkpoints), or set "
            "Initial.optimizer_state = False for a fresh state"
        )
