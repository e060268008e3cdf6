"""Rotary positions in config.json, as transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) have them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from meshway.framework.conversion.settings import Bindings, Config, Reference, not_supported
from meshway.framework.errors import UserError

_LAYERS = ("full_attention", "sliding_attention")
# Their keys of each scaling -> our parameters. What else may stand there says nothing of its own.
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
_SILENT = {"rope_type", "type", "rope_theta", "mscale", "mscale_all_dim", "partial_rotary_factor"}
# Those of `rotary.Llama3`, where a recipe leaves them out: transformers wants each of them.
_DEFAULTS = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_length": 8192}


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
        given = dict(config.get("rope_parameters") or {})
        local: dict[str, Any] = {}
        if any(key in given for key in _LAYERS):
            full, local = (dict(given.get(key) or {}) for key in _LAYERS)
            if self.local_theta is None and local and local != full:
                raise not_supported("rope_parameters", given)
            given = full
        scaling = given | dict(config.get("rope_scaling") or {})
        theta = scaling.get("rope_theta") or config.get("rope_theta") or self.theta
        fraction = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        if fraction != 1.0:
            raise not_supported("partial_rotary_factor", fraction, (1.0,))
        bindings: Bindings = {"ROPE_BASE": float(theta), **self._scaling(scaling, config)}
        if self.local_theta is not None:
            kind = local.get("rope_type", local.get("type", "default"))
            if kind != "default":
                raise not_supported("rope_parameters.sliding_attention.rope_type", kind, ("default",))
            own = local.get("rope_theta") or config.get("rope_local_base_freq") or self.local_theta
            bindings["LOCAL_ROPE_BASE"] = float(own)
        return bindings

    def write(self, bindings: Mapping[str, Any]) -> dict[str, Any]:
        written = {"rope_theta": bindings["ROPE_BASE"], "rope_scaling": _write_scaling(bindings)}
        if self.local_theta is not None:
            written["rope_local_base_freq"] = bindings.get("LOCAL_ROPE_BASE", self.local_theta)
        return written

    def _scaling(self, scaling: Mapping[str, Any], config: Config) -> Bindings:
        kind = scaling.get("rope_type", scaling.get("type", "default")) or "default"
        if kind == "default":
            return {"ROPE_SCALING": None}
        if kind not in SCALINGS:
            hint = ""
            if kind == "dynamic":
                hint = (
                    "; up to max_position_embeddings it is no scaling at all: take it out of config.json, and for "
                    "longer rows bind ROPE_SCALING = @rotary.NTK()"
                )
            message = str(not_supported("rope_scaling.rope_type", kind, ("default", *SCALINGS)))
            raise UserError(message + hint)
        selector, names = SCALINGS[kind]
        unknown = sorted(set(scaling) - set(names) - _SILENT)
        if unknown:
            raise not_supported(f"rope_scaling.{unknown[0]}", scaling[unknown[0]])
        values = {ours: scaling[theirs] for theirs, ours in names.items() if scaling.get(theirs) is not None}
        length = config.get("max_position_embeddings")
        if "original_length" in names.values():
            values.setdefault("original_length", length)
        if "factor" not in values and kind == "yarn":
            values["factor"] = length / values["original_length"]
        if "factor" not in values:
            raise UserError(f"config.json: rope_scaling of type {kind!r} has no factor")
        if kind == "yarn" and "attention_factor" not in values and scaling.get("mscale"):
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
        f"the recipe binds ROPE_SCALING = {reference!r}, which config.json cannot say; it can say None, "
        + ", ".join(f"@{selector}()" for selector, _ in SCALINGS.values())
    )
