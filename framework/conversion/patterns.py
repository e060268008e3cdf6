"""Which layers see a window: single numbers and lists of config.json, scopes of a recipe."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.conversion.settings import Bindings, Config, Reference, not_supported
from meshway.framework.errors import UserError

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
        f"PATTERN has {block!r}, which this family's config.json cannot say; known: "
        + ", ".join(map(repr, _BLOCKS.values()))
    )


def _shortest(kinds: Sequence[str]) -> list[str]:
    """Returns the shortest pattern that repeats to `kinds`, its last time perhaps in part."""
    for period in range(1, len(kinds)):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            return list(kinds[:period])
    return list(kinds)
