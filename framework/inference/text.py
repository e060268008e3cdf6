"""Text as a model reads and writes it: vocabularies, and what stands before and after."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data import vocabularies
from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import UserError


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to token ids and back.

    Attributes:
      inputs, targets: the vocabularies of both features.
      start: ids that the decoder reads before anything else; see `RowFormat`.
      end: ids after every input, such as T5's EOS; () for inputs that a prediction goes on from.
      target_end: ids after every target that is scored.
    """

    inputs: Vocabulary
    targets: Vocabulary
    start: tuple[int, ...] = (0,)
    end: tuple[int, ...] = ()
    target_end: tuple[int, ...] = ()

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
        """Returns the text of predicted ids up to EOS, and without it."""
        ids, eos = [int(token) for token in tokens], self.targets.eos_id
        return self.targets.decode(ids[: ids.index(eos)] if eos is not None and eos in ids else ids)


def load_text(run: Path, has_encoder: bool, append_eos: bool | None = None) -> Text:
    """Returns the text of a run directory, by the vocabularies that were saved with it.

    Args:
      run: the run directory.
      has_encoder: whether inputs go to an encoder.
      append_eos: whether inputs end with EOS; None for what was saved with the run, else what T5X's tasks do: to an
        encoder they do, and what a prediction goes on from does not.

    Raises:
      UserError: no vocabularies are there, or they cannot be read.
    """
    index = run / "vocabularies.json"
    try:
        saved = json.loads(index.read_text("utf-8"))
        features = saved["features"]
        start = tuple(int(token) for token in saved.get("start", (0,)))
    except FileNotFoundError as error:
        raise UserError(f"{run} holds no vocabularies ({index.name}): its text cannot be read or written") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read: {error}") from error
    if "targets" not in features:
        raise UserError(f"{index} names no vocabulary of 'targets', only of {sorted(features)}")
    targets = vocabularies.load(run / "vocabularies", "targets")
    inputs = vocabularies.load(run / "vocabularies", "inputs") if "inputs" in features else targets

    def end(vocabulary: Vocabulary) -> tuple[int, ...]:
        return () if vocabulary.eos_id is None else (vocabulary.eos_id,)

    ends = saved.get("append_eos", has_encoder) if append_eos is None else append_eos
    return Text(inputs, targets, start, end(inputs) if ends else (), end(targets))


def _ids(vocabulary: Vocabulary, value: Any, end: tuple[int, ...]) -> list[int]:
    if isinstance(value, str):
        return [*vocabulary.encode(value), *end]
    if isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        if wrong := [each for each in value if not 0 <= each < vocabulary.size]:
            raise ValueError(f"id {wrong[0]} is not in the vocabulary of {vocabulary.size}")
        return list(value)
    raise ValueError(f"neither text nor a list of token ids, but {type(value).__name__}")
