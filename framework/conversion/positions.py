"""Positions and windows in config.json: rotary scaling of transformers 4 and 5, and which layers see a window."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.conversion.family import (
    COUNT,
    FLAG,
    KINDS,
    NOT_NEGATIVE,
    OBJECT,
    POSITIVE,
    TEXT,
    Kind,
    check_fields,
)
from meshway.framework.conversion.settings import Bindings, Config, Reference, not_supported
from meshway.framework.errors import UserError

_LAYERS = ("full_attention", "sliding_attention")
# Their keys of each scaling -> our parameters.
_LINEAR = {"factor": "factor"}
_LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_length",
}
_YARN = {
    "factor": "factor",
    "original_max_position_embeddings": "original_length",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
SCALINGS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "linear": ("rotary.Linear", _LINEAR),
    "llama3": ("rotary.Llama3", _LLAMA3),
    "yarn": ("rotary.YaRN", _YARN),
}
# Keys without which transformers refuses a scaling. YaRN's factor may be null: two lengths then tell it.
_DEMANDED = {"linear": ("factor",), "llama3": tuple(_LLAMA3), "yarn": ("factor",)}
_PLAIN: Mapping[str, Kind] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": KINDS["rope_theta"],
    "partial_rotary_factor": KINDS["partial_rotary_factor"],
}  # what may stand beside any scaling, and without one
_KINDS: Mapping[str, Mapping[str, Kind]] = {
    "default": _PLAIN,
    "linear": {**_PLAIN, "factor": POSITIVE},
    "llama3": {
        **_PLAIN,
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_max_position_embeddings": COUNT,
    },
    "yarn": {
        **_PLAIN,
        "factor": POSITIVE.or_nothing(),
        "original_max_position_embeddings": COUNT.or_nothing(),
        "beta_fast": POSITIVE.or_nothing(),
        "beta_slow": POSITIVE.or_nothing(),
        "attention_factor": POSITIVE.or_nothing(),
        "truncate": FLAG,
        "mscale": NOT_NEGATIVE.or_nothing(),
        "mscale_all_dim": NOT_NEGATIVE.or_nothing(),
    },
}
# Those of `rotary.Llama3`, where a recipe leaves them out: transformers wants each of them.
_DEFAULTS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_length": 8192}


# What config.json means where it leaves these out; they are `rotary.YaRN`'s own defaults too.
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}


@dataclasses.dataclass(frozen=True)
class Rope:
    """The base and the scaling. `local` says that layers with a window have a base of their own, never scaled."""

    theta: float = 10000.0
    local_theta: float | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        own = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
        return (*own, "rope_local_base_freq") if self.local_theta is not None else own

    def read(self, config: Config) -> Bindings:
        given, local = self._parameters(config)
        older = config.get("rope_scaling") or {}
        within = "rope_scaling" if older else "rope_parameters"
        _check_agree("rope_parameters.", given, "rope_scaling", older)
        scaling = {**given, **older}
        kind = _check(scaling, within)
        for field in ("rope_theta", "partial_rotary_factor"):
            own = config.get(field)
            if own is not None:
                _check_agree("", {field: own}, within, scaling)
                scaling[field] = own
        if scaling.get("partial_rotary_factor") not in (None, 1.0):
            raise not_supported("partial_rotary_factor", scaling["partial_rotary_factor"], (1.0,))
        bindings: Bindings = {"ROPE_BASE": float(scaling.get("rope_theta") or self.theta)}
        bindings |= _scaling(kind, scaling, config)
        if self.local_theta is not None:
            bindings["LOCAL_ROPE_BASE"] = self._local_base(local, config.get("rope_local_base_freq"))
        return bindings

    def _parameters(self, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `rope_parameters` of all layers or else of those without a window, and of those with one."""
        given = dict(config.get("rope_parameters") or {})
        if not any(key in given for key in _LAYERS):
            return given, {}
        check_fields(given, dict.fromkeys(_LAYERS, OBJECT), "rope_parameters")
        for key in given:
            if key not in _LAYERS:
                raise not_supported(f"rope_parameters.{key}", given[key], _LAYERS)
        needed = _LAYERS if self.local_theta is not None else _LAYERS[:1]
        lacking = [key for key in needed if key not in given]
        if lacking:
            raise UserError(f"config.json: rope_parameters says nothing of {lacking[0]}, only of {', '.join(given)}")
        full, local = (dict(given.get(key) or {}) for key in _LAYERS)
        if self.local_theta is None and local and local != full:
            raise not_supported("rope_parameters", given)
        return full, local

    def _local_base(self, local: Mapping[str, Any], older: float | None) -> float:
        """Returns the base of layers with a window, from their part of `rope_parameters` and the older field."""
        name = f"rope_parameters.{_LAYERS[1]}"
        kind = _check(local, name)
        if kind != "default":
            raise not_supported(f"{name}.rope_type", kind, ("default",))
        own = local.get("rope_theta")
        if own is not None and older is not None and own != older:
            raise UserError(f"config.json: rope_local_base_freq is {older!r} and {name}.rope_theta {own!r}: drop one")
        return float(own or older or self.local_theta)  # type: ignore[arg-type]

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        written = {"rope_theta": bindings["ROPE_BASE"], "rope_scaling": _write_scaling(bindings)}
        if self.local_theta is not None:
            written["rope_local_base_freq"] = bindings.get("LOCAL_ROPE_BASE", self.local_theta)
        return written


def _check(scaling: Mapping[str, Any], within: str) -> str:
    """Returns which scaling it is.

    Raises:
      UserError: that is told twice, or not at all; it is none that meshway knows; a key is missing, changes what
        meshway does not know, or has a wrong value.
    """
    check_fields(scaling, _PLAIN, within)
    named = {scaling[key] for key in ("rope_type", "type") if key in scaling}
    if len(named) > 1:
        raise UserError(
            f"config.json: {within} has the rope_type {scaling['rope_type']!r} and the type {scaling['type']!r}"
        )
    kind: str | None = next(iter(named), None)
    if kind is None:
        kind = "default"
        unknown = sorted(set(scaling) - set(_PLAIN))
        if unknown:
            raise UserError(f"config.json: {within} has {unknown[0]} and no rope_type; known are {', '.join(_KINDS)}")
    if kind not in _KINDS:
        hint = ""
        if kind == "dynamic":
            hint = (
                "; up to max_position_embeddings it changes nothing: take it out of config.json, and for "
                "longer rows bind ROPE_SCALING = @rotary.NTK()"
            )
        raise UserError(f"{not_supported(f'{within}.rope_type', kind, list(_KINDS))}{hint}")
    for key in sorted(set(scaling) - set(_KINDS[kind])):
        raise not_supported(f"{within}.{key}", scaling[key])
    lacking = [key for key in _DEMANDED.get(kind, ()) if key not in scaling]
    if lacking:
        raise UserError(
            f"config.json: {within} of type {kind!r} has no {', '.join(lacking)}: transformers refuses it, and meshway "
            "guesses nothing"
        )
    check_fields(scaling, _KINDS[kind], within)
    return kind


def _check_agree(first: str, one: Mapping[str, Any], second: str, other: Mapping[str, Any]) -> None:
    """Raises UserError where two objects say different things of one field; `first` ends with a dot, or is ''."""
    for key, value in one.items():
        if value is not None and other.get(key) is not None and other[key] != value:
            raise UserError(f"config.json: {first}{key} is {value!r} and {second}.{key} {other[key]!r}: drop one")


def _scaling(kind: str, scaling: Mapping[str, Any], config: Config) -> Bindings:
    if kind == "default":
        return {"ROPE_SCALING": None}
    selector, names = SCALINGS[kind]
    given = {ours: scaling[theirs] for theirs, ours in names.items() if scaling.get(theirs) is not None}
    values = {**_LEFT_OUT.get(kind, {}), **given}
    if kind == "yarn":
        length = config.get("max_position_embeddings")
        original = values.setdefault("original_length", length)
        if original is None or ("factor" not in values and length is None):
            raise UserError("config.json: rope_scaling of type 'yarn' needs max_position_embeddings, which is null")
        if "factor" not in values:
            values["factor"] = length / original
        if "attention_factor" not in values and scaling.get("mscale"):
            values |= _attention_factor(values["factor"], scaling)
    return {"ROPE_SCALING": Reference(selector)} | {f"{selector}.{name}": value for name, value in values.items()}


def _attention_factor(factor: float, scaling: Mapping[str, Any]) -> dict[str, float]:
    """Returns what DeepSeek's two numbers say; nothing where one of them is missing, as in transformers."""
    if not scaling.get("mscale_all_dim") or factor <= 1:
        return {}
    above, below = (0.1 * scaling[key] * math.log(factor) + 1.0 for key in ("mscale", "mscale_all_dim"))
    return {"attention_factor": above / below}


def _write_scaling(bindings: Mapping[str, Any]) -> dict[str, Any] | None:
    reference = bindings.get("ROPE_SCALING")
    if reference is None:
        return None
    for kind, (selector, names) in SCALINGS.items():
        if isinstance(reference, Reference) and reference.selector == selector:
            values = {theirs: bindings.get(f"{selector}.{ours}", _DEFAULTS.get(ours)) for theirs, ours in names.items()}
            return {"rope_type": kind} | {key: value for key, value in values.items() if value is not None}
    raise UserError(
        f"the recipe binds ROPE_SCALING = {reference!r}, which config.json cannot express; it can express None, "
        + ", ".join(f"@{selector}()" for selector, _ in SCALINGS.values())
    )


SLIDING, FULL = "sliding_attention", "full_attention"
_BLOCKS = {
    SLIDING: Reference("local/blocks.SelfAttentionBlock", evaluate=False),
    FULL: Reference("blocks.SelfAttentionBlock", evaluate=False),
}


@dataclasses.dataclass(frozen=True)
class Window:
    """A window in every layer (Mistral), or null."""

    @property
    def fields(self) -> tuple[str, ...]:
        return ("sliding_window", "layer_types")

    def read(self, config: Config) -> Bindings:
        window, kinds = config.get("sliding_window"), config.get("layer_types") or ()
        expected = FULL if window is None else SLIDING
        if any(kind != expected for kind in kinds):
            raise not_supported("layer_types", list(kinds), ([expected],))
        return {"WINDOW": window}

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        return {"sliding_window": bindings["WINDOW"]}


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers with a window and layers without, in any order.

    `period`: the recipe's own pattern is that many blocks, all in the scope `local` but the last (Gemma); else its
    layers are alike, without a window (Qwen). `starts` names the field with the first layer that has a window, where
    config.json tells layers by that; `periods` the fields that may tell another period.
    """

    period: int = 0
    starts: str = ""
    periods: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        own = ("sliding_window", "layer_types")
        if self.starts:
            return (*own, "use_sliding_window", self.starts)
        return (*own, *self.periods)

    def read(self, config: Config) -> Bindings:
        kinds, window = self._kinds(config), config.get("sliding_window")
        unknown = [kind for kind in kinds if kind not in (SLIDING, FULL)]
        if unknown or len(kinds) != config["num_hidden_layers"]:
            raise not_supported("layer_types", list(kinds), (SLIDING, FULL))
        if SLIDING in kinds and window is None:
            raise not_supported("sliding_window", None)
        if SLIDING in kinds and self.starts and not config["use_sliding_window"]:
            raise UserError(
                "config.json: layer_types has sliding_attention, but without use_sliding_window = true there is "
                "no window: set it, or make all layers full_attention"
            )
        bindings: Bindings = {}
        if self.period:
            if SLIDING in kinds:
                bindings["WINDOW"] = window
            if kinds != _periodic(self.period, len(kinds)):
                bindings["PATTERN"] = [_BLOCKS[kind] for kind in _shortest(kinds)]
        elif SLIDING in kinds:
            bindings["local/attention.Attention.window"] = window
            bindings["PATTERN"] = [_BLOCKS[kind] for kind in _shortest(kinds)]
        return bindings

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        pattern, count = [_kind(block) for block in bindings["PATTERN"]], bindings["NUM_LAYERS"]
        kinds = [pattern[layer % len(pattern)] for layer in range(count)]
        if SLIDING not in kinds:
            return {"layer_types": kinds} if self.period else {"layer_types": kinds, "sliding_window": None}
        if self.period:
            return {"sliding_window": bindings["WINDOW"], "layer_types": kinds}
        first = kinds.index(SLIDING)
        start = first if kinds == [FULL] * first + [SLIDING] * (count - first) else 0
        window = bindings["local/attention.Attention.window"]
        return {"use_sliding_window": True, "sliding_window": window, "layer_types": kinds, self.starts: start}

    def _kinds(self, config: Config) -> list[str]:
        """Returns what each layer is, as transformers decides it."""
        count = config["num_hidden_layers"]
        if config.get("layer_types") is not None:
            return list(config["layer_types"])
        if self.starts:
            first = config[self.starts] if config["use_sliding_window"] else count
            return [SLIDING if layer >= first else FULL for layer in range(count)]
        told = {config[field] for field in self.periods if config.get(field) is not None}
        if len(told) > 1:
            raise UserError(f"config.json: {' and '.join(self.periods)} differ: {sorted(told)}; drop one")
        return _periodic(next(iter(told), self.period), count)


def _periodic(period: int, count: int) -> list[str]:
    """Returns so many layers with a window, but for every `period`-th."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(count)]


def _kind(block: Any) -> str:
    for kind, known in _BLOCKS.items():
        if block == known:
            return kind
    raise UserError(
        f"PATTERN has {block!r}, which this family's config.json cannot express; supported: "
        + ", ".join(map(repr, _BLOCKS.values()))
    )


def _shortest(kinds: Sequence[str]) -> list[str]:
    """Returns the shortest pattern that repeats to `kinds`, its last time perhaps in part."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            return list(kinds[:period])
    return list(kinds)
