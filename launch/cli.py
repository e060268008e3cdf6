"""`meshway <verb>`: reads the command line, runs the verb, turns errors into messages and exit codes."""

import argparse
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from meshway.framework.errors import EnvironmentFailure, UserError, did_you_mean, report
from meshway.launch.arguments import Parser, count, help_formatter, whole
from meshway.launch.invocation import MACROS, Invocation


@dataclasses.dataclass(frozen=True)
class Switch:
    """A flag: a short word for a binding.

    Attributes:
      flag: as `--task`.
      binding: `NAME=VALUE` for a flag without a value, `NAME` for one that takes it.
      help: what it is for.
      value: what the help calls the value; "" for none.
      number: whether the value is a whole number; else it is text.
    """

    flag: str
    binding: str
    help: str
    value: str = ""
    number: bool = False

    def bound(self, value: Any) -> str:
        """Returns the binding for a value read from the command line."""
        return f"{self.binding}={value!r}" if self.value else self.binding


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: its module's `run(invocation)` does the work, and is imported only then."""

    module: str
    help: str
    subjects: tuple[str, ...] = ()  # what the word after the verb may be
    default: str = ""  # the subject where that word is left out
    dry_run: bool = False
    switches: tuple[Switch, ...] = ()
    instead: str = ""  # the flag that serves where no recipe is given
    recipe: bool = True  # whether it takes one at all
    on_devices: bool = True
    macros: tuple[str, ...] = tuple(MACROS)  # those that the help lists


_BENCH = (
    Switch(
        "--interleave",
        "bench.train.interleave=True",
        "train: speak the burst protocol on a pipe, to be timed in turn with other programs",
    ),
    Switch("--seconds", "bench.data.seconds", "data: how long to time (default: 45)", "N", number=True),
    Switch("--batches", "bench.data.batches", "data: over how many batches memory is watched", "N", number=True),
    Switch("--workers", "bench.data.workers", "data: processes (default: one a core, 4 at most)", "N", number=True),
    Switch("--json", "bench.data.as_json=True", "data: print the results as JSON too"),
    Switch("--layouts", "bench.parallel.layouts", "parallel: which (fsdp,model_1d; default: all shipped)", "LAYOUTS"),
    Switch("--steps", "bench.parallel.steps", "parallel: steps to time too (default: none)", "N", number=True),
    Switch("--seeds", "bench.routing.seeds", "routing: how many seeds to train from (default: 4)", "N", number=True),
)

_INSPECT = (
    Switch("--compile", "inspect.layout.compile=True", "layout: compile the step, say what it sends over which axes"),
    Switch("--batches", "inspect.data.batches", "data: batches drawn for figures (default: 20)", "N", number=True),
    Switch("--rows", "inspect.data.rows", "data: rows to show of each source (default: 3)", "N", number=True),
    Switch("--html", "inspect.data.html", "data: the page (default: data.html in MODEL_DIR, or here)", "PATH"),
)

_CACHE = (
    Switch("--task", "MIXTURE_OR_TASK_NAME", "the registered task or mixture, if not the recipe's", "NAME"),
    Switch("--module", "MIXTURE_OR_TASK_MODULE", "the Python module that registers it (mylab.tasks)", "MODULE"),
    Switch("--directory", "CACHE_DIR", "where to keep it (default: meshway/tasks in the user's cache)", "DIR"),
    Switch("--splits", "cache.cache.splits", "which splits (train,validation; default: all)", "SPLITS"),
    Switch("--num_shards", "cache.cache.num_shards", "files of each split (default: 8)", "N", number=True),
    Switch("--workers", "cache.cache.workers", "processes (default: one a core)", "N", number=True),
    Switch("--overwrite", "cache.cache.overwrite=True", "remove what is cached of the task first, all splits of it"),
    Switch(
        "--max_bad_examples",
        "cache.cache.max_bad_examples",
        "examples of a split that may fail in a preprocessor; they are left out and reported (default: 0)",
        "N",
        number=True,
    ),
)

_CONVERT = (
    Switch(
        "--from", "convert.convert.source", "a Hugging Face directory, T5X checkpoints, or a run to write out", "DIR"
    ),
    Switch("--to", "convert.convert.target", "the directory to make: a run directory, or a Hugging Face one", "DIR"),
    Switch("--family", "convert.convert.family", "what the model is (default: what config.json says)", "FAMILY"),
    Switch("--dtype", "convert.convert.dtype", "float32, bfloat16, float16 or keep (default: keep)", "DTYPE"),
    Switch("--step", "convert.convert.step", "which checkpoint of a run (default: the latest)", "N", number=True),
    Switch("--max_shard_size", "convert.convert.max_shard_size", "of a safetensors file (default: 5GB)", "SIZE"),
    Switch("--ignore_fields", "convert.convert.ignore_fields", "of config.json, that change nothing (a,b)", "FIELDS"),
)

VERBS = {
    "train": Verb("meshway.launch.train", "train a recipe, or go on from its last checkpoint", dry_run=True),
    "inspect": Verb(
        "meshway.launch.inspect",
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
        subjects=("train", "data", "parallel", "routing", "moe", "attention"),
        switches=_BENCH,
    ),
    "launch": Verb("meshway.launch.launch", "run a command on many processes, here or on a cluster", on_devices=False),
}

_USAGE_EXAMPLES = """examples:
  meshway train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=runs/quickstart
  meshway train --gin_file=my.gin --gin.MODEL_DIR=/tmp/run --gin.LAYOUT=fsdp --dry_run
  meshway inspect --gin_file=quickstart --gin.LAYOUT=fsdp --simulated_devices=8
  meshway inspect data --gin_file=quickstart --rows=5 --html=data.html
  meshway bench train --gin_file=quickstart
  meshway bench data --gin_file=quickstart
  meshway bench parallel --gin_file=quickstart --simulated_devices=8
  meshway bench routing --gin_file=v_moe_digits
  meshway bench moe --gin_file=bench_moe --simulated_devices=8 --gin.LAYOUT=expert
  meshway bench attention --gin_file=bench_attention
  meshway cache --gin_file=quickstart
  meshway cache --task=my_task --module=mylab.tasks --directory=/data/cache
  meshway convert --from=models/Llama-3.2-1B --to=runs/llama
  meshway convert --from=runs/llama --to=exported --dtype=bfloat16
  meshway launch local --processes=4 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/four

Exit codes: 0 done, 1 the machine or the program failed, 2 the command or the recipe is wrong, 75 another process of the
run was lost (started again, it goes on from the last checkpoint).
MESHWAY_TRACEBACK=1 shows the traceback of every error. `meshway VERB --help` lists a verb's options.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `meshway`; those of the process by default.

    Returns:
      the exit code: 0, 1 when the machine failed, 2 when the user's input is wrong, 130 when interrupted; that of
      the command for one that was launched. Errors of our own keep their traceback.
    """
    try:
        invocation = parse(sys.argv[1:] if argv is None else argv)
        if invocation is not None:
            if os.getcwd() not in sys.path:  # as `python -m` does: a user's own packages beside the recipe
                sys.path.insert(0, os.getcwd())
            return importlib.import_module(VERBS[invocation.verb].module).run(invocation) or 0
        return 0
    except (UserError, EnvironmentFailure, KeyboardInterrupt) as error:
        return report(error)


def parse(argv: Sequence[str]) -> Invocation | None:
    """Returns what a command line asks for; None when it asked for help, which is printed.

    Raises:
      UserError: the command line is wrong.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return None
    verb = words.pop(0)
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f"; the verbs are {', '.join(VERBS)}"
        raise UserError(f"there is no verb {verb!r}{near}")
    if verb == "launch":
        from meshway.launch.launch_options import parse_launch

        return parse_launch(words, parse, [name for name, entry in VERBS.items() if entry.on_devices])
    bindings = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
    if bindings and not VERBS[verb].recipe:
        raise UserError(f"meshway {verb} takes no recipe: leave out --gin.{bindings[0]}")
    for binding in bindings:
        if "=" not in binding:
            raise UserError(f"--gin.{binding} has no value: write --gin.{binding}=VALUE, without spaces")
    parser = _parser(verb)
    words = [word for word in words if not word.startswith("--gin.")]
    if "-h" in words or "--help" in words:
        parser.print_help()
        return None
    entry = VERBS[verb]
    if entry.default and words[:1] not in [[subject] for subject in entry.subjects]:
        words.insert(0, entry.default)
    options, unknown = parser.parse_known_args(words)
    _refuse_unknown(verb, unknown, parser)
    given = vars(options)
    for switch in entry.switches:
        if switch.flag.lstrip("-") in given:
            _refuse_elsewhere(verb, switch, given.get("subject"))
            bindings.append(switch.bound(given.pop(switch.flag.lstrip("-"))))
    files, listed = given.pop("gin_files", ()), given.pop("search_paths", ())
    if not files:
        _need_a_recipe(verb, bindings)
    paths = tuple(path for each in listed for path in each.split(",") if path)
    fields = {**given, "gin_files": tuple(files), "search_paths": paths}
    return Invocation(verb=verb, bindings=tuple(bindings), **fields)


def _need_a_recipe(verb: str, bindings: Sequence[str]) -> None:
    """Raises UserError unless the bindings have what serves this verb instead of a recipe."""
    needed = "a recipe: --gin_file=FILE, as --gin_file=recipes/quickstart.gin"
    instead = next((switch for switch in VERBS[verb].switches if switch.flag == VERBS[verb].instead), None)
    if instead and any(binding.startswith(f"{instead.binding}=") for binding in bindings):
        return
    if instead and not VERBS[verb].recipe:
        raise UserError(f"meshway {verb} needs {instead.flag}={instead.value}: {instead.help}")
    raise UserError(f"meshway {verb} needs {needed}" + (f"; or {instead.flag}={instead.value}" if instead else ""))


def _refuse_elsewhere(verb: str, switch: Switch, subject: str | None) -> None:
    """Raises UserError for a flag that binds an argument of another subject."""
    owner = next((name for name in VERBS[verb].subjects if switch.binding.startswith(f"{verb}.{name}.")), subject)
    if owner != subject:
        raise UserError(f"{switch.flag} is a flag of `meshway {verb} {owner}`, not of `meshway {verb} {subject}`")


def _refuse_unknown(verb: str, unknown: list[str], parser: argparse.ArgumentParser) -> None:
    if not unknown:
        return
    word = unknown[0]
    if not word.startswith("-"):
        entry = VERBS[verb]
        hint = f"; a recipe is given as --gin_file={word}" if entry.default or not entry.subjects else ""
        if near := did_you_mean(word, entry.subjects, limit=1):
            hint = near if word not in entry.subjects else f" there: write `meshway {verb} {word} ...`"
        raise UserError(f"meshway {verb} takes no argument {word!r}{hint}")
    flag = word.partition("=")[0]
    if flag.lstrip("-").upper() in MACROS:
        raise UserError(f"unknown flag {flag}; did you mean --gin.{flag.lstrip('-').upper()}=...?")
    flags = dict.fromkeys(re.findall(r"--[a-z_]+(?![\w.])", parser.format_help()))
    raise UserError(f"meshway {verb}: unknown flag {flag}{did_you_mean(flag, flags)}")


def _help() -> str:
    lines = [
        "usage: meshway VERB [options]",
        "",
        "Trains, evaluates and serves sequence models on meshes.",
        "",
    ]
    lines += ["verbs:", *(f"  {' '.join([n, *_subjects(v)]):24}{v.help}" for n, v in VERBS.items()), ""]
    return "\n".join(lines) + "\n" + _USAGE_EXAMPLES


def _subjects(verb: Verb) -> list[str]:
    listed = "|".join(verb.subjects)
    return [f"[{listed}]" if verb.default else listed] if listed else []


def _parser(verb: str) -> argparse.ArgumentParser:
    """Returns the parser of one verb's options; `--gin.NAME=VALUE` is read before it."""
    entry = VERBS[verb]
    command = " ".join([verb, *_subjects(entry)])
    given = f"(--gin_file=FILE | {entry.instead}=...)" if entry.instead else "--gin_file=FILE"
    given = f"{given} [--gin.NAME=VALUE ...]" if entry.recipe else f"{entry.instead}=... --to=..."
    macros = "\n".join(f"  {name:24}{MACROS[name]}" for name in entry.macros)
    macros = f"macros that recipes honour (--gin.MACRO=VALUE):\n{macros}\n\n" if macros else ""
    parser = Parser(
        prog=f"meshway {verb}",
        usage=f"meshway {command} {given} [options]",
        description=f"{entry.help[0].upper()}{entry.help[1:]}.",
        epilog=f"{macros}{_examples(verb)}",
        formatter_class=help_formatter,
        allow_abbrev=False,
    )
    if entry.subjects:
        default = f" (default: {entry.default})" if entry.default else ""
        parser.add_argument("subject", choices=entry.subjects, help=f"what to {verb}{default}")
    if entry.recipe:
        _add_recipe_options(parser, entry.dry_run)
    for switch in entry.switches:
        takes: dict[str, Any] = {"action": "store_true"}
        if switch.value:
            takes = {"metavar": switch.value, "type": whole if switch.number else str}
        parser.add_argument(switch.flag, default=argparse.SUPPRESS, help=switch.help, **takes)
    if entry.on_devices:
        _add_process_options(parser)
    return parser


def _add_recipe_options(parser: argparse.ArgumentParser, dry_run: bool) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--gin_file",
        action="append",
        default=[],
        dest="gin_files",
        metavar="FILE",
        help="a recipe, by path or by name among the shipped ones; repeat to add files, later ones win",
    )
    recipe.add_argument(
        "--gin.NAME=VALUE",
        action="append",
        default=argparse.SUPPRESS,
        metavar="",
        help="set a macro or a binding, spelled as in files (--gin.attention.Attention.num_heads=8); the "
        "value is a Python literal, @reference or %%MACRO; a bare word or path is text",
    )
    recipe.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        dest="search_paths",
        metavar="DIR,DIR",
        help="folders to look for gin files in, before the shipped ones",
    )
    if dry_run:
        recipe.add_argument("--dry_run", action="store_true", help="build and print everything, run and write nothing")


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    processes = parser.add_argument_group("devices and processes")
    processes.add_argument(
        "--simulated_devices", type=count, metavar="N", help="simulate N CPU devices in this process"
    )
    processes.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 of several listens")
    processes.add_argument("--num_processes", type=count, metavar="N", help="how many processes run together")
    processes.add_argument("--process_id", type=whole, metavar="I", help="which of them this is, from 0")


def _examples(verb: str) -> str:
    lines = [line for line in _USAGE_EXAMPLES.splitlines() if f" meshway {verb} " in line]
    return "\n".join(["examples:", *lines])


if __name__ == "__main__":
    sys.exit(main())
