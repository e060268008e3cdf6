"""`meshway <verb>`: reads the command line, runs the verb, turns errors into messages and exit codes."""

import argparse
import atexit
import contextlib
import gc
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from meshway.framework import terminal
from meshway.framework.errors import EnvironmentFailure, UserError, did_you_mean, mute, report
from meshway.framework.terminal import installed_version
from meshway.launch.cluster.job import END_WITH_STARTER
from meshway.launch.flags import Flag, Parser, add_flags, flags_of, given, refuse_unknown, sentence
from meshway.launch.invocation import MACROS, Invocation
from meshway.launch.recipe.t5x_names import FLAGS
from meshway.launch.verb_flags import ProcessFlags, RecipeFlags
from meshway.launch.verbs import VERBS, module_of

_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)  # what holds text back until it is flushed


USAGE = """examples:
  meshway train --gin_file=recipes/quickstart.gin --gin.MODEL_DIR=runs/quickstart
  meshway train --gin_file=my.gin --gin.MODEL_DIR=/tmp/run --gin.LAYOUT=fsdp --dry_run
  meshway eval --model_dir=runs/quickstart
  meshway eval --model_dir=runs/quickstart --steps=all --split=train --max_predictions=100
  meshway eval --model_dir=runs/quickstart --watch --idle_timeout=3600
  meshway infer --model_dir=runs/quickstart --input=questions.jsonl --output=answers.jsonl
  meshway infer --model_dir=runs/quickstart --prompt="Return the <extra_id_0> of the list." --max_new_tokens=20
  meshway infer --model_dir=runs/quickstart --split=validation --mode=score --output=scores.parquet
  meshway infer --model_dir=runs/quickstart --input=questions.jsonl --output=answers.jsonl --num_shards=4 --shard_id=0
  meshway infer --model_dir=runs/llama --input=prompts.txt --output=out --temperature=0.8 --top_p=0.95 --num_decodes=4
  meshway export --model_dir=runs/quickstart --output=programs --platforms=cpu,tpu,cuda
  meshway serve --model_dir=runs/quickstart --port=8000
  meshway status runs/quickstart
  meshway plan --gin_file=models/palm/540b.gin --topology=v4:4x4x4 --batch=64 --context=2048
  meshway inspect --gin_file=quickstart --gin.LAYOUT=fsdp --simulated_devices=8
  meshway inspect data --gin_file=quickstart --rows=5 --html=data.html
  meshway bench train --gin_file=quickstart
  meshway bench data --gin_file=quickstart
  meshway bench parallel --gin_file=quickstart --simulated_devices=8
  meshway bench routing --gin_file=v_moe_digits
  meshway bench moe --gin_file=bench_moe --simulated_devices=8 --gin.LAYOUT=expert
  meshway bench attention --gin_file=bench_attention
  meshway bench decode --gin_file=bench_decode
  meshway bench accelerator --gin_file=bench_accelerator
  meshway bench plan --table=times
  meshway bench serve --url=http://127.0.0.1:8000 --rate=4 --slo_ttft=0.5
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
            sys.stdout.flush()  # here, where it can be noticed that nobody reads it
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
            if verb.keeps_programs:
                _keep_programs()
        return module.run(invocation) or 0


def _keep_programs() -> None:
    from meshway.framework.telemetry import compilation_cache  # lazy: it imports jax

    if note := compilation_cache.keep(os.environ):
        print(note, file=sys.stderr)


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
    bindings = _gin_bindings(verb, words)
    words = _subject_first(verb, [word for word in words if not word.startswith("--gin.")])
    parser, children = parsers(verb)
    if "-h" in words or "--help" in words:
        children.get(words[0], parser).print_help()
        return None
    entry = VERBS[verb]
    if entry.default and words[:1] not in [[subject] for subject in entry.subjects]:
        words.insert(0, entry.default)
    options, unknown = parser.parse_known_args(words)
    subject = getattr(options, "subject", None)
    command = _command(verb, subject)
    if unknown:
        _refuse(verb, subject, unknown[0])
    if bindings and not entry.takes_recipe(subject):
        raise UserError(f"{command} takes no recipe: leave out --gin.{bindings[0]}")
    own = flags_of(entry.flags_for(subject))
    values = given(own, options, command)
    bound = [flag for flag in own if flag.binding and flag.field in values]
    bindings += [flag.bound(values[flag.field]) for flag in bound]
    recipe = RecipeFlags(**given(flags_of(RecipeFlags), options, command))
    if entry.takes_recipe(subject) and not recipe.gin_file:
        _need_a_recipe(verb, bindings)
    return Invocation(
        verb=verb,
        subject=subject,
        gin_files=recipe.gin_file,
        bindings=tuple(bindings),
        flags={flag.binding: flag.name for flag in bound},
        search_paths=tuple(path for each in recipe.gin_search_paths for path in each.split(",") if path),
        dry_run=values.get("dry_run", False),
        options=entry.flags_for(subject)(**values),
        **given(flags_of(ProcessFlags), options, command),
    )


def _command(verb: str, subject: str | None) -> str:
    """Returns how a command begins: `meshway bench data`."""
    return " ".join(["meshway", verb, *([subject] if subject else [])])


def _gin_bindings(verb: str, words: Sequence[str]) -> list[str]:
    """Returns the text after each `--gin.`.

    Raises:
      UserError: the verb takes no recipe, or one has no value.
    """
    bindings = [word.removeprefix("--gin.") for word in words if word.startswith("--gin.")]
    if bindings and not VERBS[verb].recipe:
        raise UserError(f"meshway {verb} takes no recipe: leave out --gin.{bindings[0]}")
    for binding in bindings:
        if "=" not in binding:
            raise UserError(f"--gin.{binding} has no value: write --gin.{binding}=VALUE, without spaces")
    return bindings


def _subject_first(verb: str, words: list[str]) -> list[str]:
    """Returns the words with the subject before all flags, for a verb that must have one: it may stand anywhere."""
    entry = VERBS[verb]
    with_value = {flag.name for name in entry.subjects for flag in _flags(verb, name) if flag.value}
    for place, word in enumerate(words if entry.subjects and not entry.default else ()):
        if not word.startswith("-") and (place == 0 or words[place - 1] not in with_value):
            return [word, *words[:place], *words[place + 1 :]]
    return words


def _flags(verb: str, subject: str | None) -> list[Flag]:
    """Returns all flags of a command, in the order of its help."""
    entry = VERBS[verb]
    return [
        *flags_of(entry.flags_for(subject)),
        *(flags_of(RecipeFlags) if entry.takes_recipe(subject) else ()),
        *(flags_of(ProcessFlags) if entry.takes_devices(subject) else ()),
    ]


def _need_a_recipe(verb: str, bindings: Sequence[str]) -> None:
    """Raises UserError unless the bindings have what serves this verb instead of a recipe."""
    instead = next((flag for flag in _flags(verb, None) if flag.name == VERBS[verb].instead), None)
    if instead and any(binding.startswith(f"{instead.binding}=") for binding in bindings):
        return
    needed = "a recipe: --gin_file=FILE, as --gin_file=recipes/quickstart.gin"
    raise UserError(f"meshway {verb} needs {needed}" + (f"; or {instead.usage}" if instead else ""))


def _refuse(verb: str, subject: str | None, word: str) -> None:
    """Raises UserError for a word that a command does not take."""
    entry = VERBS[verb]
    if not word.startswith("-"):
        takes_recipe = entry.recipe and (entry.default or not entry.subjects)
        hint = f"; a recipe is given as --gin_file={word}" if takes_recipe else ""
        if near := did_you_mean(word, entry.subjects, limit=1):
            hint = near if word not in entry.subjects else f" there: write `meshway {verb} {word} ...`"
        raise UserError(f"meshway {verb} takes no argument {word!r}{hint}")
    name = word.partition("=")[0]
    others = {_command(verb, other): _flags(verb, other) for other in entry.subjects if other != subject}
    if (macro := name.lstrip("-").upper()) in MACROS:
        raise UserError(f"unknown flag {name}; did you mean --gin.{macro}=...?")
    if name in FLAGS:
        raise UserError(f"{_command(verb, subject)}: {name} is a flag of T5X's; here it is {FLAGS[name]}")
    refuse_unknown(name, _command(verb, subject), _flags(verb, subject), others)


def _help() -> str:
    """Returns the help of `meshway` itself."""
    lines = [
        "usage: meshway VERB [options]",
        "       meshway --version",
        "",
        "Trains, evaluates and serves sequence models on meshes.",
        "",
        "verbs:",
    ]
    for name, entry in VERBS.items():
        lines.append(f"  {name:14}{entry.help}")
        lines += [f"    {subject:12}{each.help}" for subject, each in entry.subjects.items()]
    return "\n".join(lines) + "\n\n" + USAGE


def parsers(verb: str) -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of one verb, and those of its subjects by name; `--gin.NAME=VALUE` is read before them."""
    entry = VERBS[verb]
    given = f"(--gin_file=FILE | {entry.instead}=...)" if entry.instead else "--gin_file=FILE"
    others = {"convert": "--from=... --to=...", "status": "MODEL_DIR"}
    given = f"{given} [--gin.NAME=VALUE ...]" if entry.recipe else others[verb]
    subjects = "|".join(entry.subjects)
    shown = [f"[{subjects}]" if entry.default else subjects] if subjects else []
    usage = " ".join(["meshway", verb, *shown, given, "[options]"])
    if not entry.subjects:
        parser = Parser(prog=f"meshway {verb}", usage=usage, **_texts(verb, None))
        _add_options(parser, verb, None)
        return parser, {}
    parser = Parser(prog=f"meshway {verb}", usage=usage, description=sentence(entry.help), epilog=_overview(verb))
    listed = parser.add_subparsers(
        prog=f"meshway {verb}", dest="subject", required=True, title="subjects", parser_class=Parser
    )
    children: dict[str, Parser] = {}
    for name, subject in entry.subjects.items():
        default = " (the default)" if name == entry.default else ""
        usage = " ".join(["meshway", verb, name, *([given] if entry.takes_recipe(name) else []), "[options]"])
        child = listed.add_parser(name, help=subject.help + default, usage=usage, **_texts(verb, name))
        _add_options(child, verb, name)
        children[name] = child
    return parser, children


def _texts(verb: str, subject: str | None) -> dict[str, Any]:
    """Returns the text before and after the options in the help of a command."""
    entry = VERBS[verb]
    macros = "\n".join(f"  {name:24}{MACROS[name]}" for name in entry.macros)
    macros = f"macros that recipes honour (--gin.MACRO=VALUE):\n{macros}\n\n" if macros else ""
    help = entry.subjects[subject].help if subject else entry.help
    return {"description": sentence(help), "epilog": f"{macros}{_examples(verb, subject)}"}


def _overview(verb: str) -> str:
    """Returns the flags of each subject, and the examples of all, for the end of a verb's help."""
    entry = VERBS[verb]
    lines = [f"flags of the subjects, which `meshway {verb} SUBJECT --help` explains:"]
    for name, subject in entry.subjects.items():
        lines.append(f"  {name:12}{' '.join(flag.usage for flag in flags_of(subject.flags)) or '(none of its own)'}")
    of_all = [flag.name for flag in _flags(verb, None)]
    return "\n".join([*lines, f"  {'all':12}{' '.join(of_all)}", "", _examples(verb, None)])


def _add_options(parser: Parser, verb: str, subject: str | None) -> None:
    entry = VERBS[verb]
    if entry.takes_recipe(subject):
        recipe = parser.add_argument_group("recipe")
        add_flags(recipe, flags_of(RecipeFlags))
        recipe.add_argument(
            "--gin.NAME=VALUE",
            action="append",
            default=argparse.SUPPRESS,
            metavar="",
            help="set a macro or a binding, spelled as in files (--gin.attention.Attention.num_heads=8); the "
            "value is a Python literal, @reference or %%MACRO; a bare word or path is text",
        )
    add_flags(parser, flags_of(entry.flags_for(subject)))
    if entry.takes_devices(subject):
        add_flags(parser.add_argument_group("devices and processes"), flags_of(ProcessFlags))


def _examples(verb: str, subject: str | None) -> str:
    """Returns the examples of a verb, of one subject if one is given."""
    lines = [line for line in USAGE.splitlines() if f" meshway {verb} " in line]
    own = [line for line in lines if f" meshway {verb} {subject} " in line]
    if subject is not None and subject == VERBS[verb].default:
        own = [line for line in lines if f" meshway {verb} --" in line]
    return "\n".join(["examples:", *(own if subject else lines)])


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:2] == [END_WITH_STARTER]:
        threading.Thread(target=_end_with_starter, daemon=True).start()
        del sys.argv[1]
    sys.exit(main())
