"""Objectives that make inputs and targets from plain text: a text is split into windows, each window into a pair.

A text is an example with `targets` only (or with empty `inputs`). An example with both is left unchanged, so that a
mixture may hold both texts and supervised tasks.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from meshway.framework.data.features import EncoderDecoder, PrefixLanguageModel
from meshway.framework.data.objective import Items, Objective, Sizes, Spec, TaskInfo, VocabularyInfo
from meshway.framework.data.rows.mixing import hash64
from meshway.framework.data.rows.packing import Arrays, Example, Placement
from meshway.framework.data.token_rows import WHOLE, check_policy, check_tokens, window_size, windows
from meshway.framework.errors import UserError


class Scheme(Protocol):
    """How a window of text becomes a pair.

    Attributes:
      window: tokens of the longest window, in every epoch.
      cycle: number of epochs after which the sizes of the same items repeat.
    """

    @property
    def window(self) -> int: ...

    @property
    def cycle(self) -> int: ...

    def measure(self, size: np.ndarray, items: Items) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lengths of (inputs, targets) made from windows of `size` [items] tokens, int64 [items] each."""
        ...

    def pair(self, tokens: np.ndarray, items: Items, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (inputs, targets) of a window, of the lengths that `measure` returns; `items` holds scalars."""
        ...


@dataclasses.dataclass(frozen=True)
class Room:
    """The limits within which a scheme makes pairs.

    Attributes:
      task_name: for messages.
      vocabulary: of the text.
      inputs: tokens that fit in a pair's inputs, before `inputs_end` is appended.
      targets: tokens that fit in its targets, before `targets_end` is appended.
      inputs_end: EOS or nothing, int32 [0 or 1].
      targets_end: EOS or nothing, int32 [0 or 1].
      window: most tokens of a window, where they all fit.
    """

    task_name: str
    vocabulary: VocabularyInfo
    inputs: int
    targets: int
    inputs_end: np.ndarray
    targets_end: np.ndarray
    window: int


class WindowedTextConverter(abc.ABC):
    """The base of the converters of plain text.

    Args:
      pack: whether training rows hold several items.
      add_eos: whether a pair made of text ends in EOS: its targets, and its inputs where an encoder reads them.
      overlong: how a supervised example longer than its lengths is treated: 'truncate', 'skip' or 'error'.
        Texts are never too long.
      decoder_only: whether inputs and targets are joined in the rows of one decoder, as in `PrefixLanguageModel`;
        if not, an encoder reads the inputs.
      window: tokens of the longest window; None: as many as fit. Shorter windows may fill packed rows better.
    """

    can_predict = True  # supervised tasks
    task_features: tuple[str, ...] = ("inputs", "targets")

    def __init__(self, pack: bool, add_eos: bool, overlong: str, decoder_only: bool, window: int | None) -> None:
        if window is not None and (type(window) is not int or window < 1):
            raise UserError(f"{type(self).__name__}.window must be a whole number of tokens or None, not {window!r}")
        self.pack = pack
        self.add_eos = add_eos
        self.decoder_only = decoder_only
        self.window = window
        check_policy(overlong, type(self).__name__, WHOLE)
        pairs = PrefixLanguageModel if decoder_only else EncoderDecoder
        self._pairs: PrefixLanguageModel | EncoderDecoder = pairs(pack, overlong=overlong)

    @abc.abstractmethod
    def scheme(self, room: Room) -> Scheme:
        """Returns how windows become pairs; UserError where `room` is too small."""

    def spec(self, lengths: Mapping[str, int], batch_size: int) -> Spec:
        """Returns name -> ((batch, length), dtype) of a batch, for task feature `lengths` in tokens."""
        return self._pairs.spec(lengths, batch_size)

    def bind(self, task: TaskInfo, lengths: Mapping[str, int]) -> "WindowedText":
        """Returns the objective of a task with `targets`, and maybe `inputs`.

        Raises:
          UserError: task, lengths and converter do not fit; the message names which and why.
        """
        kind = type(self).__name__
        if "targets" not in task.features:
            raise UserError(task.lacks("targets", kind))
        if missing := [name for name in self.task_features if name not in lengths]:
            example = {name: lengths.get(name, 128) for name in self.task_features}
            raise UserError(
                f"{kind} makes inputs and targets of the text of task {task.name!r}, but TASK_FEATURE_LENGTHS lacks "
                f'{missing}; give --gin.TASK_FEATURE_LENGTHS="{example}"'
            )
        made = dataclasses.replace(task, features={"inputs": task.features["targets"], **task.features})
        check_tokens(
            kind, made, lengths, ("targets", "inputs")
        )  # the feature to blame comes first: for a text, its targets
        room = self._room(task, lengths)
        return WindowedText(task.name, "inputs" in task.features, self.scheme(room), self._pairs.bind(made, lengths))

    def _room(self, task: TaskInfo, lengths: Mapping[str, int]) -> Room:
        kind = type(self).__name__
        vocabulary = task.features["targets"].vocabulary
        if vocabulary is None:
            raise UserError(f"task {task.name!r}: feature 'targets' has no vocabulary, which {kind} needs")
        if self.add_eos and vocabulary.eos_id is None:
            raise UserError(
                f"{kind} ends each pair in EOS, but the vocabulary of task {task.name!r} has none; set {kind}.add_eos "
                "to False, or give the vocabulary one"
            )
        nothing = np.zeros(0, np.int32)
        targets_end = np.array([vocabulary.eos_id], np.int32) if self.add_eos else nothing
        inputs_end = nothing if self.decoder_only else targets_end
        inputs, targets = lengths["inputs"] - len(inputs_end), lengths["targets"] - len(targets_end)
        window = self.window or lengths["inputs"] + lengths["targets"]
        return Room(task.name, vocabulary, inputs, targets, inputs_end, targets_end, window)


@dataclasses.dataclass(frozen=True)
class WindowedText:
    """A converter of plain text bound to one task.

    Attributes:
      task_name: for messages.
      has_inputs: whether the task's examples have `inputs`, empty or not.
      scheme: makes pairs from windows.
      pairs: the objective of supervised examples, which also lays out the pairs.
    """

    task_name: str
    has_inputs: bool
    scheme: Scheme
    pairs: Objective

    @property
    def row_lengths(self) -> Mapping[str, int]:
        return self.pairs.row_lengths

    @property
    def trims(self) -> Mapping[str, int]:
        return self.pairs.trims if self.has_inputs else {}

    @property
    def cycle(self) -> int:
        return self.scheme.cycle

    def parts(self, sizes: Sizes) -> np.ndarray:
        is_text, supervised = self._divided(sizes)
        return np.where(is_text, windows(sizes["targets"], self.scheme.window), self.pairs.parts(supervised))

    def lost(self, sizes: Sizes) -> np.ndarray:
        return self.pairs.lost(self._divided(sizes)[1])

    def measure(self, sizes: Sizes, items: Items) -> dict[str, np.ndarray]:
        is_text, supervised = self._divided(sizes)
        inputs, targets = self.scheme.measure(
            window_size(np.where(is_text, sizes["targets"], 0), items.part, self.scheme.window), items
        )
        made = {
            "inputs": np.where(is_text, inputs, supervised["inputs"]),
            "targets": np.where(is_text, targets, supervised["targets"]),
        }
        return self.pairs.measure(made, dataclasses.replace(items, part=np.zeros_like(items.part)))

    def convert(self, example: Example, index: int, part: int, epoch: int, seed: int) -> dict[str, np.ndarray]:
        if not self.has_inputs or not len(example["inputs"]):
            start = part * self.scheme.window
            tokens = np.asarray(example["targets"])[start : start + self.scheme.window]
            items = Items(np.asarray(index), np.asarray(part), np.asarray(epoch))
            inputs, targets = self.scheme.pair(tokens, items, seed)
            example = {"inputs": inputs, "targets": targets}
        return self.pairs.convert(example, index, 0, epoch, seed)

    def lay(self, items: Sequence[Example], placement: Placement) -> Arrays:
        return self.pairs.lay(items, placement)

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        if not all(self.has_inputs and len(example["inputs"]) for example in examples):
            raise UserError(
                f"task {self.task_name!r} has text without inputs, so there is nothing to predict from; "
                "evaluate it by its loss, that is, register it without metric functions of predictions"
            )
        return self.pairs.prompts(examples)

    def _divided(self, sizes: Sizes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Returns (whether each example is text, sizes with those of texts set to 0), [examples] each."""
        targets = np.asarray(sizes["targets"], np.int64)
        inputs = np.asarray(sizes["inputs"], np.int64) if self.has_inputs else np.zeros_like(targets)
        is_text = inputs == 0
        return is_text, {"inputs": inputs, "targets": np.where(is_text, 0, targets)}


def rotation(items: Items, period: int) -> np.ndarray:
    """Returns a number below `period` for each item, int64 [items]: random over items, taking turns over epochs."""
    return ((item_hash(items) % np.uint64(period)).astype(np.int64) + items.epoch) % period


def item_hash(items: Items) -> np.ndarray:
    """Returns 64 random bits for each example and part, uint64 [items], the same in every epoch."""
    return hash64(items.index.astype(np.uint64) ^ items.part.astype(np.uint64) << np.uint64(40))
