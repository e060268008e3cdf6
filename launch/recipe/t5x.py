"""Answers recipes that are written for T5X: each line of T5X's with the lines to write instead (`t5x_names`)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from meshway.launch.recipe.t5x_names import BINDINGS, GREEDY, MACROS, PAGE, REFERENCES, Answer
from meshway.launch.recipe.text import Binding, Import, Include, Reference, Statement, leaves

_FAMILIES = {"t5_1_1": "t5_1_1", "t5_1_0": "t5", "mt5": "mt5", "byt5": "byt5"}
_RUNS = {
    "pretrain.gin": "include 'recipes/pretrain.gin'",
    "finetune.gin": "include 'recipes/finetune.gin'",
    "eval.gin": "# `meshway eval --model_dir=DIR` has its defaults",
    "infer.gin": "# `meshway infer --model_dir=DIR --split=SPLIT --output=FILE` has its defaults",
    "infer_from_tfexample_file.gin": "# meshway infer --model_dir=DIR --input=FILES --output=FILE",
    "precompile.gin": "# `meshway train --dry_run` and `meshway inspect layout` tell of a run before it is paid for",
    "export.gin": "# meshway export --model_dir=DIR --output=DIR",
    "export_seqio.gin": "# meshway export --model_dir=DIR --output=DIR",
}
_WORDS = {  # what answers name -> its module
    "beam_search": "meshway.framework.inference",
    "evaluation": "meshway.framework.evaluation",
    "features": "meshway.framework.data",
    "grain_loader": "meshway.framework.data",
    "hooks": "meshway.framework.training",
    "loop": "meshway.framework.training",
    "manager": "meshway.framework.checkpoints",
    "mapping": "meshway.framework.checkpoints",
    "mesh": "meshway.framework.partitioning",
    "objectives": "meshway.models",
    "optimizers": "meshway.framework.optimizers",
    "sampling": "meshway.framework.inference",
    "schedule": "meshway.framework.evaluation",
    "schedules": "meshway.framework.optimizers",
    "train": "meshway.launch",
}
_BELOW = "\n        "
_UNKNOWN = f"# nothing here is known to stand for it; see {PAGE}"
_PACKAGES = ("contrib", "examples", "gpu", "moe", "t5", "decoder_only")  # of T5X, around modules of the tables
_PROGRAMS = ("__main__", "t5x.train", "t5x.eval", "t5x.infer", "t5x.main", "t5x.precompile")


def answers(statements: Sequence[Statement]) -> list[str]:
    """Returns what to write for each line of a file that is T5X's, as lines of a message; none for a file without any.

    Lines that are read here as they are, such as MIXTURE_OR_TASK_NAME or the import of tasks, are not among them.
    """
    imports = [each for each in statements if isinstance(each, Import)]
    read = [each for each in imports if _is_t5x(each.module) or each.module == "seqio"]
    ours = {each.bound_name: _word(each.bound_module) for each in read}
    foreign = [each for each in imports if _is_t5x(each.module)]
    if not foreign and not any(isinstance(each, Include) and includes(each.file) for each in statements):
        return []
    found = _Answers()
    late = _run_before_model(statements)
    if foreign:
        numbers = ", ".join(str(each.place.line) for each in foreign)
        found.lines.append(f"{foreign[0].place.file}:{numbers}: leave out the imports of T5X")
    for each in statements:
        if isinstance(each, Include) and (answer := includes(each.file)):
            if each is late:
                answer = "# it comes after the model, below, whose defaults it changes"
            elif late is not None and "models/" in answer:
                answer = f"{answer}\n{includes(late.file)}"
            found.add(f"{each.place}: include {each.file!r}", answer.split("\n"))
        if isinstance(each, Binding) and (answer := binding(each, ours)):
            lines = answer.split("\n")
            first = [line for line in lines if line.startswith("include ") or line == GREEDY]
            found.above += [line for line in first if line not in found.above]
            rest = [line for line in lines if line not in first]
            found.add(f"{each.place}: {each.name} = {each.value!r}", rest or ["# a file included above brings it"])
    return [*found.lines, *found.first()]


def _run_before_model(statements: Sequence[Statement]) -> Include | None:
    """Returns T5X's run file (pretrain.gin, finetune.gin) where a model is included after it; None where the order is
    ours: T5X's model files leave DROPOUT_RATE open, here they have values that what follows changes."""
    run: Include | None = None
    for each in statements:
        if isinstance(each, Include) and "recipes/" in includes(each.file):
            run = each
        elif isinstance(each, Include) and "models/" in includes(each.file):
            return run
    return None


def includes(file: str) -> str:
    """Returns the answer to an include of one of T5X's files, by the end of its path; "" for any other."""
    _, found, path = file.rpartition("t5x/")
    if not found or (PurePosixPath(path).parts or [""])[0] not in ("configs", "examples", "contrib"):
        return ""
    name = PurePosixPath(path).name
    if "configs/runs/" in path:
        answer = _RUNS.get(name, _UNKNOWN)
        return f"{answer}\nLAYOUT = 'expert'" if "contrib/moe/" in path and not answer.startswith("#") else answer
    if path.startswith("examples/scalable_t5/umt5/"):
        return _umt5(name)
    if name == "adamw_opt.gin":
        return "include 'optimizers/adamw.gin'"
    if match := re.fullmatch(r"(examples|contrib/gpu)/(scalable_)?t5/(\w+)/(\w+)\.gin", path):
        _, scalable, family, size = match.groups()
        if family in _FAMILIES:
            return _family(_FAMILIES[family], size.lower(), bool(scalable))
    if match := re.fullmatch(r"examples/decoder_only/models/(\w+)\.gin", path):
        return _with_t5x_values(f"models/t5x_decoder/{match.group(1)}")
    if "/examples/" in path.removeprefix("examples/"):
        return "# give it by --gin_file, to have its own lines answered"
    return _UNKNOWN


def _umt5(name: str) -> str:
    if match := re.fullmatch(r"pretrain_(\w+)\.gin", name):
        return _with_t5x_values(f"models/umt5/{match.group(1)}") + "\ninclude 'recipes/pretrain.gin'"
    if name == "vocab.gin":
        return "VOCAB_SIZE = 256384"
    return "# models/umt5 has what it binds, recipes/pretrain and recipes/finetune the rest"


def _family(family: str, size: str, scalable: bool) -> str:
    if not scalable:
        return _with_t5x_values(f"models/{family}/{size}")
    # T5X's scalable examples have a position bias in each layer, as umT5 has.
    vocabulary = {"t5_1_1": 32128, "mt5": 250112}
    return _with_t5x_values(f"models/umt5/{size}") + (
        f"\nVOCAB_SIZE = {vocabulary[family]}" if family in vocabulary else ""
    )


def _with_t5x_values(model: str) -> str:
    """Returns the lines that bring a model with the values that T5X's file of it has and ours has not."""
    return f"include '{model}.gin'\nDTYPE = 'bfloat16'\nLOSS_NORMALIZING_FACTOR = None"


def binding(each: Binding, words: Mapping[str, str]) -> str:
    """Returns the answer to a binding; "" where it is not T5X's.

    Args:
      each: the binding.
      words: what selectors may begin with, and the module that T5X's documentation calls it by.
    """
    if each.is_macro:
        answer = MACROS.get(each.parameter)
        if answer is None:
            return _value(each.value, words) if _names_t5x(each.value, words) else ""
        return _filled(answer, each.value, words)
    first, _, rest = each.selector.partition(".")
    if first not in words:
        return _value(each.value, words) if _names_t5x(each.value, words) else ""
    name = f"{_in_table(words[first], rest)}.{each.parameter}"
    answer = _row(each.scope, name.removeprefix("scalable_t5."))
    if answer is None:
        return "" if words[first] == "seqio" else _UNKNOWN
    return _filled(answer, each.value, words)


def near(name: str, value: Any) -> str:
    """Returns, for a message, what stands here for a macro or a binding as T5X spells it; "" where it has none such."""
    scope, _, selector = name.rpartition("/")
    word, _, rest = selector.partition(".")
    spelled = f"main.{rest}" if word in ("train_script", "eval_script", "infer_script") else selector
    answer = _row(scope, spelled) if rest else MACROS.get(name)
    if answer is None:
        return ""
    text = _filled(answer, value, {})
    if text.startswith("# "):
        return f"it is T5X's, and not needed here: {text[2:]}"
    return "it is T5X's; write " + " and ".join(text.split("\n"))


def as_flags(answer: str) -> str:
    """Returns an answer as words of a command line."""
    words = [
        f"--gin_file={line[9:-1]}" if line.startswith("include ") else "--gin." + line.replace(" = ", "=", 1)
        for line in answer.split("\n")
    ]
    return " ".join(words).replace("'", "")


def _row(scope: str, name: str) -> Answer | None:
    """Returns the row of a parameter: of its scope, else of any, else of all parameters of its module or function."""
    names = [f"{scope}/{name}".lstrip("/"), name]
    parts = name.split(".")
    names += [".".join([*parts[:count], "*"]) for count in range(len(parts) - 1, 0, -1)]
    return next((BINDINGS[each] for each in names if each in BINDINGS), None)


def _is_t5x(module: str) -> bool:
    return module.partition(".")[0] in ("t5x", "__main__")


def _word(module: str) -> str:
    """Returns what the tables call a module, or `t5x` itself, which `import t5x.utils` binds."""
    if module in _PROGRAMS:
        return "main"
    if module.startswith("__main__."):
        return module.replace("__main__", "main")
    return "scalable_t5.network" if "scalable_t5" in module else module.rpartition(".")[2]


def _in_table(word: str, rest: str) -> str:
    """Returns the name in the tables of what a selector means: its first word's, and the rest; or its whole path."""
    if word != "t5x":
        return f"{word}.{rest}" if rest else word
    parts = rest.split(".")
    while len(parts) > 2 and parts[0] in _PACKAGES:
        parts.pop(0)
    if f"t5x.{parts[0]}" in _PROGRAMS:
        parts[0] = "main"
    return ".".join(parts)


def _names_t5x(value: Any, words: Mapping[str, str]) -> bool:
    references = [leaf for leaf in leaves(value) if isinstance(leaf, Reference)]
    return any(words.get(each.selector.partition(".")[0], "seqio") != "seqio" for each in references)


def _value(value: Any, words: Mapping[str, str]) -> str:
    """Returns the answer to a value that is a reference to something of T5X's."""
    if not isinstance(value, Reference):
        return _UNKNOWN
    word, _, rest = value.selector.partition(".")
    return REFERENCES.get(_in_table(words[word], rest), _UNKNOWN)


def _filled(answer: Answer, value: Any, words: Mapping[str, str]) -> str:
    text = answer(value) if callable(answer) else answer
    if "{value}" in text and _names_t5x(value, words):
        return _value(value, words)
    lines = [line.replace("{value}", repr(value)) for line in text.split("\n")]
    kept = [line for line in lines if not _is_itself(line)]
    return "\n".join(kept) or "# it is read as it is"


def _is_itself(line: str) -> bool:
    """Whether a line binds a macro to itself, as `BATCH_SIZE = %BATCH_SIZE`."""
    name, equals, value = line.partition(" = ")
    return bool(equals) and value == f"%{name}"


class _Answers:
    """The lines of a message; what an earlier answer says already is not said again.

    Attributes:
      lines: those so far.
      above: what stands before everything else: includes, whose defaults would undo what was bound before, and defaults
        of T5X's own.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.above: list[str] = []
        self._said: set[str] = set()

    def add(self, line: str, answer: Sequence[str]) -> None:
        """Adds a line of T5X's with its answer."""
        if answer[0].startswith("#"):
            self.lines.append(f"{line}{_BELOW}leave out: {answer[0][2:]}")
            return
        fresh = [each for each in answer if each not in self._said]
        self._said |= set(fresh)
        self.lines.append(line + _BELOW + (_BELOW.join(fresh) or "leave out: the same is written above"))

    def first(self) -> Iterable[str]:
        """Returns what stands above all that was answered: imports that the answers need, and files."""
        words = {
            word
            for line in {*self._said, *self.above}
            for word in re.findall(r"(?:^|@|/)(\w+)\.", line)
            if word in _WORDS
        }
        listed = [*(f"from {_WORDS[word]} import {word}" for word in sorted(words)), *self.above]
        if listed:
            yield "and above these:" + "".join(_BELOW + each for each in listed)
