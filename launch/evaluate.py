"""meshway eval: the checkpoints of a run, evaluated on its tasks.

    meshway eval --model_dir=runs/quickstart

Run the same command again and what was evaluated is passed over.
"""

import dataclasses
import functools
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from meshway.framework import terminal
from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.data.source import DataSource, EvalTask, other_split, tasks_of
from meshway.framework.data.vocabulary import source_framing
from meshway.framework.distributed import processes
from meshway.framework.distributed.processes import agree
from meshway.framework.errors import UserError
from meshway.framework.evaluation.accuracy import Comparison, format_accuracy
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.evaluation.job import EvaluationDisplay, EvaluationJob, is_done
from meshway.framework.evaluation.records import (
    ALL,
    LATEST,
    Claims,
    Records,
    StepQueue,
    Wanted,
    complete_steps,
    record_name,
)
from meshway.framework.files import open_path
from meshway.framework.inference.weights import check_weights
from meshway.framework.interfaces import Model, Writer
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.training.program import check_vocabularies
from meshway.framework.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation

# Arguments for where, when and how to evaluate, not for what; each split has files of its own.
_HOW = (
    "layout",
    "model_dir",
    "split",
    "steps",
    "watch",
    "idle_timeout",
    "again",
    "train_steps",
    "finished",
    "loggers",
    "weights",
    "cached",
)


def evaluate(
    model: Model,
    layout: Layout,
    data: DataSource,
    model_dir: str,
    evaluation: Evaluation = Evaluation(),
    steps: str | int | Sequence[int] | None = None,
    watch: bool = False,
    idle_timeout: float | None = None,
    train_steps: int | None = None,
    split: str | None = None,
    max_predictions: int | None = None,
    again: bool = False,
    finished: bool = False,
    averaged: bool = False,
    loggers: Sequence[Writer] = (),
    weights: str | None = None,
    cached: tuple[str, ShardedModel] | None = None,
    fingerprint: str = "",
) -> int:
    """Evaluates checkpoints in `model_dir`, and writes `eval/<task>.jsonl`, TensorBoard's events and `report.html`.

    Args:
      model: what is evaluated.
      layout: how it is sharded: any layout, whatever it was trained under.
      data: where the tasks come from.
      model_dir: the run directory.
      evaluation: what evaluation does; its `max_predictions` is for training runs, and not read here.
      steps: 'latest', 'all', a step or several ('100,200'); by default the latest, all where `watch`.
      watch: whether to evaluate checkpoints as they appear, until that of step `train_steps`.
      idle_timeout: seconds without a new checkpoint after which watching ends; None waits for ever.
      train_steps: where the run ends; None if that is not known.
      split: what the tasks read; by default the data's validation split. Another one has files of its own.
      max_predictions: of each task; None predicts and scores all examples.
      again: whether to evaluate what has been evaluated.
      finished: whether to refuse a run whose checkpoint of step `train_steps` is not there.
      averaged: whether to evaluate the averages of parameters that the run kept (EMA_DECAY).
      loggers: what takes the scalars of each step, beside TensorBoard.
      weights: one of `weights.WEIGHTS`: prints what weights in so many bits cost, and writes nothing.
      cached: the same of keys and values: the dtype that they are kept in by a model, otherwise the same, and it.
      fingerprint: of what is evaluated: a step that has records of the same one is passed over.

    Returns:
      how many steps it evaluated.

    Raises:
      UserError: anything the user can mend; one message.
    """
    _check_how(watch, idle_timeout, weights, cached)
    directory = RunDirectory(open_path(model_dir))
    wanted = Wanted.parse(steps if steps is not None else ALL if watch else LATEST)
    skip_removed = (watch or wanted.steps is None) and not finished  # which one before the last does not tell
    records = Records(directory.evaluations)
    if processes.is_primary():
        if finished:
            _check_finished(directory, train_steps, watch)
        wanted = wanted if watch else wanted.fixed(directory.checkpoints)
        records.prepare()
    agree({"recipe": fingerprint, "jax": jax.__version__, "backend": jax.default_backend()})
    sharded = ShardedModel(model, layout)
    check_vocabularies(sharded, vocabularies := data.vocabularies())
    directory.check_vocabularies(vocabularies, source_framing(data))
    split = other_split(data, split)
    with terminal.stage("opening the evaluation data"):
        tasks = split_tasks(data, split)
    evaluation = dataclasses.replace(evaluation, max_predictions=max_predictions)
    if weights is not None or cached is not None:
        return _compare(directory, sharded, tasks, evaluation, weights, cached, wanted, averaged)
    read = _as_read(sharded, tasks, evaluation)
    evaluator = Evaluator(read, tasks, evaluation)
    with EvaluationDisplay(silent=not processes.is_primary()) as display:
        for line in evaluator.left_out:
            display.say(line)
        done = is_done(records, [record_name(task.name, split) for task in tasks], fingerprint)
        queue = StepQueue(
            directory.checkpoints,
            wanted,
            (lambda step: False) if again else done,
            Claims(directory.evaluations / ".claims" / record_name(fingerprint, split)),
            display.say,
            watch,
            train_steps,
            idle_timeout,
        )
        given = (evaluator, sharded.abstract_params, queue, records, fingerprint, split, display, skip_removed)
        count = EvaluationJob(directory, *given, averaged, loggers, functools.partial(read.split, consume=True)).run()
        _say_goodbye(directory, queue, count, display)
    return count


def _check_how(watch: bool, idle_timeout: float | None, weights: str | None, cached: object) -> None:
    """Raises UserError for what does not go together."""
    if idle_timeout is not None and not watch:
        raise UserError("--idle_timeout has no effect without --watch, which alone waits: leave it out, or give both")
    check_weights(weights, "--weights")
    for flag, value in (("--weights", weights), ("--cache", cached)):
        if value is not None and watch:
            raise UserError(f"{flag} compares one checkpoint with itself in fewer bits: leave out --watch")


def _as_read(sharded: ShardedModel, tasks: Sequence[EvalTask], settings: Evaluation) -> ShardedModel:
    """Returns the model as an evaluation reads it: by layer where it decodes, losses and scores then too, so that no
    parameter is there twice; as it is stored else, which compiles in less time."""
    decodes = settings.by_layer and settings.max_predictions != 0 and any(task.has_metrics for task in tasks)
    return sharded.by_layer() if decodes else sharded


def _compare(
    directory: RunDirectory,
    sharded: ShardedModel,
    tasks: Sequence[EvalTask],
    settings: Evaluation,
    weights: str | None,
    cached: tuple[str, ShardedModel] | None,
    wanted: Wanted,
    averaged: bool,
) -> int:
    """Prints what weights, and keys and values, cost in fewer bits: the divergence, and each metric beside the
    checkpoint's. Returns how many steps were evaluated for the run's own records: none."""
    flag = "--cache" if weights is None else "--weights"
    dtype, other = cached or (None, None)
    step, *others = wanted.fixed(directory.checkpoints).steps or ()
    if others:
        raise UserError(f"{flag} compares one checkpoint, and --steps names {1 + len(others)}: give one")
    with terminal.stage(f"reading checkpoint {step}"):
        checkpoints = Checkpoints(directory.checkpoints, read_only=True, averaged=averaged)
        params = checkpoints.load_params(step, sharded.abstract_params)
    other = other and _as_read(other, tasks, settings)
    sharded = _as_read(sharded, tasks, settings)
    params = sharded.split(params, consume=True)
    comparison, primary = Comparison(sharded, params, weights, settings, other), processes.is_primary()
    name = ", ".join(f"{kept} {what}" for kept, what in ((weights, "weights"), (dtype, "cache")) if kept)
    if primary:
        print(f"step {step}, {name}: {comparison.size()}", flush=True)
    for found in comparison.of(tasks):
        if primary:
            print(format_accuracy(found, name), flush=True)
    return 0


def split_tasks(data: DataSource, split: str | None) -> Sequence[EvalTask]:
    """Returns the tasks of a split; UserError where there are none, or no splits to choose from."""
    tasks = tasks_of(data, split)
    if not tasks:
        raise UserError(f"{type(data).__name__} has no tasks to evaluate on")
    return tasks


def _check_finished(directory: RunDirectory, train_steps: int | None, watch: bool) -> None:
    """Raises UserError where a run has not saved its last step, or nobody knows which that is."""
    if watch:
        raise UserError("--watch waits for the run's last step by itself: leave out --finished")
    if train_steps is None:
        raise UserError(f"--finished: the recipe of {directory.root} has no TRAIN_STEPS; give --gin.TRAIN_STEPS=...")
    last = max(complete_steps(directory.checkpoints), default=0)
    if last < train_steps:
        raise UserError(
            f"--finished: {directory.root} has saved step {last} of {train_steps}: run its training again to go on, or "
            "leave out --finished to evaluate it as it is"
        )


def _say_goodbye(directory: RunDirectory, queue: StepQueue, count: int, display: EvaluationDisplay) -> None:
    for step in queue.removed:
        display.say(f"step {step}: its checkpoint was removed before its turn came; passed over")
    if queue.skipped:
        display.say(f"{_steps(queue.skipped)} had been evaluated already; --again evaluates them anew")
    if count:
        display.say(f"done: {_steps(count)}; report: {directory.root / 'report.html'}")


def _steps(count: int) -> str:
    return f"{count:,} step{'' if count == 1 else 's'}"


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config
    from meshway.launch.recipe.files import of_run

    with processes.joined(*invocation.processes):
        if jax.process_count() > 1:
            # jax has made SIGTERM a question that training asks after each step; here nobody asks.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        recipe = config.load(of_run(invocation))
        with recipe.parts("evaluate.evaluate", given=["fingerprint", "cached"]) as part:  # of gin/runs/eval.gin
            model: Model = part("model")  # MODEL
            layout: Layout = part("layout")  # LAYOUT: any, whatever the run was trained under
            data: DataSource = part("data")  # DATA: MIXTURE_OR_TASK_NAME under FEATURE_CONVERTER
            model_dir: str = part("model_dir")  # MODEL_DIR
            evaluation: Evaluation = part("evaluation")
            how = part.rest()  # TRAIN_STEPS, and what flags bind: steps, watch, split, ...
        fingerprint = recipe.fingerprint("evaluate.evaluate", without=_HOW)
        if cache := invocation.options.cache:
            how["cached"] = cache, ShardedModel(_with_cache(invocation, cache), layout)
        evaluate(model, layout, data, model_dir, evaluation, **how, fingerprint=fingerprint)


def _with_cache(invocation: "Invocation", dtype: str) -> Model:
    """Returns the model of a command, with keys and values kept in `dtype`."""
    from meshway.launch.recipe import config
    from meshway.launch.recipe.files import of_run

    name = "attention.Attention.cache_dtype"
    bound = dataclasses.replace(
        of_run(invocation),
        bindings=(*invocation.bindings, f"{name}={dtype!r}"),
        flags={**invocation.flags, name: "--cache"},
    )
    built: Model = config.load(bound).build("evaluate.evaluate", given=["fingerprint", "cached"])["model"]
    return built


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["eval", *sys.argv[1:]]))
