"""meshway infer: predictions and scores of an input, from a run's checkpoint.

    meshway infer --model_dir=runs/quickstart --input=questions.jsonl --output=answers.jsonl

Killed, it goes on where it was when the same command is run again, on as many processes as there are then.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.data.source import DataSource
from meshway.framework.data.task_data import module_names, preprocess
from meshway.framework.distributed import processes
from meshway.framework.distributed.processes import agree
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.bulk.batches import OwnFormat, Predict, Score, Work, compute
from meshway.framework.inference.bulk.inputs import Reader, Share
from meshway.framework.inference.bulk.job import Job, JobProgress, Policy, lines_of, of_shares, of_truncated, summary
from meshway.framework.inference.bulk.sources import PromptSource, Source, TaskSource, open_source
from meshway.framework.inference.bulk.store import ChunkStore
from meshway.framework.inference.decoding import Decoder, decoding_model
from meshway.framework.inference.engine import SCORE_INSTEAD, Engine, Workload
from meshway.framework.inference.predictor import Session, open_session
from meshway.framework.inference.recipe_model import RecipeModel
from meshway.framework.inference.rows import doubling
from meshway.framework.interfaces import Model
from meshway.framework.partitioning.partitioner import Layout
from meshway.launch import layout_choice
from meshway.launch.evaluate import split_tasks
from meshway.launch.infer_flags import PREDICT, SCORE, aux_names, by_flag, made, refuse_idle

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Invocation

_CHUNK_BATCHES = 16
_BATCH_SIZE = 32
# Arguments for where and how, not for what is computed. Another layout may continue a job, too.
_HOW = ("opened", "model_dir", "output")


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a job reads.

    Attributes:
      where: a file, a glob, or '-' for standard input.
      split: a split of the recipe's task (MIXTURE_OR_TASK_NAME) instead of `where`.
      prompts: a text, or texts, to answer, instead of both.
      format: 'jsonl', 'tsv', 'text', 'parquet' or 'tfrecord'; None derives it from the file's name.
      columns: names of TSV columns without a header, 'a,b'.
      fields: features of a split's examples that are kept beside text, see `TaskSource`: 'a,b', or 'all'.
      inputs_field, targets_field: the fields that hold text, or token ids.
      begin_field: the field with what a prediction must begin with; None for none.
      preprocess: a task whose preprocessors make `inputs` and `targets` of each record.
      module: the module(s) that register it.
      on_bad: 'fail' stops at a record that cannot be used, 'skip' leaves it out and reports it.
      truncate: truncate inputs that are too long instead of refusing them.
      append_eos: whether inputs end with EOS; None for what the run's own text does.
    """

    where: str | None = None
    split: str | None = None
    prompts: str | Sequence[str] = ()
    format: str | None = None
    columns: str = ""
    fields: str | None = None
    inputs_field: str = "inputs"
    targets_field: str = "targets"
    begin_field: str | None = None
    preprocess: str | None = None
    module: str | Sequence[str] | None = None
    on_bad: str = "fail"
    truncate: bool = False
    append_eos: bool | None = None

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.where, self.split)) + bool(self.prompts) != 1:
            raise UserError(
                "meshway infer reads --input=FILE, --prompt=TEXT or, of the recipe's task, --split=SPLIT: give one"
            )
        if self.on_bad not in ("fail", "skip"):
            raise UserError(f"--on_bad={self.on_bad} is neither 'fail' nor 'skip'")
        if self.begin_field is not None and self.preprocess is not None:
            raise UserError("--begin_field is of records as they are: leave out --preprocess")
        if self.split is not None and self.preprocess is not None:
            raise UserError("--preprocess is for --input: a task's split is preprocessed already")


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go: see `ChunkStore`; None prints answers to prompts. `chunk_size` records are committed at a time;
    None for 16 batches. Of `num_shards` independent jobs over one input into one output, this is `shard_id`, from 0.
    `writer` is a format of one's own: a `batches.Writer`, or the name of a class of these that needs no arguments."""

    where: str | None = None
    format: str | None = None
    overwrite: bool = False
    chunk_size: int | None = None
    num_shards: int | None = None
    shard_id: int | None = None
    writer: Any = None

    def __post_init__(self) -> None:
        if (self.num_shards is None) != (self.shard_id is None):
            lacks = "--shard_id=I, which of them this is," if self.shard_id is None else "--num_shards=N, of how many,"
            raise UserError(f"{lacks} is missing: both are given, or none")
        self.share  # noqa: B018 to check both
        if self.where == "-":
            raise UserError("--output=-: results are files, nothing writes them to standard output: give a file's name")
        if self.writer is not None and not self.where:
            raise UserError("a writer writes to --output=FILE, or to a folder: give one")
        if self.where and (local_path(self.where) / "checkpoints").is_dir():
            raise UserError(f"--output={self.where} is a run directory: give a file, or a folder of the results' own")

    @functools.cached_property
    def own_format(self) -> OwnFormat | None:
        """What `writer` is, None where a format of ours is written; UserError where it is none."""
        if self.writer is None:
            return None
        return OwnFormat(made(self.writer) if isinstance(self.writer, str) else self.writer)

    @property
    def share(self) -> Share:
        """The part of the job that is computed here."""
        return Share(self.shard_id or 0, 1 if self.num_shards is None else self.num_shards)


def infer(
    opened: RecipeModel,
    model_dir: str,
    inputs: Inputs,
    output: Output,
    decoder: Decoder,
    mode: str = PREDICT,
    beams: int | None = None,
    step: int | None = None,
    batch_size: int = _BATCH_SIZE,
    max_input_length: int | None = None,
    max_new_tokens: int | None = None,
    aux: str = "",
    stop: str | Sequence[str] = (),
    seed: int = 0,
    averaged: bool = False,
    data: DataSource | None = None,
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Computes what `mode` asks for of each record, and writes it in the order of the input.

    Args:
      opened: model and layout of the recipe; any layout.
      model_dir: the run directory, or one of its checkpoints.
      inputs, output: what is read, and where results go.
      decoder: how predictions are made.
      mode: 'predict', 'score' (of given targets), or 'predict_with_aux' (with intermediate values).
      beams: beam search of so many instead of `decoder`.
      step: which checkpoint; None for the latest that can be read.
      batch_size: rows of a batch, over all processes.
      max_input_length, max_new_tokens: the most tokens of a prompt and of a prediction (of inputs and targets, where
        these are scored); None uses the recipe's TASK_FEATURE_LENGTHS.
      aux: names of intermediate values, 'encoder_output,decoder_output'.
      stop: text, or texts, that end a prediction, wherever they occur in it.
      seed: of sampling.
      averaged: whether to read the averages of parameters that the run kept (EMA_DECAY).
      data: the tasks of `inputs.split`.
      settings: of the recipe, by name: a job continues what one of the same settings left.

    Returns:
      what was counted.

    Raises:
      UserError: anything the user can mend; one message.
    """
    names = aux_names(mode, aux)
    output.own_format  # noqa: B018 to check it before anything is read
    if not output.where and not inputs.prompts:
        raise UserError("meshway infer needs --output=FILE.jsonl (or .parquet, .txt, or a folder of shards)")
    decoder = decoder if beams is None else BeamSearch(beams)
    source = _source(inputs, mode, data)
    if mode != SCORE:
        decoding_model(opened.model, SCORE_INSTEAD)
    session = open_session(opened, model_dir, step, inputs.append_eos, stop, _note, averaged, by_layer=mode != SCORE)
    engine = session.engine(decoder, batch_size, seed)
    reader, work = _reader_and_work(
        inputs, opened.limits(max_input_length, max_new_tokens), session, engine, mode, names
    )
    if not output.where:
        return _answer(source, reader, work, batch_size)
    size = output.chunk_size or _CHUNK_BATCHES * batch_size
    policy = Policy(size, inputs.on_bad == "skip", output.overwrite, output.share)
    facts = {
        **(settings or {}),
        "checkpoint": str((session.run / "checkpoints" / str(session.step)).absolute()),
        "input": source.description,
        "chunk size": str(policy.chunk_size),
    }
    if output.own_format is not None:
        facts["writer"] = output.own_format.description
    agree(facts)
    total = source.total if processes.is_primary() else None
    total = None if total is None else policy.records_of_share(total)
    with JobProgress(total, silent=not processes.is_primary()) as progress:
        began = time.monotonic()
        counts = _run(source, reader, work, output, facts, policy, batch_size, progress)
        if "examples" in counts:
            counts |= {"programs": engine.num_compiled, "wall_seconds": round(time.monotonic() - began, 3)}
            if processes.is_primary():
                print(*lines_of(counts), f"written: {output.where}", sep="\n", file=sys.stderr)
    return counts


def _reader_and_work(
    inputs: Inputs, limits: Mapping[str, int], session: Session, engine: Engine, mode: str, names: Sequence[str]
) -> tuple[Reader, Work]:
    """Returns what reads records, truncated or refused at `limits` in tokens, and what computes them."""
    scores = mode == SCORE
    longest = session.row_format.room(limits["inputs"], limits["targets"], scores)
    reader = Reader(
        session.text,
        session.row_format,
        longest,
        scores,
        inputs.inputs_field,
        inputs.targets_field,
        inputs.truncate,
        preprocess(inputs.preprocess, module_names(inputs.module), limits) if inputs.preprocess else None,
        inputs.begin_field,
    )
    if scores:
        return reader, Score(engine, doubling(longest))
    buckets = doubling({"inputs": longest["inputs"]})
    return reader, Predict(engine, session.text, buckets, longest["targets"], names, inputs.begin_field is not None)


def _answer(source: Source, reader: Reader, work: Work, batch_size: int) -> dict[str, Any]:
    """Prints each prompt and the answers to it to standard output."""
    examples, problems = reader.read(list(source.records()))
    if problems:
        raise UserError("\n  ".join(problems))
    if processes.is_primary():
        for line in of_truncated(sum(example.truncated for example in examples)):
            print(line, file=sys.stderr)
    found: dict[int, dict[str, Any]] = {}
    for places, done in compute(work, examples, batch_size):
        found |= dict(zip(places, done.rows, strict=True))
    for place, example in enumerate(examples if processes.is_primary() else ()):
        print(*[f"> {line}" for line in str(example.values[reader.inputs_field]).splitlines() or [""]], sep="\n")
        answers = found[place].get("predictions", [found[place]["prediction"]])
        scores = [f"[{score:.2f}] " for score in found[place].get("scores", ())] or [""]
        print(*[score + answer for score, answer in zip(scores, answers, strict=True)], "", sep="\n", flush=True)
    return {"examples": len(examples)}


def _run(
    source: Source,
    reader: Reader,
    work: Work,
    output: Output,
    facts: Mapping[str, str],
    policy: Policy,
    batch_size: int,
    progress: JobProgress,
) -> dict[str, Any]:
    """Runs the job and finishes its output; returns its summary."""
    primary = processes.is_primary()
    where = local_path(output.where or "")
    how = (output.format, output.overwrite, output.share, output.own_format)
    store = ChunkStore(where, facts, *how) if primary else None
    with contextlib.ExitStack() as stack:
        if store is not None:
            stack.callback(store.close)
            store.open()
        told = processes.barrier("the state of the output", None, str(int(store is not None and store.finished)))
        if int(told[0]):
            progress.note(f"{output.where}: this very job is finished; --overwrite runs it again")
            return {"finished_before": True}
        job = Job(source, reader, work, store, policy, batch_size, progress)
        digests = job.run()
        if store is None:
            return {}
        missing = store.missing(digests)
        if missing or store.finished:
            progress.note(f"{output.where}: {of_shares(output.share, len(digests), missing)}")
            return {"missing_chunks": len(missing)}
        counts = summary(store)
        store.finish(len(digests), counts)
        return counts


def tasks(data: DataSource) -> DataSource:
    """Returns the tasks of a recipe: what `runs/infer.gin` binds, for --split."""
    return data


def opened(
    model: Model, layout: Layout, lengths: Mapping[str, int] | None = None, weights: str | None = None
) -> RecipeModel:
    """Returns the part of a recipe that is for inference: what `runs/infer.gin` binds."""
    return RecipeModel(model, layout, lengths, weights=weights)


def _tasks(invocation: "Invocation") -> DataSource:
    """Returns the tasks of an invocation's recipe; UserError if it has none."""
    from meshway.launch.recipe import config

    return tasks(**config.load(dataclasses.replace(invocation, verb="infer", subject="tasks")).build("infer.tasks"))


def open_recipe(
    run: Path, bindings: Sequence[str] = (), largest: Callable[[RecipeModel], Workload] | None = None
) -> RecipeModel:
    """Returns model and layout of the recipe of a run, or of a checkpoint's run: the entry point of `Predictor`.
    LAYOUT='auto' is chosen for the `largest` work.

    Raises:
      UserError: there is no recipe, or it is wrong.
    """
    from meshway.launch.invocation import Invocation
    from meshway.launch.recipe import config, files

    invocation = files.of_run(Invocation("infer", "opened", bindings=(f"MODEL_DIR={str(run)!r}", *bindings)))
    auto = largest is not None and files.is_auto(invocation)
    invocation = files.on_one_device(invocation) if auto else invocation
    found = opened(**config.load(invocation, import_unreferenced=False).build("infer.opened"))
    if auto and largest is not None:
        found = layout_choice.with_layout(invocation, found, largest(found))
    return with_vocabularies(found, invocation)


def with_vocabularies(opened: RecipeModel, invocation: "Invocation") -> RecipeModel:
    """Returns what a recipe says, with who looks up the vocabularies of its task; the command may be another verb's."""
    return dataclasses.replace(opened, vocabularies=lambda: _tasks(invocation).vocabularies())


def _source(inputs: Inputs, mode: str, data: DataSource | None) -> Source:
    if inputs.where is not None:
        if inputs.where == "-" and jax.process_count() > 1:
            raise UserError("standard input can be read by one process only; give a file to several")
        return open_source(inputs.where, inputs.format, [name for name in inputs.columns.split(",") if name])
    if inputs.prompts:
        given = inputs.prompts
        return PromptSource([given] if isinstance(given, str) else given, inputs.inputs_field)
    assert data is not None
    assert inputs.split is not None
    needed = ("inputs", "targets") if mode == SCORE else ("inputs",)
    fields = None if inputs.fields is None else [name for name in inputs.fields.split(",") if name]
    return TaskSource(split_tasks(data, inputs.split), inputs.split, needed, fields)  # type: ignore[arg-type]


def _note(line: str) -> None:
    """Prints a note to standard error, once for all processes of the run."""
    if processes.is_primary():
        print(f"meshway: {line}", file=sys.stderr, flush=True)


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config, files

    with processes.joined(*invocation.processes):
        if jax.process_count() > 1:
            # jax has made SIGTERM a question that training asks after each step; here nobody asks.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        auto = files.is_auto(invocation)
        invocation = files.of_run(files.on_one_device(invocation))
        recipe = config.load(dataclasses.replace(invocation, subject="infer"), import_unreferenced=False)
        with recipe.parts("infer.infer", given=["data", "settings"]) as part:  # of gin/runs/infer.gin
            model: RecipeModel = part("opened")  # MODEL, LAYOUT and TASK_FEATURE_LENGTHS
            model_dir: str = part("model_dir")  # MODEL_DIR
            inputs: Inputs = part("inputs")  # --input, --prompt or --split, and how they are read
            output: Output = part("output")  # --output, and how it is written
            decoder: Decoder = part("decoder")  # --temperature, --top_k, --top_p, --num_decodes
            how = part.rest()  # what other flags bind: mode, beams, batch_size, ...
        refuse_idle(invocation.bindings, {"inputs": inputs, "output": output, "decoder": decoder, **how})
        if auto:
            if how.get("mode") == SCORE:
                raise UserError("--layout=auto chooses for predictions: with --mode=score name a layout, as data")
            sizes = [how.get("batch_size", _BATCH_SIZE), how.get("max_input_length"), how.get("max_new_tokens")]
            work = model.largest(BeamSearch(how["beams"]) if how.get("beams") else decoder, *sizes)
            model = layout_choice.with_layout(invocation, model, work, invocation.options.topology, _note)
        model = with_vocabularies(model, invocation)
        data = None if inputs.split is None else _tasks(invocation)
        settings = recipe.settings("infer.opened", ("layout",)) | recipe.settings("infer.infer", _HOW)
        infer(model, model_dir, inputs, output, decoder, **how, data=data, settings=by_flag(settings))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["infer", *sys.argv[1:]]))
