"""`meshway <verb>`: reads the command line, runs the verb, turns errors into messages and exit codes."""

import argparse
import dataclasses
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from meshway.framework.errors import EnvironmentFailure, UserError, did_you_mean
from meshway.launch.invocation import MACROS, Invocation


@dataclasses.dataclass(frozen=True)
class Switch:
    """A flag without a value: a short word for a binding."""

    flag: str
    binding: str
    help: str


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: its module's `run(invocation)` does the work, and is imported only then."""

    module: str
    help: str
    subjects: tuple[str, ...] = ()  # what the word after the verb may be
    dry_run: bool = False
    switches: tuple[Switch, ...] = ()


_INTERLEAVE = Switch(
    "--interleave",
    "bench.train.interleave=True",
    "speak the burst protocol on a pipe, to be timed in turn with other programs",
)

VERBS = {
    "train": Verb("meshway.launch.train", "train a recipe, or go on from its last checkpoint", dry_run=True),
    "inspect": Verb("meshway.launch.inspect", "print every tensor: axes, sharding, bytes a device, and the rule"),
    "bench": Verb(
        "meshway.launch.bench",
        "time a recipe on synthetic data",
        subjects=("train",),
        switches=(_INTERLEAVE,),
    ),
}

_USAGE_EXAMPLES = """examples:
  meshway train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=runs/quickstart
  meshway train --gin_file=my.gin --gin.MODEL_DIR=/tmp/run --gin.LAYOUT=fsdp --dry_run
  meshway inspect --gin_file=quickstart --gin.LAYOUT=fsdp --simulated_devices=8
  meshway bench train --gin_file=quickstart

Exit codes: 0 done, 1 the machine or the program failed, 2 the command or the recipe is wrong.
MESHWAY_TRACEBACK=1 shows the traceback of every error. `meshway VERB --help` lists a verb's options.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `meshway`; those of the process by default.

    Returns:
      the exit code: 0, 1 when the machine failed, 2 when the user's input is wrong, 130 when interrupted.
      Errors of our own keep their traceback.
    """
    try:
        invocation = parse(sys.argv[1:] if argv is None else argv)
        if invocation is not None:
            if os.getcwd() not in sys.path:  # as `python -m` does: a user's own packages beside the recipe
                sys.path.insert(0, os.getcwd())
            importlib.import_module(VERBS[invocation.verb].module).run(invocation)
        return 0
    except (UserError, EnvironmentFailure) as error:
        if os.environ.get("MESHWAY_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"meshway: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("meshway: interrupted", file=sys.stderr)
        return 130


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
    bindings = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
    for binding in bindings:
        if "=" not in binding:
            raise UserError(f"--gin.{binding} has no value: write --gin.{binding}=VALUE, without spaces")
    parser = _parser(verb)
    words = [word for word in words if not word.startswith("--gin.")]
    if "-h" in words or "--help" in words:
        parser.print_help()
        return None
    switches = [switch for switch in VERBS[verb].switches if switch.flag in words]
    bindings += [switch.binding for switch in switches]
    words = [word for word in words if word not in {switch.flag for switch in switches}]
    options, unknown = parser.parse_known_args(words)
    _refuse_unknown(verb, unknown, parser)
    if not options.gin_files:
        raise UserError(f"meshway {verb} needs a recipe: --gin_file=FILE, as --gin_file=recipes/quickstart.gin")
    paths = tuple(path for listed in options.search_paths for path in listed.split(",") if path)
    fields = {**vars(options), "gin_files": tuple(options.gin_files), "search_paths": paths}
    return Invocation(verb=verb, bindings=tuple(bindings), **fields)


def _refuse_unknown(verb: str, unknown: list[str], parser: argparse.ArgumentParser) -> None:
    if not unknown:
        return
    word = unknown[0]
    if not word.startswith("-"):
        hint = f"; a recipe is given as --gin_file={word}" if not VERBS[verb].subjects else ""
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
    lines += ["verbs:", *(f"  {' '.join([n, *_subjects(v)]):18}{v.help}" for n, v in VERBS.items()), ""]
    return "\n".join(lines) + "\n" + _USAGE_EXAMPLES


def _subjects(verb: Verb) -> list[str]:
    return ["|".join(verb.subjects)] if verb.subjects else []


def _parser(verb: str) -> argparse.ArgumentParser:
    """Returns the parser of one verb's options; `--gin.NAME=VALUE` is read before it."""
    entry = VERBS[verb]
    command = " ".join([verb, *_subjects(entry)])
    macros = "\n".join(f"  {name:22}{meaning}" for name, meaning in MACROS.items())
    parser = _Parser(
        prog=f"meshway {verb}",
        usage=f"meshway {command} --gin_file=FILE [--gin.NAME=VALUE ...] [options]",
        description=f"{entry.help[0].upper()}{entry.help[1:]}.",
        epilog=f"macros that recipes honour (--gin.MACRO=VALUE):\n{macros}\n\n{_examples(verb)}",
        formatter_class=_help_formatter,
        allow_abbrev=False,
    )
    if entry.subjects:
        parser.add_argument("subject", choices=entry.subjects, help="what to time")
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
    if entry.dry_run:
        recipe.add_argument("--dry_run", action="store_true", help="build and print everything, run and write nothing")
    for switch in entry.switches:
        parser.add_argument(switch.flag, action="store_true", default=argparse.SUPPRESS, help=switch.help)
    _add_process_options(parser)
    return parser


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    processes = parser.add_argument_group("devices and processes")
    processes.add_argument(
        "--simulated_devices", type=_count, metavar="N", help="simulate N CPU devices in this process"
    )
    processes.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 of several listens")
    processes.add_argument("--num_processes", type=_count, metavar="N", help="how many processes run together")
    processes.add_argument("--process_id", type=_rank, metavar="I", help="which of them this is, from 0")


def _examples(verb: str) -> str:
    lines = [line for line in _USAGE_EXAMPLES.splitlines() if f" meshway {verb} " in line]
    return "\n".join(["examples:", *lines])


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _rank(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
