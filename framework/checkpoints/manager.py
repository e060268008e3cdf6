"""Checkpoints of a run: state, data position and recipe, saved together and atomically, restored on any mesh."""

import contextlib
import dataclasses
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from meshway.framework.checkpoints.sources import differences, names_in, schema_of
from meshway.framework.distributed import processes
from meshway.framework.errors import (
    EnvironmentFailure,
    UserError,
    first_line,
    innermost,
    nearest_steps,
    quiet_closed_loops,
)
from meshway.framework.files import check_claimed, open_path
from meshway.framework.interfaces import Params
from meshway.framework.terminal import installed_version
from meshway.framework.training.step import TrainState
from meshway.framework.trees import flatten, merge, unflatten

ITEMS = ("state", "data", "recipe")
_DAMAGED = "damaged"


class DamagedCheckpoint(EnvironmentFailure):
    """A checkpoint cannot be read: truncated, damaged, or not meshway's."""


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints are kept: the last `latest` (None keeps all), those whose step is a multiple of `every`, and
    the `best` ones by evaluation metric `metric` (e.g. "validation/pydocs_summary/loss"), lowest unless `highest`."""

    latest: int | None = 3
    every: int | None = None
    best: int | None = None
    metric: str | None = None
    highest: bool = False

    def policy(self) -> policies.PreservationPolicy:
        """Returns the union of the three as an Orbax policy.

        Raises:
          UserError: `best` without `metric`.
        """
        kept: list[policies.PreservationPolicy] = [policies.LatestN(self.latest)]
        if self.every:
            kept.append(policies.EveryNSteps(self.every))
        if self.best:
            if not self.metric:
                raise UserError("Keep.best needs Keep.metric, the name of an evaluation metric in metrics.jsonl")
            name, worst = self.metric, float("-inf") if self.highest else float("inf")
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics.get(name, worst),
                    reverse=not self.highest,
                    n=self.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return policies.AnyPreservationPolicy(kept)


class Checkpoints:
    """The folder `checkpoints/` of one run."""

    def __init__(
        self,
        folder: Path,
        keep: Keep = Keep(),
        recipe: str = "",
        read_only: bool = False,
        handler: ocp.PyTreeCheckpointHandler | None = None,
        averaged: bool = False,
    ):
        """Opens the folder.

        Args:
          folder: created if it does not exist, unless `read_only`.
          keep: which checkpoints are kept.
          recipe: the resolved gin text that is saved in every checkpoint.
          read_only: write nothing.
          handler: writes and reads states in the format of Orbax's own, which None is.
          averaged: whether parameters that are read alone are the averages that the run kept (EMA_DECAY).

        Raises:
          UserError: the folder cannot be created.
        """
        _quiet_orbax()
        self.first_step = 0  # the step that the run began with: saved in each checkpoint
        self.folder, self._recipe, self._read_only = open_path(folder).absolute(), recipe, read_only
        self._is_averaged = averaged
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            state = handler or ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
            registry.add("state", ocp.args.PyTreeSave, state)
            registry.add("state", ocp.args.PyTreeRestore, state)
            for item in ITEMS[1:]:
                registry.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
                registry.add(item, ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
            self._manager = ocp.CheckpointManager(
                self.folder,
                handler_registry=registry,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=keep.policy(),
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                    # Orbax limits asynchronous saves to 20 minutes; one that is streamed may take longer.
                    enable_async_checkpointing=handler is None,
                ),
            )
        except OSError as error:
            raise UserError(f"cannot create the checkpoint folder {self.folder}: {error.strerror or error}") from error

    def steps(self) -> list[int]:
        """Returns the steps of complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, step: int, position: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        """Starts saving; when it returns, the state may be donated to the next step.

        Raises:
          EnvironmentFailure: this save, or the one still running, failed (disk full, folder not writable).
        """
        self._save(_as_tree(state), step, position, metrics)

    def save_params(self, params: Params, step: int, rest: Mapping[str, Any] | None = None) -> None:
        """Saves parameters without a data position, such as a converted model's, and what `rest` has of the other
        fields of a state: `restore_params` and `Initial` read them."""
        self._save({"params": params, **(rest or {})}, step, {}, {})

    def _save(self, tree: dict[str, Any], step: int, position: Mapping[str, int], metrics: Mapping[str, float]) -> None:
        recipe: dict[str, Any] = {"gin": self._recipe, "version": installed_version(), "schema": schema_of(tree)}
        check_claimed(self.folder)
        if self.first_step:
            recipe["first_step"] = self.first_step
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree),
            data=ocp.args.JsonSave(dict(position)),
            recipe=ocp.args.JsonSave(recipe),
        )
        self._guard(lambda: self._manager.save(step, args=arguments, metrics=dict(metrics), force=True), step)

    def wait(self) -> None:
        """Returns once the last save is complete; raises EnvironmentFailure if it failed."""
        self._guard(self._manager.wait_until_finished, None)

    def close(self) -> None:
        """Waits for the last save and releases the folder."""
        self.wait()
        self._manager.close()

    def recipe(self, step: int) -> dict[str, Any]:
        """Returns {"gin", "version", "schema"} of a checkpoint; raises DamagedCheckpoint if it cannot be read."""
        return self._read(step, recipe=ocp.args.JsonRestore())["recipe"]

    def read_first_step(self) -> int:
        """Returns the step that the run began with, as its latest readable checkpoint says."""
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedCheckpoint):
                return int(self.recipe(step).get("first_step", 0))
        return 0

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
        """Restores a checkpoint, saved on any mesh, with the shardings of `abstract` (ShapeDtypeStructs).

        Returns:
          (state, data position).

        Raises:
          UserError: it is of another model or optimizer (lists the differences).
          DamagedCheckpoint: it cannot be read.
        """
        self.check(step, abstract)
        tree = _as_tree(abstract)
        arguments = ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
        position = self.position(step)  # first: it is little, and may be damaged too
        return TrainState(**self._read(step, state=arguments)["state"]), position

    def position(self, step: int) -> dict[str, int]:
        """Returns the data position of a checkpoint; raises DamagedCheckpoint if it cannot be read."""
        return dict(self._read(step, data=ocp.args.JsonRestore())["data"])

    def check(self, step: int, abstract: TrainState) -> None:
        """Compares a checkpoint's schema with `abstract`, without reading its state; raises as `restore` does."""
        wanted = schema_of(_as_tree(abstract))
        if found := differences(self.recipe(step)["schema"], wanted):
            raise UserError(self._mismatch(step, found, wanted))

    def _mismatch(self, step: int, found: str, wanted: Mapping[str, Any]) -> str:
        """Returns the message that a checkpoint is of another model or optimizer, and what to do about it."""
        saved = self.recipe(step)["schema"]
        params = [{name: spec for name, spec in each.items() if name.startswith("params/")} for each in (saved, wanted)]
        for part, what in (("average/", "EMA_DECAY"), ("spikes/", "SPIKE_LOSS or SPIKE_GRAD_NORM")):
            has = [any(name.startswith(part) for name in each) for each in (saved, wanted)]
            if params[0] == params[1] and has[0] != has[1]:
                return (
                    f"checkpoint {self.folder / str(step)} was saved {'with' if has[0] else 'without'} {what}, and the "
                    f"recipe has {'none' if has[0] else 'one'}: resume as it was trained, or give another "
                    "MODEL_DIR and start from its parameters: train.train.initial = @mapping.Initial(), "
                    f"mapping.Initial.path = {str(self.folder.parent)!r}"
                )
        if params[0] != params[1]:
            return (
                f"checkpoint {self.folder / str(step)} holds another model or optimizer than this recipe: {found}. "
                "Give another MODEL_DIR, or the recipe of that run (config.gin beside its checkpoints)"
            )
        return (
            f"checkpoint {self.folder / str(step)} holds this model with another optimizer's state: {found}. To "
            "continue with the run's optimizer, give its recipe (config.gin beside its checkpoints). To train its "
            "parameters with the new one, give another MODEL_DIR and start from them: "
            "train.train.initial = @mapping.Initial(), "
            f"mapping.Initial.path = {str(self.folder.parent)!r}"
        )

    def set_aside(self, step: int) -> Path:
        """Renames the folder of a checkpoint that cannot be read, so that it no longer counts as one, and returns its
        new path; raises UserError if it cannot be renamed."""
        source = self.folder / str(step)
        target = next(
            path
            for number in itertools.count()
            if not (path := self.folder / f"{step}.{_DAMAGED}{f'-{number}' if number else ''}").exists()
        )
        try:
            source.rename(target)
        except OSError as error:
            raise UserError(f"{source} is damaged and cannot be renamed: {error.strerror or error}") from error
        self.reload()
        return target

    def reload(self) -> None:
        """Reads the folder's list of checkpoints again, after another process has renamed one."""
        self._manager.reload()

    def load_params(self, step: int, abstract: Params) -> Params:
        """Restores only the parameters of a checkpoint, all of them, with the shardings and dtypes of `abstract`.

        Raises:
          UserError: it is of another model (lists the differences).
          DamagedCheckpoint: it cannot be read.
        """
        wanted = schema_of({"params": abstract})
        saved = {  # a converted model may be stored in another precision than it is trained in
            name: [shape, wanted.get(name, (shape, dtype))[1]]
            for name, (shape, dtype) in self.recipe(step)["schema"].items()
            if name.startswith("params/")
        }
        if found := differences(saved, wanted):
            raise UserError(
                f"checkpoint {self.folder / str(step)} holds another model than this recipe: {found}. Give the recipe "
                "of that run (config.gin beside its checkpoints), or another MODEL_DIR"
            )
        return self.restore_params(step, abstract)

    def restore_params(self, step: int, params: Any) -> Any:
        """Restores only the parameters named in `params`, a tree of ShapeDtypeStructs with shardings; where the folder
        was opened for averaged ones, raises UserError if the checkpoint has none."""
        if not self._is_averaged:
            return self.restore_part(step, {"params": params})["params"]
        wanted, kept = flatten(params), self.averages(step)
        there = {path: leaf for path, leaf in wanted.items() if path not in kept}
        tree = {"average": unflatten({path: leaf for path, leaf in wanted.items() if path in kept})}
        tree |= {"params": unflatten(there)} if there else {}  # those that were not trained have none
        found = self.restore_part(step, tree)
        return merge(found.get("params", {}), found["average"])

    def restore_part(self, step: int, tree: dict[str, Any]) -> Any:
        """Restores only the fields of a state, and of these only the leaves, that are in `tree`, ShapeDtypeStructs with
        shardings."""
        given = ocp.checkpoint_utils.construct_restore_args(tree)
        return self._read(step, state=ocp.args.PyTreeRestore(tree, given, partial_restore=True))["state"]

    def averages(self, step: int) -> frozenset[str]:
        """Returns the paths of the parameters of which a checkpoint has averages; UserError if there are none."""
        names = frozenset(names_in(self.recipe(step)["schema"], "average"))
        if not names:
            raise UserError(
                f"checkpoint {self.folder / str(step)} has no averaged parameters: its run was trained without "
                "EMA_DECAY. Leave out --averaged (Initial.averaged)"
            )
        return names

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            others = [other for other in self.steps() if other != step]
            advice = f"Remove that folder to continue from step {others[-1]}" if others else "There is no other one"
            if self._read_only and others:
                advice = f"Step {others[-1]} is there too"
            raise DamagedCheckpoint(
                f"checkpoint {self.folder / str(step)} cannot be read: it is truncated, damaged or not meshway's "
                f"({first_line(innermost(error))}). {advice}"
            ) from error

    def _guard(self, action: Callable[[], Any], step: int | None) -> None:
        try:
            action()
            self._manager.check_for_errors()
        except Exception as error:
            what = "checkpoint" if step is None else f"checkpoint {step}"
            raise EnvironmentFailure(
                f"saving {what} in {self.folder} failed ({first_line(error)}); complete checkpoints: "
                f"{self.steps() or 'none'}. Free some space or make the folder writable, then run the command again"
            ) from error


def find_checkpoint(path: Path, step: int | None, given_by: str) -> tuple[Path, int] | None:
    """Returns the folder of checkpoints and the step that a path refers to.

    Args:
      path: a run directory, its folder `checkpoints`, or the folder of one checkpoint.
      step: which one, None for the latest; ignored if `path` is one checkpoint.
      given_by: the setting that gave the path, for messages.

    Returns:
      (folder, step); None if the path is none of the three.

    Raises:
      UserError: there is no complete checkpoint, or none of `step`.
    """
    if path.name.isdigit() and (path / "state").is_dir():
        folder, step = path.parent, int(path.name)
    else:
        folder = path if path.name == "checkpoints" else path / "checkpoints"
    if not folder.is_dir():
        return None
    try:  # as `Checkpoints.steps`, but no process waits for others
        steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))
    except OSError as error:
        raise UserError(f"{given_by}: {folder} cannot be read: {error.strerror or error}") from error
    if not steps:
        raise UserError(f"{given_by}: there is no complete checkpoint in {folder}")
    if step is not None and step not in steps:
        raise UserError(f"{given_by}: {folder} has no checkpoint of step {step}; {nearest_steps(step, steps)}")
    return folder, steps[-1] if step is None else step


def read_last(
    checkpoints: Checkpoints, last: int, read: Callable[[int], Any], say: Callable[[str], object]
) -> tuple[int, Any]:
    """Reads the latest checkpoint up to step `last` that all processes can read.

    Args:
      checkpoints: of a run.
      last: the step to begin with.
      read: reads the checkpoint of a step; raises DamagedCheckpoint.
      say: called with a message about each that cannot be read; its files are not changed.

    Returns:
      (step, what `read` returned).

    Raises:
      DamagedCheckpoint: none can be read; the message is about the first that was tried.
    """
    steps, first = [step for step in checkpoints.steps() if step <= last], ""
    while steps:
        step, problem, found = steps.pop(), "", None
        try:
            found = read(step)
        except DamagedCheckpoint as error:
            problem = str(error)
        problems = processes.barrier(f"reading checkpoint {step}", None, problem)
        if not any(problems.values()):
            return step, found
        problem = next(each for each in problems.values() if each)
        first = first or problem
        if steps:
            say(f"{problem}; taking step {steps[-1]}")
    raise DamagedCheckpoint(first)


def _quiet_orbax() -> None:
    """Turns off logs: Orbax logs every save and every file that it cannot parse, and after a failed save asyncio logs a
    traceback for each array, in addition to the error that `_guard` reports."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    quiet_closed_loops()


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that it has: without an average of parameters there is none in a checkpoint."""
    parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: part for name, part in parts.items() if name not in ("average", "spikes") or jax.tree.leaves(part)}
