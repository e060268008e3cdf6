"""Denoising objectives over plain text: T5's span corruption, UL2's mixture of denoisers, the random prefix.

Which spans are dropped is random in every epoch; how many tokens are dropped is fixed, so that rows can be planned from
sizes. A text is split into the longest windows whose inputs and targets fit their lengths: nothing is lost.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.data.noise import corrupt, corruption_window, noise_counts
from meshway.framework.data.objective import Items
from meshway.framework.data.windowed_text import Room, WindowedTextConverter, item_hash, rotation
from meshway.framework.errors import UserError, did_you_mean

SENTINELS = "sentinels"
_LONGEST_CYCLE = 256  # rows are planned for each epoch of a cycle
_PREFIX_CYCLE = 8


class Denoiser(NamedTuple):
    """One way to corrupt a text; UL2's (mu, r, n).

    Attributes:
      mode: its name, 'R', 'S' or 'X' in UL2; a mode token shows the model which one it is.
      mean_span_length: tokens of a dropped span on average; None drops one span, the text's end (a prefix LM).
      noise_density: share of the tokens that is dropped.
      weight: a whole number: out of as many epochs as all weights sum to, an item gets this denoiser in `weight`.
    """

    mode: str
    mean_span_length: float | None
    noise_density: float
    weight: int = 1


UL2 = (  # Tay et al. 2022, table 1
    Denoiser("R", 3.0, 0.15),
    Denoiser("R", 8.0, 0.15),
    Denoiser("S", None, 0.25),
    Denoiser("X", 3.0, 0.5),
    Denoiser("X", 8.0, 0.5),
    Denoiser("X", 64.0, 0.15),
    Denoiser("X", 64.0, 0.5),
)


class SpanCorruption(WindowedTextConverter):
    """T5's objective (Raffel et al. 2020, section 3.1.4): fill in the spans that were dropped.

    Sentinels are the vocabulary's extra ids, from the highest down. Inputs of 512 make windows of 568 tokens
    and targets of 114, EOS included.

    Args:
      pack: whether training rows hold several items.
      noise_density: share of the tokens that is dropped.
      mean_span_length: tokens of a dropped span on average.
      add_eos: whether the targets end in EOS, and the inputs of an encoder.
      overlong: how a supervised example longer than its lengths is treated: 'truncate', 'skip' or 'error'.
      decoder_only: whether one decoder reads inputs and targets joined, as under `PrefixLanguageModel`.
      window: tokens of the longest window; None: as many as fit. Shorter windows may fill packed rows better.
    """

    def __init__(
        self,
        pack: bool = True,
        noise_density: float = 0.15,
        mean_span_length: float = 3.0,
        add_eos: bool = True,
        overlong: str = "truncate",
        decoder_only: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__(pack, add_eos, overlong, decoder_only, window)
        self.denoiser = Denoiser("", mean_span_length, noise_density)
        _check_denoiser("SpanCorruption", self.denoiser)

    def scheme(self, room: Room) -> "Denoising":
        """Returns how windows become pairs; UserError where lengths or sentinels are too few."""
        return Denoising.within(room, [self.denoiser], {}, "SpanCorruption")


class MixtureOfDenoisers(WindowedTextConverter):
    """UL2's objective (Tay et al. 2022, section 3.1): each text is corrupted by one denoiser of several.

    Over as many epochs as the weights sum to, an item gets every denoiser, in proportion to the weights; within one
    epoch, denoisers are random over the items. Windows must not depend on the epoch, so they are the longest that fit
    under every denoiser.

    Args:
      pack: whether training rows hold several items.
      denoisers: `Denoiser`s, or tuples of their fields: (mode, mean_span_length, noise_density, weight).
      mode_tokens: the id put before the inputs made by a denoiser, by its mode: a mapping of modes to ids;
        'sentinels' for the vocabulary's lowest extra ids, in the order of the modes; None for no mode tokens.
      add_eos: whether the targets end in EOS, and the inputs of an encoder.
      overlong: how a supervised example longer than its lengths is treated: 'truncate', 'skip' or 'error'.
      decoder_only: whether one decoder reads inputs and targets joined, as under `PrefixLanguageModel`.
      window: tokens of the longest window; None: as many as fit. Shorter windows may fill packed rows better.
    """

    def __init__(
        self,
        pack: bool = True,
        denoisers: Sequence[Sequence[Any]] = UL2,
        mode_tokens: Mapping[str, int] | str | None = None,
        add_eos: bool = True,
        overlong: str = "truncate",
        decoder_only: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__(pack, add_eos, overlong, decoder_only, window)
        try:
            self.denoisers = [Denoiser(*fields) for fields in denoisers]
        except TypeError as error:
            raise UserError(
                f"MixtureOfDenoisers.denoisers is {denoisers!r}, but must be a list of "
                "(mode, mean_span_length, noise_density, weight)"
            ) from error
        for number, denoiser in enumerate(self.denoisers):
            _check_denoiser(f"MixtureOfDenoisers.denoisers[{number}]", denoiser)
        weights = [denoiser.weight for denoiser in self.denoisers]
        if not 1 <= sum(weights) <= _LONGEST_CYCLE:
            raise UserError(
                f"MixtureOfDenoisers.denoisers must have weights that sum to 1 to {_LONGEST_CYCLE}, not {weights}"
            )
        self.mode_tokens = mode_tokens
        self._check_modes()

    def scheme(self, room: Room) -> "Denoising":
        """Returns how windows become pairs; UserError where lengths or sentinels are too few."""
        modes = self._modes()
        if self.mode_tokens is None:
            ids: dict[str, int] = {}
        elif isinstance(self.mode_tokens, str):
            last = [*reversed(room.vocabulary.sentinel_ids), *range(len(modes))]  # too few are refused below
            ids = dict(zip(modes, last, strict=False))
        else:
            ids = {mode: self.mode_tokens[mode] for mode in modes}
        return Denoising.within(room, self.denoisers, ids, "MixtureOfDenoisers")

    def _modes(self) -> list[str]:
        return list(dict.fromkeys(denoiser.mode for denoiser in self.denoisers))

    def _check_modes(self) -> None:
        given, modes = self.mode_tokens, self._modes()
        if given is None or given == SENTINELS:
            return
        if not isinstance(given, Mapping):
            near = did_you_mean(str(given), [SENTINELS])
            raise UserError(f"MixtureOfDenoisers.mode_tokens is {given!r}, not ids by mode nor {SENTINELS!r}{near}")
        for mode in modes:
            if mode not in given:
                raise UserError(f"MixtureOfDenoisers.mode_tokens has no id for mode {mode!r}; it has {list(given)}")
            if isinstance(given[mode], bool) or not isinstance(given[mode], int):
                raise UserError(f"MixtureOfDenoisers.mode_tokens[{mode!r}] must be an id, not {given[mode]!r}")
        for mode in given:
            if mode not in modes:
                raise UserError(
                    f"MixtureOfDenoisers.mode_tokens has an id for mode {mode!r}, which no denoiser has; "
                    f"they have {modes}{did_you_mean(str(mode), modes)}"
                )


class RandomPrefix(WindowedTextConverter):
    """A prefix language model on plain text: each window is split into `inputs` and the `targets` after them.

    The split is uniform over the positions where both parts fit. To leave a range of them, a window has half as many
    tokens as inputs and targets together.

    Args:
      pack: whether training rows hold several items.
      add_eos: whether the targets end in EOS, and the inputs of an encoder.
      overlong: how a supervised example longer than its lengths is treated: 'truncate', 'skip' or 'error'.
      decoder_only: whether one decoder reads inputs and targets joined, as under `PrefixLanguageModel`.
      window: tokens of the longest window; None: as many as fit. Shorter windows may fill packed rows better.
    """

    def __init__(
        self,
        pack: bool = True,
        add_eos: bool = True,
        overlong: str = "truncate",
        decoder_only: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__(pack, add_eos, overlong, decoder_only, window)

    def scheme(self, room: Room) -> "PrefixSplit":
        """Returns how windows become pairs; UserError where lengths are too few."""
        if min(room.inputs, room.targets) < 1:
            raise UserError(
                f"task {room.task_name!r}: TASK_FEATURE_LENGTHS leaves {room.inputs} tokens of inputs and "
                f"{room.targets} of targets beside EOS; RandomPrefix needs 1 of each"
            )
        window = min(room.window, (room.inputs + room.targets) // 2)
        return PrefixSplit(room, window, 1 if self.decoder_only else _PREFIX_CYCLE)


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Windows corrupted by denoisers in turn.

    Attributes:
      room: what inputs and targets may hold.
      window: tokens of the longest window.
      turns: the denoiser of each turn, int64 [cycle].
      noise: number of tokens that each denoiser drops from a window of n tokens, int64 [denoisers, window + 1].
      spans: number of spans they form, int64 [denoisers, window + 1].
      heads: mode token put before the inputs made by each denoiser, int32 [0 or 1] each.
      sentinels: ids that replace the spans, in order, int32 [extra ids].
    """

    room: Room
    window: int
    turns: np.ndarray
    noise: np.ndarray
    spans: np.ndarray
    heads: Sequence[np.ndarray]
    sentinels: np.ndarray

    @classmethod
    def within(cls, room: Room, denoisers: Sequence[Denoiser], mode_ids: Mapping[str, int], kind: str) -> "Denoising":
        """Returns the scheme that fits `room`; UserError where there are too few tokens or sentinels."""
        inputs = room.inputs - bool(mode_ids)
        window = min(
            corruption_window(inputs, room.targets, denoiser.noise_density, denoiser.mean_span_length)
            for denoiser in denoisers
        )
        window = min(window, room.window)
        if not window:
            raise UserError(
                f"task {room.task_name!r}: TASK_FEATURE_LENGTHS leaves {max(inputs, 0)} tokens of inputs and "
                f"{max(room.targets, 0)} of targets beside EOS and mode tokens; {kind} needs 1 and 2"
            )
        counts = [
            noise_counts(np.arange(1, window + 1), denoiser.noise_density, denoiser.mean_span_length)
            for denoiser in denoisers
        ]
        noise, spans = (np.pad(np.stack(column), [(0, 0), (1, 0)]) for column in zip(*counts, strict=True))
        _check_sentinels(room, int(spans.max()), window, mode_ids, kind)
        weights = np.array([denoiser.weight for denoiser in denoisers])
        turns = np.repeat(np.arange(len(denoisers)), weights // np.gcd.reduce(weights))
        heads = [np.array([mode_ids[d.mode]] if mode_ids else [], np.int32) for d in denoisers]
        return cls(room, window, turns, noise, spans, heads, np.array(room.vocabulary.sentinel_ids, np.int32))

    @property
    def cycle(self) -> int:
        return len(self.turns)

    def measure(self, size: np.ndarray, items: Items) -> tuple[np.ndarray, np.ndarray]:
        which = self._which(items)
        noise, spans = self.noise[which, size], self.spans[which, size]
        inputs = size - noise + spans + len(self.heads[0]) + len(self.room.inputs_end)
        return inputs, noise + spans + len(self.room.targets_end)

    def pair(self, tokens: np.ndarray, items: Items, seed: int) -> tuple[np.ndarray, np.ndarray]:
        which, size = self._which(items), len(tokens)
        noise, spans = int(self.noise[which, size]), int(self.spans[which, size])
        inputs, targets = corrupt(tokens, noise, spans, self.sentinels, seed)
        return (
            np.concatenate([self.heads[which], inputs, self.room.inputs_end]),
            np.concatenate([targets, self.room.targets_end]),
        )

    def _which(self, items: Items) -> Any:
        """Returns the denoiser of each item, int64 [items]; one for all where there is only one."""
        return self.turns[rotation(items, self.cycle)] if self.cycle > 1 else 0


@dataclasses.dataclass(frozen=True)
class PrefixSplit:
    """Windows split into a prefix and its rest.

    Attributes:
      room: what inputs and targets may hold.
      window: tokens of the longest window.
      cycle: epochs after which sizes repeat.
    """

    room: Room
    window: int
    cycle: int

    def measure(self, size: np.ndarray, items: Items) -> tuple[np.ndarray, np.ndarray]:
        at = self._at(size, items)
        return at + len(self.room.inputs_end), size - at + len(self.room.targets_end)

    def pair(self, tokens: np.ndarray, items: Items, seed: int) -> tuple[np.ndarray, np.ndarray]:
        at = int(self._at(np.asarray(len(tokens)), items))
        return (
            np.concatenate([tokens[:at], self.room.inputs_end]),
            np.concatenate([tokens[at:], self.room.targets_end]),
        )

    def _at(self, size: np.ndarray, items: Items) -> np.ndarray:
        """Returns where windows of `size` [items] tokens are split, int64 [items]; a single token is a target."""
        most = np.minimum(self.room.inputs, np.maximum(size - 1, 0))
        least = np.minimum(np.maximum(1, size - self.room.targets), most)
        # Over the epochs an item is split in each eighth of the range in turn, at a random position within it.
        within = (item_hash(items) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        share = (rotation(items, _PREFIX_CYCLE) + within) / _PREFIX_CYCLE
        return np.minimum(least + (share * (most - least + 1)).astype(np.int64), most)


def _check_denoiser(where: str, denoiser: Denoiser) -> None:
    mode, mean, density, weight = denoiser
    if not isinstance(mode, str):
        raise UserError(f"{where}: mode must be a name, not {mode!r}")
    if mean is not None and (isinstance(mean, str) or not mean >= 1):
        raise UserError(f"{where}: mean_span_length must be at least 1 token, or None for a prefix LM, not {mean!r}")
    if isinstance(density, str) or not 0 < density < 1:
        raise UserError(f"{where}: noise_density must be between 0 and 1, not {density!r}")
    if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
        raise UserError(f"{where}: weight must be a whole number of epochs, at least 1, not {weight!r}")


def _check_sentinels(room: Room, spans: int, window: int, mode_ids: Mapping[str, int], kind: str) -> None:
    vocabulary, sentinels = room.vocabulary, room.vocabulary.sentinel_ids
    reserved = sum(1 for token in mode_ids.values() if token in sentinels)
    if spans > vocabulary.extra_ids - reserved:
        beside = f", {reserved} of them for modes" if reserved else ""
        raise UserError(
            f"task {room.task_name!r}: {kind} drops up to {spans} spans from a window of {window} tokens, but the "
            f"vocabulary has {vocabulary.extra_ids} extra ids for sentinels{beside}; shorten "
            "TASK_FEATURE_LENGTHS, lengthen the mean span, or give the vocabulary more extra ids"
        )
    for mode, token in mode_ids.items():
        if not 0 <= token < vocabulary.size or token in sentinels[:spans]:
            raise UserError(
                f"task {room.task_name!r}: the token {token} of mode {mode!r} must be an id from 0 to "
                f"{vocabulary.size - 1} and none of the {spans} first sentinels, which stand for spans"
            )
