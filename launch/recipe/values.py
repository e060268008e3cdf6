"""Whether values are what parameters ask for: by annotation, and by what a number of that name can mean.

A value is checked where it is written: what a macro holds is the macro's mistake. Whole numbers written as 1e5 or 4.0
and the usual short names of dtypes are read as what they mean.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import local_path, open_path
from meshway.launch.recipe import configurables
from meshway.launch.recipe.reachability import Reach, binding_key, final
from meshway.launch.recipe.text import Binding, Macro, Reference

_SCALARS = (str, int, float, bool, bytes)
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
_FLOATS = ("float32", "bfloat16", "float16")  # JAX has float64 only where a process turns it on
_DTYPES = (*_FLOATS, "int8")  # what keys and values may be kept in
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "half": "float16"}
_SHORT_DTYPES |= {"fp32": "float32", "f32": "float32", "float": "float32"}
# Whose names mean what they do below.
_OURS = re.compile(r"meshway\.")


class Domain(NamedTuple):
    """The numbers that mean something, and how that is said."""

    words: str
    holds: Callable[[float], bool]


_POSITIVE, _AT_LEAST_0 = Domain("above 0", lambda x: x > 0), Domain("at least 0", lambda x: x >= 0)
_AT_LEAST_1, _RATE = Domain("at least 1", lambda x: x >= 1), Domain("at least 0 and below 1", lambda x: 0 <= x < 1)
_SEED = Domain("at least 0 and below 2**32, all that jax reads of it", lambda x: 0 <= x < 2**32)
_NAMES = (
    (
        _AT_LEAST_1,
        "d_model d_ff head_dim num_heads num_kv_heads num_layers num_experts vocab_size num_positions num_classes "
        "num_buckets max_distance patch_size batch_size num_microbatches total checkpoint evaluate report window k "
        "steps group_rows groups_per_row original_length lengths image_shape max_skipped_in_a_row num_repeats "
        "latest every best max_batches eval_k block query_block kv_block ns_steps min_dim_size_to_factor total_steps "
        "num_steps beams batches workers num_shards seconds seeds prompt_length new_tokens chunk_size max_input_length "
        "max_new_tokens idle_timeout num_loss_chunks relative",
    ),
    (
        _AT_LEAST_0,
        "warmup_steps num_shared_experts num_token_types num_samples max_predictions max_bad_examples z_loss "
        "load_loss importance_loss jitter stddev base_learning_rate weight_decay learning_rate min_learning_rate "
        "adam_learning_rate adam_weight_decay weight_decay_rate eps epsilon1 epsilon2 step_offset start_step noise "
        "num_workers from_step rates step",
    ),
    (_SEED, "seed"),
    (_RATE, "decay dropout_rate label_smoothing b1 b2 adam_b1 adam_b2 beta beta1 momentum"),
    (
        _POSITIVE,
        "epsilon base capacity_factor eval_capacity_factor soft_cap logits_soft_cap factor query_scale gate_scale "
        "low_frequency_factor high_frequency_factor beta_fast beta_slow clipping_threshold decay_rate decay_factor "
        "max_parameter_scale global_norm_clip_threshold "
        "loss_normalizing_factor",
    ),
)
_IN_BUCKETS = ("model_dir", "source")  # what may be `gs://`; `source` is of `convert`
_NAMES_SOMETHING = ("model_dir", "cache_dir", "seqio_cache_dirs", "path", "mixture_or_task_name", "module")
# Parameter of meshway's own -> its domain: one name means one thing everywhere. What is not here is checked by who
# takes it; what a name means in a module of the user's is not known.
_DOMAINS = {name: domain for domain, names in _NAMES for name in names.split()}


def read_values(bindings: Sequence[Binding], reach: Reach, shipped: Sequence[str] = ()) -> list[Binding]:
    """Returns the bindings with their values as parameters take them.

    Args:
      bindings: of a recipe, linked, in order.
      reach: what of them applies.
      shipped: the gin files that come along, one of which may be meant by its name.

    Raises:
      UserError: with every value that is not what its parameter asks for.
    """
    last = final(bindings)
    macros = {binding.parameter: binding for binding in last if binding.is_macro}
    problems: dict[Binding, str] = {}
    read: dict[Binding, Any] = {}
    for binding, origin, hint in _uses(last, macros, reach):
        value = read.get(origin, origin.value)
        assert binding.target is not None
        try:
            if isinstance(value, str) and binding.target.module.startswith("meshway."):
                _refuse_addresses(value, open_path if binding.parameter in _IN_BUCKETS else local_path)
            name = binding.parameter if _OURS.match(binding.target.module) else ""
            if name.endswith("dtype") and binding.target.module.startswith("meshway.launch."):
                name = ""  # the verbs define their own dtypes: `convert` keeps each tensor's own
            read[origin] = _read(value, hint, name)
        except ValueError as error:
            taken = "" if origin is binding else f", taken by {binding.selector}.{binding.parameter}"
            hint = _meant(origin.value, shipped)
            problems.setdefault(origin, f"{origin.said}{'' if origin.place.is_own_flag else taken}: {error}{hint}")
    if problems:
        listed = list(problems.values())
        raise UserError(listed[0] if len(listed) == 1 else f"{len(listed)} problems:\n  " + "\n  ".join(listed))
    return [dataclasses.replace(b, value=read[b]) if b in read else b for b in bindings]


def _uses(
    bindings: Sequence[Binding], macros: Mapping[str, Binding], reach: Reach
) -> Iterator[tuple[Binding, Binding, Any]]:
    """Yields (a binding that applies, the binding that holds a value of it, what its parameter asks of that value).

    A container's entries that are macros hold values of their own.
    """
    for binding in bindings:
        if not binding.target or binding_key(binding) not in reach.used:
            continue
        hint, origin = _hint(binding), _origin(binding, macros)
        if origin is None or hint is None:
            continue
        for entry, inner in _macros_in(origin.value, hint):
            held = _origin(dataclasses.replace(binding, value=entry), macros)
            if held is not None and not held.is_default:
                yield binding, held, inner
        if not origin.is_default:
            yield binding, origin, hint


def _macros_in(value: Any, hint: Any) -> Iterator[tuple[Macro, Any]]:
    """Yields (a macro, what is asked of it) for those among a container's entries."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    asked = [
        [each for each in typing.get_args(found) if each is not Ellipsis][-1]
        for found in _alternatives(hint)
        if _holds_alike(found)
    ]
    if asked:
        yield from ((entry, asked[0]) for entry in entries if isinstance(entry, Macro))


def _holds_alike(hint: Any) -> bool:
    """Whether a hint is of a container whose entries are all of one type."""
    inner = [each for each in typing.get_args(hint) if each is not Ellipsis]
    wanted = 2 if typing.get_origin(hint) in (dict, collections.abc.Mapping) else 1
    return typing.get_origin(hint) in _CONTAINERS and len(inner) == wanted


def _refuse_addresses(value: str, read: Callable[[str], Path]) -> None:
    try:
        read(value)
    except UserError as error:
        raise ValueError(str(error).replace(value, "it", 1)) from error


def _meant(value: Any, shipped: Sequence[str]) -> str:
    """Returns which gin file a word may mean where a reference is needed."""
    files = [name for name in shipped if isinstance(value, str) and name.rpartition("/")[2] == value]
    return f"; --gin_file={files[0]} brings one" if len(files) == 1 else ""


def _origin(binding: Binding, macros: Mapping[str, Binding]) -> Binding | None:
    """Returns the binding that holds the value; None for one that a module's constant or nothing holds."""
    while isinstance(binding.value, Macro):
        found = macros.get(binding.value.name)
        if found is None or binding.value.target is not None:
            return None
        binding = found
    return binding


def _hint(binding: Binding) -> Any:
    """Returns what a binding's parameter is annotated with, None for nothing that can be checked."""
    assert binding.target is not None
    found = configurables.find(binding.target, importing=False)
    if found is None:
        return None
    function = found.__init__ if inspect.isclass(found) else found
    try:
        return _type_hints(function).get(binding.parameter)
    except (NameError, TypeError, AttributeError):  # a name that only type checkers import
        hint = getattr(function, "__annotations__", {}).get(binding.parameter)
        return None if isinstance(hint, str) else hint


_type_hints = functools.cache(typing.get_type_hints)


def _read(value: Any, hint: Any, name: str) -> Any:
    """Returns a value as a parameter takes it; raises ValueError where it cannot be one of these."""
    if name.endswith("dtype") and isinstance(value, str):
        value = _SHORT_DTYPES.get(value.lower(), value)
        known = _DTYPES if name == "cache_dtype" else _FLOATS
        if value not in known:
            raise ValueError(f"no such dtype{did_you_mean(value, known) or '; there are ' + ', '.join(known)}")
        return value
    if name in _NAMES_SOMETHING and (value == "" or (isinstance(value, (list, tuple)) and "" in value)):
        raise ValueError(f"it must not {'be empty' if value == '' else 'hold an empty text'}")
    if isinstance(value, Macro):
        return value  # in a container; a macro by itself has been followed
    alternatives = list(_alternatives(hint))
    fitting = [each for each in alternatives if _fits(value, each)]
    if not fitting:
        _refuse_another_kind(value, alternatives)
        called = dataclasses.replace(value, evaluate=True) if isinstance(value, Reference) else value
        instead = f"; write {called}" if any(_fits(called, each) for each in alternatives) else ""
        if instead and any(_lacks_parentheses(value, each) for each in alternatives):
            raise ValueError(f"it makes what is needed, and is not that itself{instead}")
        raise ValueError(f"{' or '.join(dict.fromkeys(map(_words, alternatives)))} is needed{instead}")
    if type(value) is float and int in fitting and float not in fitting:
        value = int(value)
    if isinstance(value, dict) and (inner := _inside(fitting[0])):
        value = {key: _read_entry(key, each, inner[-1], name) for key, each in value.items()}
    elif domain := _DOMAINS.get(name):
        _check_domain(value, domain)
    return value


def _read_entry(key: Any, value: Any, hint: Any, name: str) -> Any:
    try:
        return _read(value, hint, name)
    except ValueError as error:
        raise ValueError(f"{key!r} is {value!r}: {error}") from error


def _check_domain(value: Any, domain: Domain) -> None:
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(each, (int, float)) or isinstance(each, bool):
            continue
        if not domain.holds(each):
            raise ValueError(f"it must be {domain.words}")
        if domain is _AT_LEAST_1 and each >= 2**31:
            raise ValueError("it must be below 2**31: sizes and counts have 32 bits")


def _alternatives(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for each in typing.get_args(hint):
            yield from _alternatives(each)
    else:
        yield type(None) if hint is None else hint


def _fits(value: Any, hint: Any) -> bool:
    """Says whether a value, or what a reference will give, can be of one annotation without alternatives."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    origin = hint if origin is None and hint in _CONTAINERS else origin  # a bare `tuple`
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, (typing.TypeVar, str)):
        return True
    if isinstance(value, Reference):  # one that is called may give anything
        if value.evaluate:
            return _may_give(value, hint)
        return _takes_a_factory(hint if origin is None else origin) and not _lacks_parentheses(value, hint)
    if origin is typing.Literal:
        return value in inner
    if hint is int:
        return type(value) is int or type(value) is float and value.is_integer()
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in _WORDS:
        return type(value) is hint
    if hint in (Path, np.dtype):
        return isinstance(value, str)
    if origin in _CONTAINERS:
        return _contains(value, origin, inner)
    return not isinstance(value, (*_SCALARS, list, tuple, dict)) and value is not None or hint is object


def _may_give(value: Reference, hint: Any) -> bool:
    """Says whether what a called reference gives may be of a class of ours, or meet it by shape, which takes a public
    name of it. What no annotation tells may be anything."""
    made = _made(value)
    if not (inspect.isclass(made) and inspect.isclass(hint) and _OURS.match(hint.__module__)):
        return True
    names = _public(hint)
    return not names or _takes_a_factory(hint) or hasattr(made, "__getattr__") or bool(names & _public(made))


def _lacks_parentheses(value: Any, hint: Any) -> bool:
    """Says whether a reference that is not called gives what can be called, where it is to be called itself and to give
    what can not: a kernel's class instead of a kernel, what makes a schedule instead of a schedule."""
    if not isinstance(value, Reference) or value.evaluate:
        return False
    given, wanted = _made(value), _given_by(hint)
    wanted = typing.get_origin(wanted) or wanted
    if not inspect.isclass(wanted) or wanted in (Any, object, type) or _is_called(wanted):
        return False
    return _is_called(typing.get_origin(given) or given) and not issubclass(typing.get_origin(given) or given, wanted)


def _given_by(hint: Any) -> Any:
    """Returns what a call of something annotated so gives, None where nothing tells."""
    if typing.get_origin(hint) is collections.abc.Callable:
        return typing.get_args(hint)[-1]
    try:
        return typing.get_type_hints(hint.__call__).get("return") if _is_called(hint) else None
    except (NameError, TypeError, AttributeError):
        return None


def _is_called(kind: Any) -> bool:
    """Says whether objects of a class can be called."""
    return inspect.isclass(kind) and any("__call__" in vars(each) for each in kind.__mro__)


def _made(value: Reference) -> Any:
    """Returns the class of what a called reference gives, None where nothing tells."""
    found = configurables.find(value.target, importing=False) if value.target else None
    if found is None or inspect.isclass(found):
        return found
    try:
        return typing.get_type_hints(found).get("return")
    except (NameError, TypeError, AttributeError):
        return None


def _public(kind: type) -> set[str]:
    """Returns the names of a class's methods and fields that users may call or read."""
    fields = getattr(kind, "__dataclass_fields__", {})
    return {name for name in (*dir(kind), *fields) if not name.startswith("_")}


def _refuse_another_kind(value: Any, alternatives: Sequence[Any]) -> None:
    """Raises ValueError for a called reference, or one in a list, whose class has nothing of those asked for."""
    if isinstance(value, (list, tuple)):
        for each in filter(_holds_alike, alternatives):
            inner = list(_alternatives(typing.get_args(each)[0]))
            for entry in value:
                if not any(_fits(entry, one) for one in inner):
                    _refuse_another_kind(entry, inner)
    if not (isinstance(value, Reference) and value.evaluate):
        return
    asked = [each for each in alternatives if inspect.isclass(each) and _OURS.match(each.__module__)]
    if asked:
        has = ", ".join(sorted(_public(asked[0]))[:4])
        raise ValueError(f"it gives a {_made(value).__name__}, which is no {asked[0].__name__} (with {has}, ...)")


def _takes_a_factory(hint: Any) -> bool:
    """Says whether a class or function itself, not what it gives, can be of an annotation without parameters."""
    if hint in _WORDS or hint in _CONTAINERS or hint is typing.Literal:
        return False
    return not inspect.isclass(hint) or hint in (type, object) or _is_called(hint)


_CONTAINERS: tuple[Any, ...] = (
    list,
    tuple,
    dict,
    collections.abc.Sequence,
    collections.abc.Collection,
    collections.abc.Mapping,
)
_CONTAINERS += (collections.abc.Iterable, set, frozenset)


def _contains(value: Any, origin: Any, inner: Sequence[Any]) -> bool:
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and (not inner or all(_fits_any(key, inner[0]) for key in value))
    if not isinstance(value, (list, tuple)):
        return False
    of = [each for each in inner if each is not Ellipsis]
    if len(of) != 1:  # a tuple whose members differ
        return True
    return all(isinstance(each, Macro) or _fits_any(each, of[0]) for each in value)


def _fits_any(value: Any, hint: Any) -> bool:
    return any(_fits(value, each) for each in _alternatives(hint))


def _inside(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (dict, collections.abc.Mapping) else ()


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if hint in _WORDS or hint in _CONTAINERS:
        return _WORDS.get(hint, f"a {hint.__name__.lower()}")
    if origin is typing.Literal:
        return ", ".join(map(repr, typing.get_args(hint)))
    if origin in (dict, collections.abc.Mapping):
        return "a mapping {name: value}"
    if origin in _CONTAINERS:
        return f"a list of {' or '.join(map(_words, _alternatives(typing.get_args(hint)[0])))}"
    return f"a reference (@module.Name{'' if _takes_a_factory(hint if origin is None else origin) else '()'})"
