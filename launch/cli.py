"""`meshway <verb>`: reads the command line, runs the verb, turns errors into messages and exit codes."""

import argparse
import atexit
import contextlib
import gc
import importlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from meshway.framework import terminal
from meshway.framework.errors import EnvironmentFailure, UserError, did_you_mean, mute, report
from meshway.framework.terminal import installed_version
from meshway.launch.cluster.job import END_WITH_STARTER
from meshway.launch.invocation import MACROS, Invocation, Parser, help_formatter, non_negative_int, one_of, positive_int
from meshway.launch.verbs import USAGE, VERBS, Flag, Verb, module_of

_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)  # what holds text back until it is flushed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the words after `meshway`; those of the process by default.

    Returns:
      the exit code: 0, 1 when the machine failed, 2 when the user's input is wrong, 130 when interrupted, 141 when
      nobody reads the output; that of the command for one that was launched. Errors of our own keep their traceback.
    """
    if argv is None:
        atexit.register(_end_at_once)  # the first to be registered is the last to run
    try:
        invocation, code = parse(sys.argv[1:] if argv is None else argv), 0
        if invocation is not None:
            if os.getcwd() not in sys.path:  # as `python -m` does: a user's own packages beside the recipe
                sys.path.insert(0, os.getcwd())
            code = _run(invocation)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can be told that nobody reads it
        return code
    except (UserError, EnvironmentFailure, KeyboardInterrupt) as error:
        return report(error)
    except BrokenPipeError:
        if not mute():
            raise
        return 128 + signal.SIGPIPE


def _run(invocation: Invocation) -> int:
    """Runs a command, and shows what it is doing from before its imports, which take seconds, on."""
    verb = VERBS[invocation.verb]
    name = module_of(invocation.verb, invocation.subject)
    if not verb.slow:
        return importlib.import_module(name).run(invocation) or 0
    with terminal.shown(terminal.Stages(silent=bool(invocation.process_id))):
        with terminal.stage(f"meshway {invocation.verb}: importing what it needs"):
            module = importlib.import_module(name)
        return module.run(invocation) or 0


def _end_at_once() -> None:
    """Spares the end of the process the search for cycles among its objects, which takes seconds where TensorFlow is
    loaded and frees what goes anyway. A file that only that search would close is flushed here."""
    mute()
    for each in gc.get_objects():
        if issubclass(type(each), _FILES):
            with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone
                each.flush()
    gc.freeze()


def parse(argv: Sequence[str]) -> Invocation | None:
    """Returns what a command line asks for; None when it asked for help, which is printed.

    Raises:
      UserError: the command line is wrong.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return None
    if words in (["--version"], ["-V"]):
        print(f"meshway {installed_version()}")
        return None
    verb = words.pop(0)
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f"; the verbs are {', '.join(VERBS)}"
        raise UserError(f"there is no verb {verb!r}{near}")
    if verb == "launch":
        from meshway.launch.cluster.options import parse_launch

        return parse_launch(words, parse, [name for name, entry in VERBS.items() if entry.on_devices])
    if verb == "status" and words and not words[0].startswith("-"):
        words[0] = f"--model_dir={words[0]}"
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
    flags = {}
    for switch in entry.switches:
        if switch.flag.lstrip("-") in given:
            _refuse_elsewhere(verb, switch, given.get("subject"))
            bindings.append(switch.bound(given.pop(switch.flag.lstrip("-"))))
            flags[switch.binding.partition("=")[0]] = switch.flag
    files, listed = given.pop("gin_files", ()), given.pop("search_paths", ())
    if not files:
        _need_a_recipe(verb, bindings)
    paths = tuple(path for each in listed for path in each.split(",") if path)
    fields = {**given, "gin_files": tuple(files), "search_paths": paths}
    return Invocation(verb=verb, bindings=tuple(bindings), flags=flags, **fields)


def _need_a_recipe(verb: str, bindings: Sequence[str]) -> None:
    """Raises UserError unless the bindings have what serves this verb instead of a recipe."""
    needed = "a recipe: --gin_file=FILE, as --gin_file=recipes/quickstart.gin"
    instead = next((switch for switch in VERBS[verb].switches if switch.flag == VERBS[verb].instead), None)
    if instead and any(binding.startswith(f"{instead.binding}=") for binding in bindings):
        return
    if instead and not VERBS[verb].recipe:
        raise UserError(f"meshway {verb} needs {instead.flag}={instead.value}: {instead.help}")
    raise UserError(f"meshway {verb} needs {needed}" + (f"; or {instead.flag}={instead.value}" if instead else ""))


def _refuse_elsewhere(verb: str, switch: Flag, subject: str | None) -> None:
    """Raises UserError for a flag that binds an argument of another subject."""
    owner = next((name for name in VERBS[verb].subjects if switch.binding.split(".")[1:2] == [name]), subject)
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
        "       meshway --version",
        "",
        "Trains, evaluates and serves sequence models on meshes.",
        "",
    ]
    lines += ["verbs:", *(f"  {' '.join([n, *_subjects(v)]):24}{v.help}" for n, v in VERBS.items()), ""]
    return "\n".join(lines) + "\n" + USAGE


def _subjects(verb: Verb) -> list[str]:
    listed = "|".join(verb.subjects)
    return [f"[{listed}]" if verb.default else listed] if listed else []


def _parser(verb: str) -> argparse.ArgumentParser:
    """Returns the parser of one verb's options; `--gin.NAME=VALUE` is read before it."""
    entry = VERBS[verb]
    command = " ".join([verb, *_subjects(entry)])
    given = f"(--gin_file=FILE | {entry.instead}=...)" if entry.instead else "--gin_file=FILE"
    others = {"convert": "--from=... --to=...", "status": "MODEL_DIR"}
    given = f"{given} [--gin.NAME=VALUE ...]" if entry.recipe else others[verb]
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
            takes = {"metavar": switch.value, "type": _type_of(switch)}
        if switch.repeats:
            takes["action"] = "append"
        parser.add_argument(switch.flag, default=argparse.SUPPRESS, help=switch.help, **takes)
    if entry.on_devices:
        _add_process_options(parser)
    return parser


def _type_of(switch: Flag) -> Callable[[str], Any]:
    if switch.number:
        return positive_int if switch.least else non_negative_int
    if switch.choices:
        return one_of(switch.choices)
    return switch.real or str


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
        recipe.add_argument(
            "--dry_run",
            action="store_true",
            help="check and print all that a run resolves before its first step; write nothing",
        )


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    processes = parser.add_argument_group("devices and processes")
    processes.add_argument(
        "--simulated_devices", type=positive_int, metavar="N", help="simulate N CPU devices in this process"
    )
    processes.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 of several listens")
    processes.add_argument("--num_processes", type=positive_int, metavar="N", help="how many processes run together")
    processes.add_argument("--process_id", type=non_negative_int, metavar="I", help="which of them this is, from 0")


def _examples(verb: str) -> str:
    lines = [line for line in USAGE.splitlines() if f" meshway {verb} " in line]
    return "\n".join(["examples:", *lines])


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:2] == [END_WITH_STARTER]:
        threading.Thread(target=_end_with_starter, daemon=True).start()
        del sys.argv[1]
    sys.exit(main())
