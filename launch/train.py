"""meshway train: one recipe in, a trained model out.

    meshway train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=runs/quickstart

Run the same command again to go on where it stopped.
"""

import contextlib
import functools
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax

from meshway.framework import terminal
from meshway.framework.checkpoints import continuation
from meshway.framework.checkpoints.manager import Checkpoints, DamagedCheckpoint, Keep
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.data.prefetch import check_not_trained, prefetch
from meshway.framework.data.source import DataSource
from meshway.framework.data.vocabulary import Framing
from meshway.framework.distributed import processes
from meshway.framework.distributed.processes import agree
from meshway.framework.errors import at_the_end
from meshway.framework.evaluation.evaluation import Evaluation
from meshway.framework.evaluation.records import Records
from meshway.framework.evaluation.schedule import OWN, EvalDataset, EvaluationLog, Schedule, begin_hooks
from meshway.framework.files import num_repeated, open_path
from meshway.framework.interfaces import Attempt, Writer
from meshway.framework.planning.hardware import peak_flops
from meshway.framework.report.page import write_report
from meshway.framework.telemetry import compilation_cache
from meshway.framework.telemetry.reporter import Progress, Reporter
from meshway.framework.telemetry.timeline import Timeline, in_one_line, process_began, read_goodput
from meshway.framework.telemetry.writers import JsonlWriter, TensorBoardWriter, Writers
from meshway.framework.training.hooks import Hook
from meshway.framework.training.loop import Loop, Periods, SizedSteps
from meshway.framework.training.program import TrainProgram, open_data
from meshway.framework.training.run_directory import RunDirectory, summarize
from meshway.framework.training.step import TrainState

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation


def train(
    program: TrainProgram,
    data: DataSource,
    model_dir: str,
    periods: Periods,
    evaluation: Evaluation = Evaluation(),
    train_eval: Sequence[EvalDataset] | None = OWN,
    infer_eval: Sequence[EvalDataset] | None = OWN,
    keep: Keep = Keep(),
    initial: Initial | None = None,
    hooks: Sequence[Hook] = (),
    loggers: Sequence[Writer] = (),
    max_skipped_in_a_row: int = 10,
    batch_size_schedule: Sequence[tuple[int, int]] = (),
    skip_batches: Sequence[tuple[int, int]] = (),
    resolved: str = "",
    began: float | None = None,
) -> None:
    """Trains until `periods.last`, resuming from the latest checkpoint in `model_dir` if there is one.

    Order of what parameters start from: 1. the latest checkpoint in `model_dir`; 2. `initial`; 3. fresh ones.
    Steps count from 0, or from those of `initial` (`Initial.count_on`, `Periods.relative`).

    Args:
      program: model, optimizer and layout.
      data: where batches and evaluation tasks come from.
      model_dir: the run directory.
      periods: how long, and how often to report, evaluate and save.
      evaluation: what evaluation does.
      train_eval: of what the loss is found every so often, teacher-forced; None for nothing.
      infer_eval: of what predictions are made and scores found for the tasks' metrics; None for nothing.
      keep: which checkpoints stay.
      initial: another run's parameters to start from; None, or one without a path, for fresh ones.
      hooks: called after each step; those that have `after_evaluation` or `after_report` see what evaluations find, or
        what is reported of training, and may stop the run.
      loggers: what takes each report, beside TensorBoard and `metrics.jsonl`.
      max_skipped_in_a_row: steps in a row whose updates were left out, after which the run stops.
      batch_size_schedule: (last step, examples of a batch up to it), in order, before the program's batch size. Here
        and below 1 is the run's own first step.
      skip_batches: (first, last) numbers of batches that no step takes; step N takes batch N until some are left out.
      resolved: the resolved recipe, written to the run directory and into checkpoints.
      began: when this attempt at the run began, in seconds since 1970; None means now.

    Raises:
      UserError: anything the user can mend; one message.
      KeyboardInterrupt: Ctrl-C stopped it before its last step; that step was saved.
    """
    began = time.time() if began is None else began
    directory, primary = RunDirectory(open_path(model_dir)), processes.is_primary()
    with directory.held() if primary else contextlib.nullcontext():
        rows = program.explain()
        if primary:
            directory.prepare(rows)
        checkpoints = Checkpoints(directory.checkpoints, keep, resolved)
        start = max(checkpoints.steps(), default=0)
        _agree(resolved, start)
        first, periods, initial = continuation.counted(program, periods, initial, checkpoints if start else None)
        checkpoints.first_step = first
        if start >= periods.last:
            _say(
                primary,
                f"step {start} of {periods.last} is already reached in {directory.root}; raise TRAIN_STEPS (or "
                "TRAIN_STEPS_RELATIVE) to go on",
            )
            return
        with terminal.stage("opening the training data"):
            dataset, vocabularies, framing = open_data(program, data, batch_size_schedule, skip_batches)
        if start:
            directory.check_vocabularies(vocabularies, framing)
        agree({f"vocabulary of {name!r}": each.fingerprint for name, each in vocabularies.items()})
        if initial is not None and not start:
            continuation.check(initial, program.state_shapes, program.axes)  # now, not once the step is compiled
        if primary:
            directory.save_vocabularies(vocabularies, framing)
        restoring = time.time()
        restored = _restore_last(checkpoints, program, primary, skip_batches) if start else None
        restored_seconds = time.time() - restoring
        start = restored[0] if restored else first
        resumed = start if restored else 0  # what an attempt without a checkpoint reported is written anew
        passes = Schedule(train_eval, infer_eval, periods.evaluate, evaluation).open(program.sharded, data)
        begin_hooks(hooks, passes, Records(directory.evaluations) if primary else None, resumed)
        with contextlib.ExitStack() as stack:
            if primary:
                stack.enter_context(at_the_end(lambda: write_report(directory.root)))
            timeline = stack.enter_context(Timeline(directory.timeline if primary else None, start, began))
            timeline.mark("ready")
            if restored:
                timeline.move(restored_seconds, "checkpoint")
                dataset.restore(restored[2])
                _say(primary, f"resuming from {directory.checkpoints / str(start)}")
            stream = stack.enter_context(contextlib.closing(prefetch(dataset)))  # reads while the step compiles
            with timeline.phase("compile"), terminal.stage("compiling the training step"):
                step = SizedSteps(program, batch_size_schedule, start - first, periods.last - first, skip_batches)
            timeline.mark("compiled", devices=program.partitioner.mesh.size)
            state = restored[1] if restored else _fresh(program, initial, start, framing, primary)
            if primary:
                directory.describe(_with_end(resolved, periods.last), rows, summarize(program, rows))
            progress = stack.enter_context(contextlib.closing(_progress(periods, start, primary)))
            writers = _writers(directory, resumed, resolved, loggers) if primary else Writers([])
            evaluate = EvaluationLog(
                *(passes, periods.last, directory, resumed, primary, progress.note, program.evaluated),
                *(first, writers.write_values),
            )
            reporter = _reporter(writers, progress, timeline, program, step, first)
            stack.enter_context(at_the_end(reporter.close))
            loop = Loop(
                step=step,
                shard_batch=step.shard_batch,
                stream=stream,
                periods=periods,
                reporter=reporter,
                evaluate=evaluate,
                save=checkpoints.save,
                hooks=hooks,
                max_skipped_in_a_row=max_skipped_in_a_row,
                first=first,
                also_refused=program.also_refused,
            )
            last = loop.run(state, start)
            with timeline.phase("checkpoint"):
                checkpoints.close()
            timeline.outcome = "done" if last == periods.last else "stopped"
        if primary:
            _say_goodbye(directory, last, periods, evaluate.samples(), loop.reason)
        if last < periods.last and loop.stop.number == signal.SIGINT:
            raise KeyboardInterrupt  # what comes after this command takes it for done otherwise


def _with_end(resolved: str, last: int) -> str:
    """Returns a resolved recipe for `config.gin`: where steps are relative, TRAIN_STEPS, which training does not read
    then, is the step at which it ends, for whoever looks for that there."""
    if not re.search(r"^TRAIN_STEPS_RELATIVE = \d", resolved, re.MULTILINE):
        return resolved
    return re.sub(r"^TRAIN_STEPS = .*$", f"TRAIN_STEPS = {last}", resolved, flags=re.MULTILINE)


def _agree(resolved: str, start: int) -> None:
    """Raises UserError unless all processes would train the same, from the same step."""
    devices = f"{jax.local_device_count()} {jax.default_backend()}"
    agree({"recipe": resolved, "last checkpoint": str(start), "jax": jax.__version__, "devices": devices})


def _restore_last(
    checkpoints: Checkpoints, program: TrainProgram, primary: bool, skipped: Sequence[tuple[int, int]]
) -> tuple[int, TrainState, dict[str, int]] | None:
    """Returns (step, state, data position) of the last checkpoint that can be read; None where none can.

    Those after it are set aside: their folders get another name, which is said. Raises UserError where batches that are
    to be `skipped` were trained before it.
    """
    while steps := checkpoints.steps():
        problem = ""
        try:
            with terminal.stage(f"reading checkpoint {steps[-1]}"):
                state, position = checkpoints.restore(steps[-1], program.abstract_state)
        except DamagedCheckpoint as error:
            problem = str(error)
        told = processes.barrier(f"reading checkpoint {steps[-1]}", None, problem)
        if not any(told.values()):
            check_not_trained(skipped, position, steps[-1], checkpoints.first_step, steps)
            return steps[-1], state, position
        if len(steps) == 1:
            raise DamagedCheckpoint(next(problem for problem in told.values() if problem))
        if primary:
            kept = checkpoints.set_aside(steps[-1])
            print(f"checkpoint {steps[-1]} is truncated or damaged: kept as {kept}; going on from step {steps[-2]}")
        processes.barrier(f"setting checkpoint {steps[-1]} aside", None)
        if not primary:
            checkpoints.reload()
    return None


def _fresh(
    program: TrainProgram, initial: Initial | None, first: int, framing: Framing | None, primary: bool
) -> TrainState:
    say = functools.partial(_say, primary)
    _say_start(initial, framing, say)
    if note := continuation.restart_note(initial, first):
        say(note)
    with terminal.stage("making the initial parameters"):
        return program.init() if initial is None else continuation.begin(initial, program, first)


def _say_start(initial: Initial | None, framing: Framing | None, say: Callable[[str], None]) -> None:
    """Says where decoders start from other ids than those with which their parameters were trained."""
    if initial is None or framing is None:
        return
    trained = initial.start()
    if trained is not None and trained != framing.start:
        say(
            f"the decoder of {initial.path} starts from {list(trained)}, and this run's from "
            f"{list(framing.start)}: bind the data's `start` to {list(trained)} (CachedData.start) to start alike"
        )


def _progress(periods: Periods, start: int, primary: bool) -> Progress:
    measured = jax.default_backend() == "cpu"
    return Progress(periods.last, start, peak_name="of matmul peak" if measured else "mfu", silent=not primary)


def _writers(directory: RunDirectory, start: int, resolved: str, loggers: Sequence[Writer]) -> Writers:
    board = TensorBoardWriter(directory.tensorboard, start)
    board.text("recipe", resolved, start)
    lines = JsonlWriter(directory.metrics, start)
    writers = Writers([lines, board, *loggers])
    with terminal.stage("opening the loggers"):
        writers.begin(Attempt(directory.root, start, lines.reported, resolved))
    return writers


def _reporter(
    writers: Writers,
    progress: Progress,
    timeline: Timeline,
    program: TrainProgram,
    step: SizedSteps,
    first: int,
) -> Reporter:
    devices = program.partitioner.mesh.devices.flatten().tolist()
    # The usual convention holds accelerators against their bfloat16 peak, whatever a recipe computes in.
    with terminal.stage("finding the matmul peak"):
        peak, source = peak_flops(devices, "float32" if devices[0].platform == "cpu" else "bfloat16")
    progress.note(f"matmul peak {peak / 1e9:,.0f} GFLOP/s ({source})")
    if programs := compilation_cache.in_words():
        progress.note(programs)
    if step_memory := step.planned():
        progress.note(step_memory)
    devices = jax.local_devices()
    return Reporter(writers, progress, timeline, lambda number: step.flops(number - first), peak, devices)


def _say(primary: bool, line: str) -> None:
    if primary:
        print(line, flush=True)


def _say_goodbye(directory: RunDirectory, last: int, periods: Periods, samples: str, reason: str) -> None:
    if samples:
        print(samples)
    print(in_one_line(read_goodput(directory.timeline)))
    if repeated := num_repeated(directory.root):
        print(f"{repeated:,} requests to the bucket had to be repeated")
    if last < periods.last:
        why = f", saved. {reason}. Run" if reason else ", saved; run"
        print(f"stopped after step {last} of {periods.last}{why} the same command again to go on")
    else:
        print(f"done: step {last}; report: {directory.root / 'report.html'}")


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line: builds each argument of `train` from what `gin/runs/train.gin` binds to it.

    Beside each are the macros that it is made of; those in capitals are what recipes set.
    """
    from meshway.launch.recipe import config

    with processes.joined(*invocation.processes):
        recipe = config.load(invocation)
        with recipe.parts("train.train", given=["resolved", "began"]) as part:
            # MODEL, OPTIMIZER and LAYOUT; BATCH_SIZE, TASK_FEATURE_LENGTHS, SEED, NUM_MICROBATCHES
            program: TrainProgram = part("program")
            # DATA: by default `CachedData` of MIXTURE_OR_TASK_NAME under FEATURE_CONVERTER, from CACHE_DIR
            data: DataSource = part("data")
            model_dir: str = part("model_dir")  # MODEL_DIR
            periods: Periods = part("periods")  # TRAIN_STEPS, REPORT_PERIOD, EVAL_PERIOD, CHECKPOINT_PERIOD
            evaluation: Evaluation = part("evaluation")
            train_eval: Sequence[EvalDataset] | None = part("train_eval")  # TRAIN_EVAL
            infer_eval: Sequence[EvalDataset] | None = part("infer_eval")  # INFER_EVAL
            keep: Keep = part("keep")
            initial: Initial | None = part("initial")  # INITIAL_CHECKPOINT_PATH; gin/initial/*.gin
            hooks: Sequence[Hook] = part("hooks")
            loggers: Sequence[Writer] = part("loggers")
            max_skipped_in_a_row: int = part("max_skipped_in_a_row")
            batch_size_schedule: Sequence[tuple[int, int]] = part("batch_size_schedule")  # BATCH_SIZE_SCHEDULE
            skip_batches: Sequence[tuple[int, int]] = part("skip_batches")  # SKIP_BATCHES
        if invocation.dry_run:
            from meshway.launch.dry_run import check, described
            from meshway.launch.inspection import layout

            read = (train_eval, infer_eval, hooks, batch_size_schedule, skip_batches)
            resolved = check(program, data, model_dir, periods, evaluation, keep, initial, *read)
            found = layout(program), "", described(resolved)
            if processes.is_primary():
                print(recipe.resolved, *found, sep="\n")
            return
        train(
            program=program,
            data=data,
            model_dir=model_dir,
            periods=periods,
            evaluation=evaluation,
            train_eval=train_eval,
            infer_eval=infer_eval,
            keep=keep,
            initial=initial,
            hooks=hooks,
            loggers=loggers,
            max_skipped_in_a_row=max_skipped_in_a_row,
            batch_size_schedule=batch_size_schedule,
            skip_batches=skip_batches,
            resolved=recipe.resolved,
            began=process_began(),
        )


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["train", *sys.argv[1:]]))
