"""What a cache depends on, part by part, so that a stale cache is detected and the change named.

The parts are: the task's name, its source, the cached preprocessors with their code, the output features with
their vocabularies, and the format and number of shards. Code means the source text of a function, of what it
calls in its own module, and the constants both read; the data files behind a source are not read.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data.cache.format import FORMAT, read_json
from meshway.framework.data.seqio_adapter import task_errors
from meshway.framework.data.vocabularies import numbers_only, of_seqio
from meshway.framework.errors import UserError

IMPORTED = "seqio cache"  # the part that tells from which cache of seqio's examples were taken
_SIMPLE = (str, bytes, int, float, bool, type(None))


def parts(task: Any, steps: Sequence[Any], num_shards: int, imported: str | None = None) -> dict[str, Any]:
    """Returns what a task's cache depends on: name of a part -> text, number or list, as JSON holds them.

    What was taken from a cache of seqio's does not depend on source and preprocessors as they are now.

    Args:
      task: the seqio task.
      steps: its cached preprocessors.
      num_shards: of each split.
      imported: identity of the cache of seqio's that its examples were taken from; None where the steps made them.
    """
    found: dict[str, Any] = {"cache format": FORMAT, "task name": task.name, "number of shards": num_shards}
    if imported is None:
        found |= {
            "source": _plain(str(task.source)),
            "code of the source": _digest(describe(getattr(task.source, "_dataset_fn", type(task.source)))),
            "cached preprocessors": [qualified_name(step) for step in steps],
        }
    else:
        found[IMPORTED] = imported
    for place, step in enumerate(steps if imported is None else ()):
        found[f"code of preprocessor {place + 1} ({qualified_name(step).rpartition('.')[2]})"] = _digest(describe(step))
    for name, feature in task.output_features.items():
        eos = ", add_eos" if feature.add_eos else ""
        found[f"feature {name!r}"] = f"{feature.dtype.name}, rank {feature.rank}{eos}"
        found[f"vocabulary of {name!r}"] = vocabulary_fingerprint(feature.vocabulary)
    return found


def fingerprint(found: Mapping[str, Any]) -> str:
    """Returns the fingerprint of parts: 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns what differs, each as a clause such as "vocabulary of 'targets' changed"."""
    if (IMPORTED in old) != (IMPORTED in new):
        made = ("by its preprocessors", "from a cache of seqio's")
        return [f"it was made {made[IMPORTED in old]}, and is now to be made {made[IMPORTED in new]}"]
    if old.get("cached preprocessors") != new.get("cached preprocessors"):
        # Each step whose number changed would be reported as changed.
        old, new = ({key: x[key] for key in x if not key.startswith("code of preprocessor")} for x in (old, new))
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if key not in new:
            found.append(f"{key} is gone")
        elif key not in old:
            found.append(f"{key} is new")
        elif before != after:
            short = isinstance(before, int) or (isinstance(before, str) and len(before) <= 60 and "feature" in key)
            was = f" from {before} to {after}" if short or isinstance(before, list) else ""
            found.append(f"{key} changed{was}")
    return found


def stale(task_directory: Path, task: Any) -> list[str]:
    """Returns what changed in a seqio task since it was cached, as "vocabulary of 'targets' changed"; [] if nothing.

    Preprocessors after the cache may change. The source is not opened, so this works without the raw data.

    Raises:
      UserError: nothing is cached there.
    """
    info = read_json(task_directory / "info.json")
    with task_errors(task.name, "fingerprint"):
        old = info["parts"]
        steps = task.preprocessors[: len(info["cut"]["cached"])]
        new = parts(task, steps, old["number of shards"], old.get(IMPORTED))
        return changes(old, new)


def later_steps_differ(task_directory: Path, task: Any) -> bool:
    """Returns whether the preprocessors after the cache differ from those in info.json."""
    cut = read_json(task_directory / "info.json")["cut"]
    later = task.preprocessors[cut["online_from"] :]
    return [qualified_name(step) for step in later] != cut["online"]


def refuse(directory: Path, changed: Sequence[str]) -> None:
    """Raises UserError if anything `changed` in a task since it was cached in `directory`."""
    if changed:
        raise UserError(
            f"{directory} holds another version of the task: {'; '.join(changed)}. "
            "Run `meshway cache` with --overwrite to build it anew, or use another CACHE_DIR"
        )


def qualified_name(step: Any) -> str:
    """Returns the module and name of a preprocessor, through partial applications and seqio's wrappers."""
    while isinstance(step, functools.partial) or hasattr(step, "map_fn"):
        step = step.func if isinstance(step, functools.partial) else step.map_fn
    named = step if hasattr(step, "__qualname__") else type(step)
    return f"{named.__module__}.{named.__qualname__}"


def takes_lengths(step: Callable[..., Any]) -> bool:
    """Returns whether seqio passes `sequence_length` to a preprocessor, or to the function that it maps."""
    if dataclasses.is_dataclass(step):
        fields = {field.name for field in dataclasses.fields(step)}
        mapped = getattr(step, "map_fn", None)
        return "sequence_length" in fields and (mapped is None or takes_lengths(mapped))
    bound = step.keywords if isinstance(step, functools.partial) else {}
    return "sequence_length" in inspect.signature(step).parameters and "sequence_length" not in bound


def step_name(step: Any) -> str:
    """Returns the bare name of a preprocessor."""
    return qualified_name(step).rpartition(".")[2]


def vocabulary_fingerprint(vocabulary: Any) -> str:
    """Returns a text that changes whenever a seqio vocabulary's ids may."""
    known = of_seqio(vocabulary)
    if known.former is not None:  # known by its tables now: fingerprinted as it was before
        known = numbers_only(vocabulary)
    elif known.kind != "opaque":
        return f"{known}, {known.fingerprint}"
    text = f"{known}, {known.fingerprint}"
    # A class not known here: its text, its plain settings, and the content of the files they name.
    text += f", {_plain(str(vocabulary))}"
    for name, value in sorted(vars(vocabulary).items()):
        if isinstance(value, (str, Path)) and str(value) and Path(value).is_file():
            text += f", {name}={_sha256(Path(value).read_bytes())}"
        elif isinstance(value, (*_SIMPLE, list, tuple, dict)):
            text += f", {name}={_digest(_plain(repr(value)))}"
    return text


def describe(thing: Any, _seen: frozenset[int] = frozenset()) -> str:
    """Returns a text that identifies a preprocessor, or any other callable: its code and bound arguments.

    Follows partial applications, closures, objects' attributes, and functions and constants of the same module.
    """
    if id(thing) in _seen:
        return "..."
    seen = _seen | {id(thing)}
    again = functools.partial(describe, _seen=seen)
    if isinstance(thing, functools.partial):
        bound = [again(value) for value in thing.args]
        bound += [f"{name}={again(value)}" for name, value in sorted(thing.keywords.items())]
        return f"{again(thing.func)}({', '.join(bound)})"
    if isinstance(thing, types.MethodType):
        return f"{again(thing.__func__)} of {again(thing.__self__)}"
    if isinstance(thing, types.FunctionType):
        return _describe_function(thing, again)
    if isinstance(thing, _SIMPLE):
        return repr(thing)
    if isinstance(thing, (list, tuple)):
        return f"[{', '.join(again(item) for item in thing)}]"
    if isinstance(thing, (set, frozenset)):
        return f"{{{', '.join(sorted(again(item) for item in thing))}}}"
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{again(key)}: {again(value)}' for key, value in thing.items())}}}"
    if isinstance(thing, type):
        return f"{thing.__module__}.{thing.__qualname__}\n{_source_text(thing)}"
    if hasattr(thing, "vocab_size") and hasattr(thing, "eos_id"):
        return vocabulary_fingerprint(thing)
    if callable(thing) or dataclasses.is_dataclass(thing):
        return f"{again(type(thing))} with {again(getattr(thing, '__dict__', {}))}"
    return _plain(repr(thing))


def _describe_function(function: types.FunctionType, again: Any) -> str:
    inner = inspect.unwrap(function)
    lines = [f"{inner.__module__}.{inner.__qualname__}", _source_text(inner)]
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    for name, cell in cells:
        try:
            lines.append(f"{name}: {again(cell.cell_contents)}")
        except ValueError:  # still empty: a function that refers to itself
            continue
    if inner is not function:
        lines.append(again(inner))
    for name in sorted(_names(inner.__code__)) if isinstance(inner, types.FunctionType) else ():
        value = inner.__globals__.get(name)
        own = getattr(value, "__module__", None) == inner.__module__
        constant = isinstance(value, (*_SIMPLE, tuple)) and value is not None
        if constant or (own and isinstance(value, (types.FunctionType, functools.partial, type))):
            lines.append(f"{name}: {again(value)}")
    return "\n".join(lines)


def _names(code: types.CodeType) -> set[str]:
    """Returns the global names that a function reads, those of functions inside it included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _source_text(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed at a prompt, or written in C
        code = getattr(thing, "__code__", None)
        return f"{code.co_code.hex()} {_plain(repr(code.co_consts))}" if code else ""


def _plain(text: str) -> str:
    """Returns a text without addresses in memory, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(text: str) -> str:
    return _sha256(text.encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
