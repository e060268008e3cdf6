"""The verbs of the command line, their flags, and examples of them. Light: `--help` must be quick."""

import dataclasses
from collections.abc import Callable
from typing import Any

from meshway.launch.invocation import MACROS, not_negative, share


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag: a short word for a binding.

    Attributes:
      flag: as `--task`.
      binding: `NAME=VALUE` for a flag without a value, `NAME` for one that takes it.
      help: what it is for.
      value: what the help calls the value; "" for none.
      number: whether the value is a whole number.
      real: what reads a value that is another number; neither means text.
      choices: what a text may be; () for anything.
      least: the least whole number that means something.
      repeats: whether it may be given several times; the binding is the list of all values.
    """

    flag: str
    binding: str
    help: str
    value: str = ""
    number: bool = False
    real: Callable[[str], float] | None = None
    choices: tuple[str, ...] = ()
    least: int = 1
    repeats: bool = False

    def bound(self, value: Any) -> str:
        """Returns the binding for a value read from the command line."""
        return f"{self.binding}={value!r}" if self.value else self.binding


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: its module's `run(invocation)` does the work, and is imported only then."""

    module: str
    help: str
    subjects: tuple[str, ...] = ()  # what the word after the verb may be
    is_room: bool = False  # whether `module` is a folder, with a module for each subject
    default: str = ""  # the subject where that word is left out
    dry_run: bool = False
    switches: tuple[Flag, ...] = ()
    instead: str = ""  # the flag that serves where no recipe is given
    recipe: bool = True  # whether it takes one at all
    on_devices: bool = True
    slow: bool = True  # whether it takes seconds to start, and says what it is doing
    macros: tuple[str, ...] = tuple(MACROS)  # those that the help lists


_BENCH = (
    Flag(
        "--interleave",
        "bench.train.measure.interleave=True",
        "train: speak the burst protocol on a pipe, to be timed in turn with other programs",
    ),
    Flag("--seconds", "bench.data.measure.seconds", "data: how long to time (default: 45)", "N", number=True),
    Flag("--batches", "bench.data.measure.batches", "data: over how many batches memory is watched", "N", number=True),
    Flag(
        "--workers", "bench.data.measure.workers", "data: processes (default: one a core, 4 at most)", "N", number=True
    ),
    Flag("--json", "bench.data.measure.as_json=True", "data: print the results as JSON too"),
    Flag(
        "--layouts",
        "bench.parallel.measure.layouts",
        "parallel: which (fsdp,model_1d; default: all shipped)",
        "LAYOUTS",
    ),
    Flag("--steps", "bench.parallel.measure.steps", "parallel: steps to time too (default: none)", "N", number=True),
    Flag(
        "--seeds", "bench.routing.Routing.seeds", "routing: how many seeds to train from (default: 4)", "N", number=True
    ),
    Flag(
        "--prompt_length",
        "bench.decode.Setting.prompt_length",
        "decode: tokens a prompt (default: 128)",
        "N",
        number=True,
    ),
    Flag(
        "--new_tokens",
        "bench.decode.Setting.new_tokens",
        "decode: new tokens in a turn (default: 16)",
        "N",
        number=True,
    ),
)

_INSPECT = (
    Flag(
        "--hardware",
        "inspection.layout.hardware",
        "layout: say whether a step fits this chip (v5p, 'H100 NVL')",
        "CHIP",
    ),
    Flag("--compile", "inspection.layout.compile=True", "layout: compile the step, say what it sends over which axes"),
    Flag("--batches", "inspection.data.batches", "data: batches drawn for figures (default: 20)", "N", number=True),
    Flag("--rows", "inspection.data.rows", "data: rows to show of each source (default: 3)", "N", True, least=0),
    Flag("--html", "inspection.data.html", "data: the page (default: data.html in MODEL_DIR, or here)", "PATH"),
)

_CACHE = (
    Flag("--task", "MIXTURE_OR_TASK_NAME", "the registered task or mixture, if not the recipe's", "NAME"),
    Flag("--module", "MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE"),
    Flag("--directory", "CACHE_DIR", "where to keep it (default: meshway/tasks in the user's cache)", "DIR"),
    Flag("--splits", "cache.cache.splits", "which splits (train,validation; default: all)", "SPLITS"),
    Flag("--num_shards", "cache.cache.num_shards", "files of each split (default: 8)", "N", number=True),
    Flag("--workers", "cache.cache.workers", "processes (default: one a core)", "N", number=True),
    Flag("--overwrite", "cache.cache.overwrite=True", "remove what is cached of the task first, all splits of it"),
    Flag(
        "--max_bad_examples",
        "cache.cache.max_bad_examples",
        "examples of a split that may fail in a preprocessor; they are left out and reported (default: 0)",
        "N",
        number=True,
        least=0,
    ),
)

_CONVERT = (
    Flag("--from", "convert.convert.source", "a Hugging Face directory, T5X checkpoints, or a run to write out", "DIR"),
    Flag("--to", "convert.convert.target", "the directory to make: a run directory, or a Hugging Face one", "DIR"),
    Flag("--family", "convert.convert.family", "what the model is (default: what config.json says)", "FAMILY"),
    Flag(
        "--dtype",
        "convert.convert.dtype",
        "float32, bfloat16, float16 or keep (default: keep)",
        "DTYPE",
        choices=("float32", "bfloat16", "float16", "keep"),
    ),
    Flag("--step", "convert.convert.step", "which checkpoint of a run (default: the latest)", "N", True, least=0),
    Flag("--max_shard_size", "convert.convert.max_shard_size", "of a safetensors file (default: 5GB)", "SIZE"),
    Flag("--vocabulary", "convert.convert.vocabulary", "the SentencePiece model of a T5X checkpoint's task", "FILE"),
    Flag("--ignore_fields", "convert.convert.ignore_fields", "of config.json, that change nothing (a,b)", "FIELDS"),
)

_EVAL = (
    Flag("--model_dir", "MODEL_DIR", "the run to evaluate; its own recipe serves without --gin_file", "DIR"),
    Flag("--steps", "evaluate.evaluate.steps", "latest (default), all (default with --watch), 100 or 100,200", "STEPS"),
    Flag(
        "--watch", "evaluate.evaluate.watch=True", "evaluate each checkpoint as it appears, until the run has finished"
    ),
    Flag(
        "--idle_timeout",
        "evaluate.evaluate.idle_timeout",
        "with --watch: end when so many seconds brought no new checkpoint",
        "SECONDS",
        number=True,
    ),
    Flag("--task", "MIXTURE_OR_TASK_NAME", "the registered task or mixture, if not the recipe's", "NAME"),
    Flag("--module", "MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE"),
    Flag("--split", "evaluate.evaluate.split", "which split (default: the recipe's validation split)", "SPLIT"),
    Flag(
        "--max_predictions",
        "evaluate.evaluate.max_predictions",
        "examples of each task to predict and to score for its metric functions (default: all)",
        "N",
        number=True,
        least=0,
    ),
    Flag("--finished", "evaluate.evaluate.finished=True", "refuse (exit 2) a run that has not saved its last step"),
    Flag("--again", "evaluate.evaluate.again=True", "evaluate what has been evaluated, too"),
)

_INFER = (
    Flag(
        "--model_dir",
        "MODEL_DIR",
        "the run, or one of its checkpoints; its own recipe serves without --gin_file",
        "DIR",
    ),
    Flag(
        "--input", "infer.Inputs.where", "a .jsonl, .tsv, .txt or .parquet file, a quoted glob, or - for stdin", "FILE"
    ),
    Flag(
        "--prompt",
        "infer.Inputs.prompts",
        "a text to answer, on the terminal unless --output is given; repeat for more",
        "TEXT",
        repeats=True,
    ),
    Flag("--split", "infer.Inputs.split", "read this split of the recipe's task (or --task) instead", "SPLIT"),
    Flag("--output", "infer.Output.where", "a .jsonl, .parquet or .txt file to make, or a folder of shards", "FILE"),
    Flag(
        "--mode",
        "infer.infer.mode",
        "predict (default), score (given targets), predict_with_aux",
        "MODE",
        choices=("predict", "score", "predict_with_aux"),
    ),
    Flag("--aux", "infer.infer.aux", "predict_with_aux: intermediate values by name, as decoder_output", "NAMES"),
    Flag("--step", "infer.infer.step", "which checkpoint (default: the latest)", "N", True, least=0),
    Flag("--batch_size", "infer.infer.batch_size", "examples in a batch (default: 32)", "N", number=True),
    Flag("--max_input_length", "infer.infer.max_input_length", "tokens of the longest prompt", "N", number=True),
    Flag("--max_new_tokens", "infer.infer.max_new_tokens", "most tokens of a prediction", "N", number=True),
    Flag("--truncate", "infer.Inputs.truncate=True", "cut prompts that are longer, instead of refusing them"),
    Flag(
        "--temperature",
        "sampling.Sampling.temperature",
        "0 (default) takes the likeliest token",
        "X",
        real=not_negative,
    ),
    Flag("--top_k", "sampling.Sampling.top_k", "draw from the k likeliest tokens", "K", number=True),
    Flag("--top_p", "sampling.Sampling.top_p", "draw from the likeliest that together reach p", "P", real=share),
    Flag("--num_decodes", "sampling.Sampling.num_decodes", "predictions of each example", "N", number=True),
    Flag("--beams", "infer.infer.beams", "beam search with so many beams", "N", number=True),
    Flag("--seed", "infer.infer.seed", "of sampling (default: 0)", "N", True, least=0),
    Flag(
        "--stop",
        "infer.infer.stop",
        "a text that ends a prediction, which it is part of; repeat for more",
        "TEXT",
        repeats=True,
    ),
    Flag(
        "--format",
        "infer.Inputs.format",
        "jsonl, tsv, text or parquet, where the file's name does not tell",
        "FORMAT",
        choices=("jsonl", "tsv", "text", "parquet"),
    ),
    Flag("--columns", "infer.Inputs.columns", "names of TSV columns without a header (inputs,targets)", "NAMES"),
    Flag("--inputs_field", "infer.Inputs.inputs_field", "the field of a prompt (default: inputs)", "NAME"),
    Flag("--begin_field", "infer.Inputs.begin_field", "the field with what a prediction must begin with", "NAME"),
    Flag("--targets_field", "infer.Inputs.targets_field", "the field of a target (default: targets)", "NAME"),
    Flag(
        "--on_bad",
        "infer.Inputs.on_bad",
        "a record that cannot be used: fail (default) or skip",
        "POLICY",
        choices=("fail", "skip"),
    ),
    Flag("--task", "MIXTURE_OR_TASK_NAME", "with --split: the task or mixture, if not the recipe's", "NAME"),
    Flag("--preprocess", "infer.Inputs.preprocess", "a task whose preprocessors make the inputs of a record", "TASK"),
    Flag("--module", "MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE"),
    Flag(
        "--chunk_size", "infer.Output.chunk_size", "records committed at a time (default: 16 batches)", "N", number=True
    ),
    Flag(
        "--output_format",
        "infer.Output.format",
        "jsonl (default) or parquet, of a folder's shards",
        "FORMAT",
        choices=("jsonl", "parquet"),
    ),
    Flag("--overwrite", "infer.Output.overwrite=True", "remove what an earlier job left there"),
)

_STATUS = (
    Flag("--model_dir", "MODEL_DIR", "the run directory", "DIR"),
    Flag("--json", "status.as_json=True", "print it as JSON"),
)

VERBS = {
    "train": Verb("meshway.launch.train", "train a recipe, or go on from its last checkpoint", dry_run=True),
    "eval": Verb(
        "meshway.launch.evaluate",
        "evaluate checkpoints of a run: one, several, or each as it appears",
        switches=_EVAL,
        instead="--model_dir",
        macros=("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "BATCH_SIZE", "CACHE_DIR", "LAYOUT"),
    ),
    "infer": Verb(
        "meshway.launch.infer",
        "predict or score an input with a run's checkpoint; killed and run again, it goes on",
        switches=_INFER,
        instead="--model_dir",
        macros=("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "TASK_FEATURE_LENGTHS", "CACHE_DIR", "LAYOUT"),
    ),
    "status": Verb(
        "meshway.launch.status",
        "say how a run stands: who runs it, its steps reported and saved, rate and end, last evaluation",
        switches=_STATUS,
        instead="--model_dir",
        recipe=False,
        on_devices=False,
        slow=False,
        macros=(),
    ),
    "inspect": Verb(
        "meshway.launch.inspection",
        "print every tensor: axes, sharding, bytes a device, and the rule; or what the data is like",
        subjects=("layout", "data"),
        default="layout",
        switches=_INSPECT,
    ),
    "cache": Verb(
        "meshway.launch.cache",
        "prepare the tasks of a recipe, or --task, once and keep them",
        switches=_CACHE,
        instead="--task",
        on_devices=False,
        macros=("MIXTURE_OR_TASK_NAME", "MIXTURE_OR_TASK_MODULE", "CACHE_DIR"),
    ),
    "convert": Verb(
        "meshway.launch.convert",
        "take a Hugging Face or T5X model in, with its recipe, or write a Hugging Face one",
        switches=_CONVERT,
        instead="--from",
        recipe=False,
        on_devices=False,
        macros=(),
    ),
    "bench": Verb(
        "meshway.launch.bench",
        "time a recipe's step on synthetic data, or its data path; or count what layouts make devices send",
        subjects=("train", "data", "parallel", "routing", "moe", "attention", "decode"),
        is_room=True,
        switches=_BENCH,
    ),
    "launch": Verb(
        "meshway.launch.cluster.launch",
        "run a command on many processes, here or on a cluster",
        on_devices=False,
        slow=False,
    ),
}


def module_of(verb: str, subject: str | None) -> str:
    """Returns the name of the module whose `run` does a command's work."""
    entry = VERBS[verb]
    return f"{entry.module}.{subject}" if entry.is_room else entry.module


USAGE = """examples:
  meshway train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=runs/quickstart
  meshway train --gin_file=my.gin --gin.MODEL_DIR=/tmp/run --gin.LAYOUT=fsdp --dry_run
  meshway eval --model_dir=runs/quickstart
  meshway eval --model_dir=runs/quickstart --steps=all --split=train --max_predictions=100
  meshway eval --model_dir=runs/quickstart --watch --idle_timeout=3600
  meshway infer --model_dir=runs/quickstart --input=questions.jsonl --output=answers.jsonl
  meshway infer --model_dir=runs/quickstart --prompt="Return the <extra_id_0> of the list." --max_new_tokens=20
  meshway infer --model_dir=runs/quickstart --split=validation --mode=score --output=scores.parquet
  meshway infer --model_dir=runs/llama --input=prompts.txt --output=out --temperature=0.8 --top_p=0.95 --num_decodes=4
  meshway status runs/quickstart
  meshway inspect --gin_file=quickstart --gin.LAYOUT=fsdp --simulated_devices=8
  meshway inspect data --gin_file=quickstart --rows=5 --html=data.html
  meshway bench train --gin_file=quickstart
  meshway bench data --gin_file=quickstart
  meshway bench parallel --gin_file=quickstart --simulated_devices=8
  meshway bench routing --gin_file=v_moe_digits
  meshway bench moe --gin_file=bench_moe --simulated_devices=8 --gin.LAYOUT=expert
  meshway bench attention --gin_file=bench_attention
  meshway bench decode --gin_file=bench_decode
  meshway cache --gin_file=quickstart
  meshway cache --task=my_task --module=mylab.tasks --directory=/data/cache
  meshway convert --from=models/Llama-3.2-1B --to=runs/llama
  meshway convert --from=runs/llama --to=exported --dtype=bfloat16
  meshway launch local --processes=4 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/four

Exit codes: 0 done, 1 the machine or the program failed, 2 the command or the recipe is wrong, 75 another process of the
run was lost (started again, it goes on from the last checkpoint), 130 Ctrl-C (training saves first), 143 SIGTERM
(training saves and exits with 0, under `launch worker` with 143), 141 nobody reads its output any more. After
`train ... &&`, `eval --finished ...` evaluates no run that was stopped.
MESHWAY_TRACEBACK=1 shows the traceback of every error. `meshway VERB --help` lists a verb's options.
"""
