"""Text as a model reads and writes it: vocabularies, and what stands before and after."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data import vocabularies
from meshway.framework.data.vocabulary import Vocabulary, before_stop
from meshway.framework.errors import UserError


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


class IdsOnly(vocabularies.Opaque):
    """Of a run without a vocabulary: its inputs are ids, and so are its predictions ('<5> <17>')."""

    def __init__(self, run: Path, size: int) -> None:
        super().__init__("ids", size)
        self._run = run

    def encode(self, text: str) -> list[int]:
        """Raises ValueError, so that the record can be left out."""
        raise ValueError(
            f"text, but {self._run} holds no vocabularies (vocabularies.json): give token ids, as [17, 4, 1]"
        )


def load_text(run: Path, has_encoder: bool, append_eos: bool | None = None, size: int = 0) -> Text:
    """Returns the text of a run directory, by the vocabularies that were saved with it; without any it is ids alone.

    Args:
      run: the run directory.
      has_encoder: whether inputs go to an encoder.
      append_eos: whether inputs end with EOS; None for what was saved with the run, else what T5X's tasks do: to an
        encoder they do, and what a prediction goes on from does not.
      size: how many ids the model knows.

    Raises:
      UserError: the vocabularies cannot be read.
    """
    if not (run / "vocabularies.json").exists():
        ids = IdsOnly(run, size)
        return Text(ids, ids, (0,) if has_encoder else ())  # an encoder's decoder needs one id to start from: T5X's
    framing = vocabularies.read_framing(run)
    targets = vocabularies.load(run / "vocabularies", "targets")
    has_inputs = (run / "vocabularies" / "inputs.json").is_file()
    inputs = vocabularies.load(run / "vocabularies", "inputs") if has_inputs else targets

    def end(vocabulary: Vocabulary) -> tuple[int, ...]:
        return () if vocabulary.eos_id is None else (vocabulary.eos_id,)

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
