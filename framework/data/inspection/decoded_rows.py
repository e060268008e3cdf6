"""Rows of a batch decoded to text, token by token, and special tokens that are written out in texts.

Only a Hugging Face tokenizer takes such text for special tokens, and only without `literal`. If an example keeps its
text, as seqio's tokenize does in `targets_pretokenized`, they are looked for there; else in the ids, except for EOS at
the end of a feature and sentinels, which preprocessors put there.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from meshway.framework.data.rows.examples import Examples
from meshway.framework.data.rows.packing import Arrays
from meshway.framework.data.token_rows import shift_right
from meshway.framework.data.vocabulary import HuggingFace, Vocabulary
from meshway.framework.terminal import listed

SAMPLED = 10_000  # examples of a source that are searched, evenly spread
_AT_ONCE = 500
_SHOWN = 5  # most tokens that the sentence names


@dataclasses.dataclass
class SpecialTokenCounts:
    """The special tokens found in some examples' texts.

    Attributes:
      examples: how many were searched.
      holding: how many hold a special token.
      tokens: how often each was found, by its text.
    """

    examples: int = 0
    holding: int = 0
    tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, examples: Iterable[Mapping[str, Any]], vocabularies: Mapping[str, Vocabulary]) -> None:
        """Adds examples: token ids by feature, with or without their texts."""
        special = {name: each.special_tokens for name, each in vocabularies.items() if isinstance(each, HuggingFace)}
        ids = {name: np.fromiter(tokens, np.int64) for name, tokens in special.items()}
        for example in examples:
            found: collections.Counter[str] = collections.Counter()
            for name in special:
                tokens = np.asarray(example.get(name, ()))
                if np.isin(tokens, ids[name]).any():
                    found += _of_feature(tokens, example.get(f"{name}_pretokenized"), special[name], vocabularies[name])
            self.examples += 1
            self.holding += bool(found)
            self.tokens += found

    def __str__(self) -> str:
        counts = self.tokens.most_common()
        named = [f"`{visible(token)}` {_times(count)}" for token, count in counts]
        hold = "holds" if self.holding == 1 else "hold"
        found = f"{self.holding:,} of {self.examples:,} examples {hold} special tokens written in their text"
        return f"{found} ({listed(named, _SHOWN)})" if named else found


def sentence(found: Mapping[str, SpecialTokenCounts]) -> str:
    """Returns what was found, by source, as a sentence."""
    holding = {name: written for name, written in found.items() if written.holding}
    if not holding:
        return str(SpecialTokenCounts(sum(written.examples for written in found.values())))
    parts = [f"{name}: {written}" if len(found) > 1 else str(written) for name, written in holding.items()]
    return "; ".join([*parts, "HuggingFaceVocabulary(literal=True) takes them as text"])


def reads_special_tokens(vocabularies: Mapping[str, Vocabulary]) -> bool:
    """Whether one of the vocabularies takes a special token's text in a text for that token."""
    return any(isinstance(each, HuggingFace) and bool(each.special_tokens) for each in vocabularies.values())


def sampled(examples: Examples) -> Iterator[Mapping[str, Any]]:
    """Yields all examples, or `SAMPLED` of them."""
    count = len(examples)
    places = np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64)
    for begin in range(0, len(places), _AT_ONCE):
        yield from examples.read(places[begin : begin + _AT_ONCE])


def segments(rows: Mapping[str, np.ndarray]) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields the token ids of each item in rows of a batch, features [rows, length], as {feature: ids}."""
    for side, name, feature in (
        ("encoder", "encoder_input_tokens", "inputs"),
        ("decoder", "decoder_target_tokens", "targets"),
    ):
        if name not in rows:
            continue
        for tokens, of in zip(rows[name], rows[f"{side}_segment_ids"], strict=True):
            for segment in range(1, int(of.max(initial=0)) + 1):
                yield {feature: tokens[of == segment]}


def _of_feature(
    tokens: np.ndarray, text: Any, special: Mapping[int, str], vocabulary: Vocabulary
) -> "collections.Counter[str]":
    if isinstance(text, bytes | str):
        spelled = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return +collections.Counter({token: spelled.count(token) for token in special.values()})
    kept = tokens[:-1] if tokens[-1] == vocabulary.eos_id else tokens
    sentinels = vocabulary.info.sentinel_ids
    return collections.Counter(special[token] for token in kept.tolist() if token in special and token not in sentinels)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies show a byte that is not ASCII
_TURNS = re.compile(
    "[\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)  # they change the writing direction of the text after them
_PARTS = ("_input_tokens", "_target_tokens")
_BESIDE = ("_loss_weights", "_segment_ids", "_positions", "_prefix_mask")


@dataclasses.dataclass(frozen=True)
class Token:
    """A token; or several, where they are the bytes of one character.

    Attributes:
      text: its text in the vocabulary, without control characters except line ends and tabs.
      ids: its ids, at least one.
      segment: its segment id, from 1.
      weight: its loss weight; None in a lane that has none.
      special: whether it is not text: EOS, BOS and other control tokens, a sentinel, the padding id used as data, an
        unknown id.
    """

    text: str
    ids: tuple[int, ...]
    segment: int
    weight: float | None
    special: bool


@dataclasses.dataclass(frozen=True)
class Lane:
    """One array of tokens of a row.

    Attributes:
      name: the array's name, as 'decoder_target_tokens'.
      length: tokens that fit.
      tokens: its tokens, without padding.
    """

    name: str
    length: int
    tokens: Sequence[Token]

    @property
    def title(self) -> str:
        """The name for a heading, as 'decoder targets'."""
        return self.name.removesuffix("_tokens").replace("_", " ") + "s"

    @property
    def filled(self) -> int:
        """Tokens that are not padding."""
        return sum(len(token.ids) for token in self.tokens)

    @property
    def segments(self) -> int:
        """How many segments it has."""
        return len({token.segment for token in self.tokens})

    @property
    def is_mixed(self) -> bool:
        """Whether some of its tokens carry loss and some do not."""
        return len({token.weight > 0 for token in self.tokens if token.weight is not None}) == 2

    def stretches(self) -> Iterator[list[Token]]:
        """Yields its tokens in runs that are shown alike: of one segment, loss weight and kind."""
        for _, alike in groupby(self.tokens, lambda token: (token.segment, bool(token.weight), token.special)):
            yield list(alike)


@dataclasses.dataclass(frozen=True)
class Values:
    """An array of a row that holds no tokens."""

    name: str
    array: np.ndarray

    @property
    def is_picture(self) -> bool:
        """Whether it can be drawn: [height, width], maybe with 1 or 3 channels, of real numbers."""
        shape = self.array.shape
        flat = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
        return flat and min(shape[:2]) >= 4 and self.array.dtype.kind in "biuf"

    def picture(self, most: int = 64) -> np.ndarray:
        """Returns its pixels, uint8 [height, width, 3], every n-th where a side has more than `most`.

        A uint8 array keeps its scale, any other runs from its lowest value (black) to its highest.
        """
        array = self.array if self.array.ndim == 3 else self.array[..., None]
        stride = -(-max(array.shape[:2]) // most)
        array = array[::stride, ::stride]
        if array.dtype != np.uint8:
            numbers = np.nan_to_num(array.astype(np.float64))
            low, high = numbers.min(), numbers.max()
            array = ((numbers - low) * (255 / (high - low) if high > low else 0)).round().astype(np.uint8)
        return np.broadcast_to(array, (*array.shape[:2], 3))

    @property
    def text(self) -> str:
        """The numbers if they are few, else their range."""
        array = self.array
        if not array.size:
            return f"{array.dtype.name} {list(array.shape)}: nothing"
        if array.size <= 16:
            numbers = ", ".join(_number(value) for value in array.ravel())
            return f"[{numbers}]" if array.ndim else numbers
        wide = array.astype(np.float64)
        figures = f"{_number(array.min())} to {_number(array.max())}, mean {_number(wide.mean())}"
        return f"{array.dtype.name} {list(array.shape)}: {figures}"


@dataclasses.dataclass(frozen=True)
class DecodedRow:
    """A row of a batch: its tokens, then its other features."""

    lanes: Sequence[Lane]
    values: Sequence[Values]


def decode_rows(batch: Arrays, vocabularies: Mapping[str, Vocabulary]) -> list[DecodedRow]:
    """Returns the rows of a batch, features [rows, ...] by T5X's names.

    `X_input_tokens` that are `X_target_tokens` shifted right are left out.
    """
    count = len(next(iter(batch.values())))
    return [_decode({name: array[row] for name, array in batch.items()}, vocabularies) for row in range(count)]


def sides(names: Iterable[str]) -> list[str]:
    """Returns the parts of a batch that hold tokens, as ['encoder', 'decoder'], by the features' names."""
    found = [name.removesuffix(end) for name in names for end in _PARTS if name.endswith(end)]
    return list(dict.fromkeys(found))


def _decode(row: Arrays, vocabularies: Mapping[str, Vocabulary]) -> DecodedRow:
    lanes, left = [], dict(row)
    for side in sides(row):
        beside = {end: left.pop(side + end, None) for end in _BESIDE}
        arrays = {end: left.pop(side + end) for end in _PARTS if side + end in left}
        if len(arrays) == 2 and _is_shifted(arrays["_input_tokens"], arrays["_target_tokens"], beside["_positions"]):
            del arrays["_input_tokens"]
        for end, tokens in arrays.items():
            feature = "targets" if end == "_target_tokens" else "inputs"
            vocabulary = vocabularies.get(feature, next(iter(vocabularies.values()), None))
            weights = beside["_loss_weights"] if end == "_target_tokens" else None
            lanes.append(Lane(side + end, len(tokens), _tokens(tokens, beside["_segment_ids"], weights, vocabulary)))
    return DecodedRow(lanes, [Values(name, np.asarray(array)) for name, array in left.items()])


def _is_shifted(inputs: np.ndarray, targets: np.ndarray, positions: np.ndarray | None) -> bool:
    positions = np.arange(len(targets)) if positions is None else positions
    heads = positions == 0  # positions of the start token, which may be any id
    return np.array_equal(inputs[~heads], shift_right(targets[None], positions[None], 0)[0][~heads])


def _tokens(
    tokens: np.ndarray, segments: np.ndarray | None, weights: np.ndarray | None, vocabulary: Vocabulary | None
) -> list[Token]:
    """Returns the tokens [length] except padding, the bytes of a character joined."""
    segments = np.ones(len(tokens), np.int32) if segments is None else segments
    places = np.flatnonzero(segments).tolist()
    ids = tokens[places].tolist()
    pieces = vocabulary.pieces(ids) if vocabulary else [f"<{token}>" for token in ids]
    found = []
    for place, token, piece in zip(places, ids, pieces, strict=True):
        special = vocabulary is not None and _is_special(token, vocabulary)
        weight = None if weights is None else float(weights[place])
        found.append(Token(piece.strip() if special else piece, (token,), int(segments[place]), weight, special))
    joined: list[Token] = []
    for (is_byte, *_), alike in groupby(found, _looks):
        run = list(alike)
        joined += _characters(run) if is_byte else run
    return [dataclasses.replace(token, text=visible(token.text)) for token in joined]


def _is_special(token: int, vocabulary: Vocabulary) -> bool:
    reserved = (vocabulary.pad_id, vocabulary.unk_id, *vocabulary.marks)
    return token in reserved or token in vocabulary.info.sentinel_ids


def _looks(token: Token) -> tuple[bool, int, float | None]:
    """Returns the properties in which the bytes of one character agree."""
    return not token.special and bool(_BYTE.fullmatch(token.text)), token.segment, token.weight


def _characters(tokens: Sequence[Token]) -> Iterator[Token]:
    """Yields a run of bytes as the characters that they spell; a byte that spells none as it is."""
    data = bytes(int(token.text[3:5], 16) for token in tokens)
    at = 0
    while at < len(data):
        for count in (2, 3, 4):
            try:
                text = data[at : at + count].decode("utf-8") if at + count <= len(data) else ""
            except UnicodeDecodeError:
                continue
            if len(text) == 1:
                ids = tuple(token.ids[0] for token in tokens[at : at + count])
                yield dataclasses.replace(tokens[at], text=text, ids=ids)
                at += count
                break
        else:
            yield tokens[at]
            at += 1


def visible(text: str) -> str:
    """Returns text that is safe on a terminal: characters that move the cursor or change direction are written out.

    Line ends and tabs stay; the caller decides how to show them.
    """
    return "".join(f"<U+{ord(letter):04X}>" if _is_hidden(letter) else letter for letter in text)


def _is_hidden(letter: str) -> bool:
    if letter in "\n\t":
        return False
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or bool(_TURNS.match(letter))


def _number(value: object) -> str:
    return str(value) if isinstance(value, (bool, np.bool_, int, np.integer)) else f"{float(value):.4g}"  # type: ignore[arg-type]
