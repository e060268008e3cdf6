"""Token ids as rows of a model's batch: prompts to go on from, targets to score. Numpy only."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.data.vocabulary import after_start
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Model

Tokens = Sequence[int]
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How a model reads text: told by what its batches hold.

    Attributes:
      has_encoder: inputs go to an encoder; else inputs and targets are one sequence.
      has_prefix: inputs of that sequence see each other both ways (prefix LM).
      start: what the decoder reads before anything else: T5X's 0, a model's own BOS, or nothing. T5's where no run
        is at hand.
      bos: the same where a sequence may spell it out itself, see `Framing.bos`; else ().
    """

    has_encoder: bool
    has_prefix: bool = False
    start: tuple[int, ...] = (0,)
    bos: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Model, start: Sequence[int] = (0,), bos: Sequence[int] = ()) -> "RowFormat":
        """Returns the format of a model.

        Raises:
          UserError: it reads no tokens, or predicts none; `start` is not one id, and there is an encoder.
        """
        names = set(model.batch_spec(1, {"inputs": 1, "targets": 1}))
        if "decoder_input_tokens" not in names:
            raise UserError(
                f"{type(model).__name__} has no decoder: it neither predicts nor scores text (its batches hold "
                f"{', '.join(sorted(names))})"
            )
        if "encoder_input_tokens" in names and len(start) != 1:
            raise UserError(f"a decoder that predicts from an encoder starts from one id, not from {list(start)}")
        return cls("encoder_input_tokens" in names, "decoder_prefix_mask" in names, tuple(start), tuple(bos))

    def prompt_size(self, inputs: Tokens) -> int:
        """Returns how many tokens of a prompt row an example takes."""
        return len(inputs) if self.has_encoder else len(self.begun(inputs))

    def begun(self, tokens: Tokens) -> list[int]:
        """Returns a decoder's sequence behind its start, once."""
        return [*self.start, *after_start(tokens, self.bos)]

    def prompts(self, inputs: Sequence[Tokens], length: int) -> Arrays:
        """Returns what `Model.prefill` reads of each example, [examples, length].

        Raises:
          ValueError: an example takes more than `length` tokens, or none at all.
        """
        if self.has_encoder:
            start = np.full((len(inputs), 1), self.start[0], np.int32)
            return _encoder(inputs, length) | {"decoder_input_tokens": start}
        sequences = [self.begun(each) for each in inputs]
        tokens, segments, positions = _filled(sequences, length)
        arrays = {
            "decoder_input_tokens": tokens,
            "decoder_target_tokens": np.zeros_like(tokens),
            "decoder_loss_weights": np.zeros(tokens.shape, np.float32),
            "decoder_segment_ids": segments,
            "decoder_positions": positions,
        }
        return arrays | ({"decoder_prefix_mask": segments.copy()} if self.has_prefix else {})

    def room(self, inputs: int, targets: int, scores: bool) -> dict[str, int]:
        """Returns the most tokens of an example by feature of a batch, for so many of inputs and targets: what
        `prompt_size` or, where it `scores`, `scored_size` may say."""
        if self.has_encoder:
            return {"inputs": inputs, "targets": targets}
        start = len(self.start)
        return {"targets": start + inputs + targets} if scores else {"inputs": start + inputs, "targets": targets}

    def scored_size(self, inputs: Tokens, targets: Tokens) -> dict[str, int]:
        """Returns how many tokens of each feature of a scored row an example takes."""
        if self.has_encoder:
            return {"inputs": len(inputs), "targets": len(targets)}
        return {"targets": max(1, len(self.begun([*inputs, *targets])) - 1)}

    def scored(self, inputs: Sequence[Tokens], targets: Sequence[Tokens], lengths: Mapping[str, int]) -> Arrays:
        """Returns what `Model.score` reads of each example; only targets have weight.

        Raises:
          ValueError: an example takes more tokens than `lengths` says.
        """
        known = [[]] * len(inputs) if self.has_encoder else inputs
        wholes = [self.begun([*before, *new]) for before, new in zip(known, targets, strict=True)]
        # What is predicted by the last token before the targets, and on.
        firsts = [max(0, self._first(before, new)) for before, new in zip(known, targets)]
        read, predicted = [whole[:-1] for whole in wholes], [whole[1:] for whole in wholes]
        arrays = _decoder(read, predicted, firsts, lengths["targets"])
        if self.has_encoder:
            return _encoder(inputs, lengths["inputs"]) | arrays
        if self.has_prefix:
            places = np.arange(lengths["targets"])
            counts = np.array([first + 1 for first in firsts])[:, None]
            arrays["decoder_prefix_mask"] = ((places < counts) & (arrays["decoder_segment_ids"] > 0)).astype(np.int32)
        return arrays

    def of_targets(self, rows: np.ndarray, inputs: Sequence[Tokens], targets: Sequence[Tokens]) -> list[np.ndarray]:
        """Returns what rows [examples, length], as `Model.score` gives them, say of each example's targets alone.

        The first token of a sequence is predicted by nothing where no start stands before it: it gets 0.
        """
        found = []
        for row, known, new in zip(rows, inputs, targets):
            first = self._first([] if self.has_encoder else known, new)
            scores = row[max(first, 0) : first + len(new)]
            found.append(np.concatenate([np.zeros(len(new) - len(scores), row.dtype), scores]))
        return found

    def _first(self, known: Tokens, new: Tokens) -> int:
        """Returns the place that predicts the first token of `new`; -1 where none does."""
        return len(self.begun([*known, *new])) - len(new) - 1


def _encoder(inputs: Sequence[Tokens], length: int) -> Arrays:
    tokens, segments, positions = _filled(inputs, length)
    return {"encoder_input_tokens": tokens, "encoder_segment_ids": segments, "encoder_positions": positions}


def _decoder(read: Sequence[Tokens], predicted: Sequence[Tokens], firsts: Sequence[int], length: int) -> Arrays:
    """Returns the decoder's features; predictions count from place `firsts` of each row on."""
    tokens, segments, positions = _filled(read, length)
    targets = _filled(predicted, length)[0]
    counted = (np.arange(length) >= np.array(firsts)[:, None]) & (segments > 0)
    return {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": targets,
        "decoder_loss_weights": counted.astype(np.float32),
        "decoder_segment_ids": segments,
        "decoder_positions": positions,
    }


def _filled(sequences: Sequence[Tokens], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (tokens, segment ids, positions), int32 [sequences, length] each: left-aligned, then zeros."""
    sizes = np.array([len(each) for each in sequences])[:, None]
    if len(sizes) and sizes.max() > length:
        raise ValueError(f"a sequence of {sizes.max()} tokens does not fit into {length}")
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, each in zip(tokens, sequences):
        row[: len(each)] = each
    segments = (np.arange(length) < sizes).astype(np.int32)
    return tokens, segments, np.arange(length, dtype=np.int32) * segments
