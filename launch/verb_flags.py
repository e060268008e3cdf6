"""The flags of each verb, as dataclasses: a flag is a field. Light: `--help` must be quick.

A flag of a verb is short for a binding of its recipe; see `launch/flags.py`.
"""

import dataclasses
from typing import Literal

from meshway.launch.flags import binds, flag, not_negative, share


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """Of a verb that has none of its own."""


@dataclasses.dataclass(frozen=True)
class RecipeFlags:
    """Where a recipe is; `--gin.NAME=VALUE` is read apart."""

    gin_file: tuple[str, ...] = flag(
        "a recipe, by path or by name among the shipped ones; repeat to add files, later ones win", "FILE", ()
    )
    gin_search_paths: tuple[str, ...] = flag("folders to look for gin files in, before the shipped ones", "DIR,DIR", ())


@dataclasses.dataclass(frozen=True)
class ProcessFlags:
    """Devices and processes of a verb that computes."""

    simulated_devices: int | None = flag("simulate N CPU devices in this process", "N", None)
    coordinator_address: str | None = flag("where process 0 of several listens", "HOST:PORT", None)
    num_processes: int | None = flag("how many processes run together", "N", None)
    process_id: int | None = flag("which of them this is, from 0", "I", None, least=0)


@dataclasses.dataclass(frozen=True)
class TrainFlags:
    dry_run: bool = flag("check and print all that a run resolves before its first step; write nothing", default=False)


@dataclasses.dataclass(frozen=True)
class EvalFlags:
    model_dir: str | None = binds("MODEL_DIR", "the run to evaluate; its own recipe serves without --gin_file", "DIR")
    steps: str | None = binds(
        "evaluate.evaluate.steps", "latest (default), all (default with --watch), 100 or 100,200", "STEPS"
    )
    watch: bool = binds("evaluate.evaluate.watch", "evaluate each checkpoint as it appears, until the run has finished")
    idle_timeout: int | None = binds(
        "evaluate.evaluate.idle_timeout", "with --watch: end when so many seconds brought no new checkpoint", "SECONDS"
    )
    task: str | None = binds("MIXTURE_OR_TASK_NAME", "the registered task or mixture, if not the recipe's", "NAME")
    module: str | None = binds("MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE")
    split: str | None = binds("evaluate.evaluate.split", "which split (default: the recipe's for validation)", "SPLIT")
    max_predictions: int | None = binds(
        "evaluate.evaluate.max_predictions",
        "examples of each task to predict and to score for its metric functions (default: all)",
        "N",
        least=0,
    )
    finished: bool = binds("evaluate.evaluate.finished", "refuse (exit 2) a run that has not saved its last step")
    again: bool = binds("evaluate.evaluate.again", "evaluate what has been evaluated, too")
    averaged: bool = binds("evaluate.evaluate.averaged", "evaluate the averages of parameters that the run kept")
    weights: Literal["int8", "int4"] | None = binds(
        "evaluate.evaluate.weights", "print what weights in so many bits cost, and write nothing", "DTYPE"
    )
    cache: Literal["float32", "bfloat16", "int8"] | None = flag(
        "the same of keys and values, read through the cache", "DTYPE", None
    )


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """How predictions are drawn."""

    temperature: float | None = binds(
        "sampling.Sampling.temperature", "0 (default) takes the likeliest token", "X", reads=not_negative
    )
    top_k: int | None = binds("sampling.Sampling.top_k", "draw from the k likeliest tokens", "K")
    top_p: float | None = binds(
        "sampling.Sampling.top_p", "draw from the likeliest that together reach p", "P", reads=share
    )
    num_decodes: int | None = binds("sampling.Sampling.num_decodes", "predictions of each example", "N")


@dataclasses.dataclass(frozen=True)
class LayoutFlags:
    """Where a model that predicts lies."""

    layout: str | None = binds(
        "LAYOUT",
        "a shipped layout or a gin file (default: the recipe's); auto: inference's best by cost",
        "NAME",
    )
    topology: str | None = flag(
        "with --layout=auto: what to count the devices as, v4:2x2x2 (default: what they are)", "CHIP:SIDES", None
    )


@dataclasses.dataclass(frozen=True)
class InferFlags(SamplingFlags, LayoutFlags):
    model_dir: str | None = binds(
        "MODEL_DIR", "the run, or one of its checkpoints; its own recipe serves without --gin_file", "DIR"
    )
    input: str | None = binds(
        "infer.Inputs.where", "a .jsonl, .tsv, .txt, .parquet or .tfrecord file, a quoted glob, or - for stdin", "FILE"
    )
    prompt: tuple[str, ...] | None = binds(
        "infer.Inputs.prompts",
        "a text to answer, on the terminal unless --output is given; repeat for more",
        "TEXT",
    )
    split: str | None = binds("infer.Inputs.split", "read this split of the recipe's task (or --task) instead", "SPLIT")
    fields: str | None = binds(
        "infer.Inputs.fields",
        "with --split: features to keep beside text (id,inputs; all; default: *_pretokenized)",
        "NAMES",
    )
    output: str | None = binds(
        "infer.Output.where", "a .jsonl, .parquet or .txt file to make, or a folder of shards", "FILE"
    )
    mode: Literal["predict", "score", "predict_with_aux"] | None = binds(
        "infer.infer.mode", "predict (default), score (given targets), predict_with_aux", "MODE"
    )
    aux: str | None = binds(
        "infer.infer.aux", "predict_with_aux: intermediate values by name, as decoder_output", "NAMES"
    )
    step: int | None = binds("infer.infer.step", "which checkpoint (default: the latest)", "N", least=0)
    averaged: bool = binds("infer.infer.averaged", "read the averages of parameters that the run kept (EMA_DECAY)")
    batch_size: int | None = binds("infer.infer.batch_size", "examples in a batch (default: 32)", "N")
    max_input_length: int | None = binds("infer.infer.max_input_length", "tokens of the longest prompt", "N")
    max_new_tokens: int | None = binds("infer.infer.max_new_tokens", "most tokens of a prediction", "N")
    truncate: bool = binds("infer.Inputs.truncate", "truncate longer prompts instead of refusing them")
    weights: Literal["int8", "int4"] | None = binds(
        "infer.opened.weights", "keep weights in so many bits (default: as in the checkpoint)", "DTYPE"
    )
    beams: int | None = binds("infer.infer.beams", "beam search with so many beams", "N")
    seed: int | None = binds("infer.infer.seed", "of sampling (default: 0)", "N", least=0)
    stop: tuple[str, ...] | None = binds(
        "infer.infer.stop", "a text that ends a prediction, which it is part of; repeat for more", "TEXT"
    )
    format: Literal["jsonl", "tsv", "text", "parquet", "tfrecord"] | None = binds(
        "infer.Inputs.format", "jsonl, tsv, text, parquet or tfrecord, where the file's name does not tell", "FORMAT"
    )
    columns: str | None = binds(
        "infer.Inputs.columns", "names of TSV columns without a header (inputs,targets)", "NAMES"
    )
    inputs_field: str | None = binds("infer.Inputs.inputs_field", "the field of a prompt (default: inputs)", "NAME")
    begin_field: str | None = binds(
        "infer.Inputs.begin_field", "the field with what a prediction must begin with", "NAME"
    )
    targets_field: str | None = binds("infer.Inputs.targets_field", "the field of a target (default: targets)", "NAME")
    on_bad: Literal["fail", "skip"] | None = binds(
        "infer.Inputs.on_bad", "a record that cannot be used: fail (default) or skip", "POLICY"
    )
    task: str | None = binds("MIXTURE_OR_TASK_NAME", "with --split: the task or mixture, if not the recipe's", "NAME")
    preprocess: str | None = binds(
        "infer.Inputs.preprocess", "a task whose preprocessors make the inputs of a record", "TASK"
    )
    module: str | None = binds("MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE")
    chunk_size: int | None = binds("infer.Output.chunk_size", "records committed at a time (default: 16 batches)", "N")
    output_format: Literal["jsonl", "parquet"] | None = binds(
        "infer.Output.format", "jsonl (default) or parquet, of a folder's shards", "FORMAT"
    )
    writer: str | None = binds(
        "infer.Output.writer", "a class that writes a format of its own (mylab.writers.Csv)", "CLASS"
    )
    overwrite: bool = binds("infer.Output.overwrite", "remove what an earlier job left there")
    num_shards: int | None = binds(
        "infer.Output.num_shards", "share the input among N independent jobs with one --output", "N"
    )
    shard_id: int | None = binds("infer.Output.shard_id", "which of them this is, from 0", "I", least=0)


@dataclasses.dataclass(frozen=True)
class ExportFlags(SamplingFlags):
    model_dir: str | None = binds(
        "MODEL_DIR", "the run, or one of its checkpoints; its own recipe serves without --gin_file", "DIR"
    )
    output: str | None = binds("export.export.output", "the folder to make", "DIR")
    platforms: str | None = binds(
        "export.export.platforms", "cpu, tpu, cuda or rocm, as cpu,tpu (default: this machine's)", "NAMES"
    )
    modes: str | None = binds("export.export.modes", "predict, score or both (default)", "NAMES")
    step: int | None = binds("export.export.step", "which checkpoint (default: the latest)", "N", least=0)
    batch_size: int | None = binds("export.export.batch_size", "rows of a batch (default: 8)", "N")
    max_input_length: int | None = binds("export.export.max_input_length", "tokens of the longest prompt", "N")
    max_new_tokens: int | None = binds("export.export.max_new_tokens", "most tokens of a prediction", "N")
    weights: Literal["int8", "int4"] | None = binds(
        "infer.opened.weights", "keep weights in so many bits (default: as in the checkpoint)", "DTYPE"
    )
    beams: int | None = binds("export.export.beams", "beam search with so many beams", "N")
    saved_model: bool = binds("export.export.saved_model", "write a TensorFlow SavedModel too")


@dataclasses.dataclass(frozen=True)
class ServeFlags(LayoutFlags):
    model_dir: str | None = binds(
        "MODEL_DIR", "the run, or one of its checkpoints; its own recipe serves without --gin_file", "DIR"
    )
    name: str | None = binds("serve.serve.name", "of the model in requests (default: the run's)", "NAME")
    step: int | None = binds("serve.serve.step", "which checkpoint (default: the latest)", "N", least=0)
    averaged: bool = binds("serve.serve.averaged", "read the averages of parameters that the run kept (EMA_DECAY)")
    chat_template: str | None = binds(
        "serve.serve.chat_template", "a folder with chat_template.jinja (default: a converted run's own)", "DIR"
    )
    batch_dir: str | None = binds("serve.serve.batch_dir", "serve files and batches, which are kept there", "DIR")
    weights: Literal["int8", "int4"] | None = binds(
        "infer.opened.weights", "keep weights in so many bits (default: as in the checkpoint)", "DTYPE"
    )
    host: str | None = binds("serve.Door.host", "where to listen (default: 127.0.0.1, this machine alone)", "HOST")
    port: int | None = binds("serve.Door.port", "0 takes a free one, and says which (default: 8000)", "N", least=0)
    token_file: str | None = binds(
        "serve.Door.token_file", "bearer tokens, one a line, of which each request must bear one", "FILE"
    )
    max_body_bytes: int | None = binds("serve.Door.max_body_bytes", "of a request (default: 4194304)", "N")
    request_seconds: int | None = binds("serve.Door.request_seconds", "that a request may take (default: any)", "N")
    drain_seconds: int | None = binds(
        "serve.Door.drain_seconds", "for what has begun, once SIGTERM came (default: 30)", "N", least=0
    )
    slots: int | None = binds("serve.Room.slots", "requests that are decoded together (default: 8)", "N")
    max_length: int | None = binds(
        "serve.Room.max_length", "tokens of a slot: prompt and prediction; behind an encoder, prediction", "N"
    )
    max_input_length: int | None = binds("serve.Room.max_input_length", "tokens of the longest prompt", "N")
    kept_prompts: int | None = binds(
        "serve.Room.kept_prompts", "prompts kept for others that begin alike (default: 4)", "N", least=0
    )
    guesses: int | None = binds(
        "serve.Room.guesses", "tokens guessed in a step, from what followed the same few (default: 0)", "N", least=0
    )
    beams: int | None = binds("serve.Room.beams", "serve beam searches of at most so many (default: none)", "N")
    beam_slots: int | None = binds("serve.Room.beam_slots", "searches that go on together (default: 2)", "N")
    max_queue: int | None = binds("serve.Room.max_queue", "predictions that may wait (default: 256)", "N")
    chunk: int | None = binds("serve.Room.chunk", "tokens of a prompt read between two steps (default: 64)", "N")
    max_top_log_probs: int | None = binds(
        "serve.Room.max_top_log_probs", "likeliest tokens that may be asked for (default: 20)", "N", least=0
    )


@dataclasses.dataclass(frozen=True)
class StatusFlags:
    model_dir: str = flag("the run directory", "DIR")
    json: bool = flag("print it as JSON", default=False)


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    topology: str = binds(
        "plan.plan.topology", "the chips: v5p:4x4x8, v4:4x4x4x2slices, h100:8", "CHIP:SIDES", required=True
    )
    phase: Literal["train", "prefill", "decode", "score"] | None = flag(
        "train, prefill, decode or, with --compile, score (default: train of a recipe with an optimizer, else prefill "
        "and decode)",
        "PHASE",
        None,
    )
    compile: bool = flag(
        "of inference: compile its programs for the topology, by the layout chosen or by --gin.LAYOUT", default=False
    )
    fit: bool = binds(
        "plan.Training.fit", "of training: search mesh, layout, remat and microbatches for the fastest way that fits"
    )
    analytic: bool = binds("plan.Training.analytic", "of training: closed forms alone, in seconds; compile nothing")
    batch: int | None = binds("plan.plan.batch", "sequences (default: 1)", "N")
    context: int | None = binds(
        "plan.plan.context", "tokens of a prompt, and those that a step of decoding reads (default: 2048)", "N"
    )
    new_tokens: int | None = binds("plan.plan.new_tokens", "steps after a prompt (default: 128)", "N")
    weights: Literal["float32", "bfloat16", "int8"] | None = binds(
        "plan.plan.weights", "float32, bfloat16 (default) or int8", "DTYPE"
    )
    cache: Literal["float32", "bfloat16", "int8"] | None = binds(
        "plan.plan.cache", "of keys and values: float32, bfloat16 (default) or int8", "DTYPE"
    )
    html: str | None = binds("plan.Training.html", "of training: write the plan as a page, too", "PATH")
    wires: Literal["flat", "torus"] | None = binds(
        "plan.plan.wires",
        "collectives have all links of a chip (flat, default) or those of their axes (torus)",
        "WIRES",
    )
    overlap: bool = binds("plan.plan.overlap", "collectives go on beside products")
    json: bool = flag("print it as JSON", default=False)


@dataclasses.dataclass(frozen=True)
class InspectLayoutFlags:
    hardware: str | None = binds(
        "inspection.layout.hardware", "report whether a step fits this chip (v5p, 'H100 NVL')", "CHIP"
    )
    compile: bool = binds("inspection.layout.compile", "compile the step, report what it sends over which axes")
    hlo: bool = binds("inspection.layout.hlo", "print the collectives of compiled programs, and donated arrays copied")
    programs: str | None = binds(
        "inspection.layout.programs", "with --hlo: some of step,score,prefill,decode (default: step)", "NAMES"
    )


@dataclasses.dataclass(frozen=True)
class InspectDataFlags:
    batches: int | None = binds("inspection.data.batches", "batches drawn for figures (default: 20)", "N")
    rows: int | None = binds("inspection.data.rows", "rows to show of each source (default: 3)", "N", least=0)
    html: str | None = binds("inspection.data.html", "the page (default: data.html in MODEL_DIR, or here)", "PATH")


@dataclasses.dataclass(frozen=True)
class CacheFlags:
    task: str | None = binds("MIXTURE_OR_TASK_NAME", "the registered task or mixture, if not the recipe's", "NAME")
    module: str | None = binds("MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE")
    directory: str | None = binds("CACHE_DIR", "where to keep it (default: meshway/tasks in the user's cache)", "DIR")
    splits: str | None = binds("cache.cache.splits", "which splits (train,validation; default: all)", "SPLITS")
    num_shards: int | None = binds("cache.cache.num_shards", "files of each split (default: 8)", "N")
    workers: int | None = binds("cache.cache.workers", "processes (default: one a core)", "N")
    overwrite: bool = binds("cache.cache.overwrite", "remove what is cached of the task first, all splits of it")
    from_seqio: str | None = binds(
        "cache.cache.from_seqio", "take the examples that seqio_cache_tasks wrote there; no preprocessor runs", "DIR"
    )
    part: str | None = binds("cache.cache.part", "build part I of N of the shards, on each of N machines one", "I/N")
    max_bad_examples: int | None = binds(
        "cache.cache.max_bad_examples",
        "examples of a split that may fail in a preprocessor; they are left out and reported (default: 0)",
        "N",
        least=0,
    )


@dataclasses.dataclass(frozen=True)
class ConvertFlags:
    source: str = binds(
        "convert.convert.source",
        "a Hugging Face directory, a checkpoint of T5X or Mesh-TensorFlow, or a run to write out",
        "DIR",
        name="--from",
        required=True,
    )
    to: str | None = binds(
        "convert.convert.target", "the directory to make: a run, a Hugging Face or (--family=t5x) a T5X one", "DIR"
    )
    family: str | None = binds("convert.convert.family", "what the model is, or t5x (default: config.json's)", "FAMILY")
    dtype: Literal["float32", "bfloat16", "float16", "keep"] | None = binds(
        "convert.convert.dtype", "float32, bfloat16, float16 or keep (default: keep)", "DTYPE"
    )
    step: int | None = binds(
        "convert.convert.step", "which checkpoint of a run, or of T5X (default: the latest)", "N", least=0
    )
    averaged: bool = binds("convert.convert.averaged", "write out the averages of parameters that a run kept")
    max_shard_size: str | None = binds(
        "convert.convert.max_shard_size", "the most of a safetensors file (default: 5GB)", "SIZE"
    )
    vocabulary: str | None = binds(
        "convert.convert.vocabulary", "the SentencePiece model of a T5X checkpoint's task", "FILE"
    )
    optimizer_state: bool = binds("convert.convert.optimizer_state", "the state of T5X's Adafactor too, in or out")
    ignore_fields: str | None = binds(
        "convert.convert.ignore_fields", "fields of config.json to pass over: they change nothing (a,b)", "FIELDS"
    )
