"""Text and token ids as rows of a model's batch: vocabularies, what stands before and after, and padded lengths."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data import vocabularies
from meshway.framework.data.vocabulary import Framing, Vocabulary, after_start, before_stop
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Model

SMALLEST = 16


class Buckets:
    """Increasing shapes of one batch, in tokens by feature; an example belongs to the first that it fits into.

    An example's bucket depends on its own size alone, so what is computed of it does not depend on its neighbours.
    """

    def __init__(self, shapes: Sequence[Mapping[str, int]]):
        """Raises UserError where there are none, or one is no larger than the one before."""
        if not shapes:
            raise UserError("buckets: there must be at least one length")
        self.shapes = [dict(shape) for shape in shapes]
        for small, large in zip(self.shapes, self.shapes[1:]):
            if small.keys() != large.keys() or any(small[name] > large[name] for name in small) or small == large:
                raise UserError(f"buckets must grow: {large} does not follow {small}")
        if any(length < 1 for shape in self.shapes for length in shape.values()):
            raise UserError(f"buckets: lengths must be at least 1 token, not {self.shapes[0]}")

    @property
    def largest(self) -> Mapping[str, int]:
        """The shape that any example must fit into."""
        return self.shapes[-1]

    def of(self, sizes: Mapping[str, int]) -> int | None:
        """Returns which shape an example of `sizes` belongs to, None where it fits into none."""
        found = bisect.bisect_left(
            self.shapes, True, key=lambda shape: all(sizes[name] <= shape[name] for name in sizes)
        )
        return found if found < len(self.shapes) else None


def doubling(longest: Mapping[str, int], smallest: int = SMALLEST) -> Buckets:
    """Returns buckets that halve `longest`, all features together, until the longest of them is about `smallest`."""
    shapes = [dict(longest)]
    while max(shapes[-1].values()) > smallest:
        halved = {name: max(1, -(-length // 2)) for name, length in shapes[-1].items()}
        if halved == shapes[-1]:
            break
        shapes.append(halved)
    return Buckets(shapes[::-1])


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


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to token ids and back.

    Attributes:
      inputs, targets: the vocabularies of both features.
      start: ids that the decoder reads before anything else; see `RowFormat`.
      stop: ids that end a prediction.
      end: ids after every input, such as T5's EOS; () for inputs that a prediction goes on from.
      target_end: ids after every target that is scored.
      stops: texts that end a prediction, each where it first stands in the text of the prediction, which ends with it.
      bos: `start`, where inputs may spell it out themselves; see `Framing.bos`.
    """

    inputs: Vocabulary
    targets: Vocabulary
    start: tuple[int, ...]
    stop: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    target_end: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    bos: tuple[int, ...] = ()

    def read_inputs(self, value: Any) -> list[int]:
        """Returns the ids of an input: text, or ids that are taken as they are; ValueError for anything else."""
        return _ids(self.inputs, value, self.end)

    def read_targets(self, value: Any) -> list[int]:
        """Returns the ids of a target, as `read_inputs`."""
        return _ids(self.targets, value, self.target_end)

    def read_begun(self, value: Any) -> list[int]:
        """Returns the ids of the beginning of a target, as `read_inputs`."""
        return _ids(self.targets, value, ())

    def write(self, tokens: Sequence[int]) -> str:
        """Returns the text of predicted ids before one that ends them, or up to the end of the first of `stops`."""
        return self.ended(tokens)[1]

    def ended(self, tokens: Sequence[int] | np.ndarray) -> tuple[int, str]:
        """Returns how many of predicted ids make up the prediction, and its text.

        Where one of `stops` is in the text, those are the fewest ids whose text reaches to its end: the text is cut
        there, though the last of the ids may say more. Else they are all ids.
        """
        ids = before_stop(tokens, self.stop)
        text = self.targets.decode(ids)
        end = StopSearch(self.stops).feed(text)
        if end is None:
            return len(tokens), text
        written, length, count = self.targets.detokenizer(), 0, 0
        while count < len(ids) and length < end:
            length += len(written.feed(self.targets.known(ids[count])))
            count += 1
        while count and self.targets.decode(ids[: count - 1]).startswith(text[:end]):
            count -= 1  # what the text hung on after it was there
        return count, text[:end]

    def stream(self) -> "TextStream":
        """Returns what writes a prediction while it is made."""
        return TextStream(self)


class TextStream:
    """Writes one prediction token by token: the pieces joined are what `Text.write` makes of all tokens.

    Attributes:
      ended: whether nothing more comes: an id that ends a prediction was fed, or a text that stops.
    """

    def __init__(self, text: Text) -> None:
        self.ended = False
        self._vocabulary, self._ends, self._search = text.targets, text.stop, StopSearch(text.stops)
        self._written = text.targets.detokenizer()

    def feed(self, token: int) -> str:
        """Returns the piece of text that is certain with one more token; "" once it has ended."""
        if self.ended:
            return ""
        if token in self._ends:
            return self.finish()
        return self._cut(self._written.feed(self._vocabulary.known(token)))

    def finish(self) -> str:
        """Returns the rest of the text; no token follows."""
        if self.ended:
            return ""
        piece = self._cut(self._written.finish())
        self.ended = True
        return piece

    def _cut(self, piece: str) -> str:
        end = self._search.feed(piece)
        self.ended = end is not None
        return piece[:end]


class StopSearch:
    """Finds the first of some texts to be complete in a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._tail = stops, ""
        self._kept = max(map(len, stops), default=1) - 1

    def feed(self, piece: str) -> int | None:
        """Returns how many characters of this piece the text that stops ends after; None where none ends in it."""
        text = self._tail + piece
        found = [text.find(stop) + len(stop) for stop in self._stops if stop in text]
        end = min(found, default=None)
        before = len(self._tail)
        self._tail = text[max(len(text) - self._kept, 0) :]
        return None if end is None else end - before


def stop_texts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the texts that end a prediction; a lone string is one of them.

    Raises:
      UserError: one is empty, or no text.
    """
    stops = (given,) if isinstance(given, str) else tuple(given)
    for each in stops:
        if not isinstance(each, str) or not each:
            raise UserError(f"stop: {each!r} is not a text that can end a prediction; give one or more, none empty")
    return stops


def load_text(
    run: Path,
    has_encoder: bool,
    append_eos: bool | None = None,
    size: int = 0,
    registered: Callable[[], Mapping[str, Vocabulary]] | None = None,
) -> Text:
    """Returns the text of a run directory, by the vocabularies that were saved with it; without any it is ids alone.

    Args:
      run: the run directory.
      has_encoder: whether inputs go to an encoder.
      append_eos: whether inputs end with EOS; None for what was saved with the run, else what T5X's tasks do: to an
        encoder they do, and what a prediction goes on from does not.
      size: how many ids the model knows.
      registered: returns the vocabularies of the run's task, for those that only their own code knows; None: they are
        ids alone.

    Raises:
      UserError: the vocabularies cannot be read; `append_eos`, and that of inputs has no EOS.
    """
    if not (run / "vocabularies.json").exists():
        ids, known = vocabularies.Opaque("ids", size), vocabularies.read_framing_of_ids(run)
        ids.why = f", for {run} holds no vocabularies (vocabularies.json)"
        if known is not None:
            return Text(ids, ids, known.start, known.stop)
        return Text(ids, ids, (0,) if has_encoder else ())  # an encoder's decoder needs one id to start from: T5X's
    names = ["targets", *(["inputs"] if (run / "vocabularies" / "inputs.json").is_file() else [])]
    found = {name: vocabularies.load(run / "vocabularies", name) for name in names}
    if registered is not None:
        found = vocabularies.with_their_code(found, registered)
    inputs, targets = found.get("inputs", found["targets"]), found["targets"]
    return text_of(inputs, targets, vocabularies.read_framing(run), has_encoder, append_eos)


def text_of(
    inputs: Vocabulary, targets: Vocabulary, framing: Framing, has_encoder: bool, append_eos: bool | None = None
) -> Text:
    """Returns the text of two vocabularies; see `load_text`. Raises UserError likewise."""

    def end(vocabulary: Vocabulary) -> tuple[int, ...]:
        return () if vocabulary.eos_id is None else (vocabulary.eos_id,)

    if append_eos and inputs.eos_id is None:
        raise UserError(
            f"append_eos: inputs cannot end with EOS, as the run's {inputs} has none: leave append_eos out, or False"
        )
    said = framing.append_eos if append_eos is None else append_eos
    ends = has_encoder if said is None else said
    after = end(inputs) if ends else ()
    return Text(inputs, targets, framing.start, framing.stop, after, end(targets), bos=framing.bos)


def _ids(vocabulary: Vocabulary, value: Any, end: tuple[int, ...]) -> list[int]:
    if isinstance(value, str):
        return [*(vocabulary.encode(value) if value else ()), *end]  # no text needs no vocabulary of text
    if isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        if wrong := [each for each in value if not 0 <= each < vocabulary.size]:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary of {vocabulary.size}")
        return list(value)
    raise ValueError(f"neither text nor a list of token ids, but {type(value).__name__}")
