"""seqio's vocabularies beside SentencePiece and bytes: by their tables, and those that only code knows."""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.data import detokenizing
from meshway.framework.data.vocabulary import Vocabulary, first_of
from meshway.framework.errors import UserError

_UNKNOWN = "\ufffd"  # for ids that are no character of UTF-8, as TensorFlow has it


class Unigrams(Vocabulary):
    """seqio.UnigramVocabulary: 0 is 'PAD', then the words, then 'UNK'.

    Args:
      words: in the order of their ids, from 1 on.
      split_on_space: whether a text is cut at each space; else all of it is one word.
    """

    kind = "unigrams"

    def __init__(self, words: Sequence[str], split_on_space: bool = False) -> None:
        self._table = ["PAD", *words, "UNK"]
        self._ids = {word: token for token, word in enumerate(self._table)}
        self._split_on_space = split_on_space
        self._shown: dict[int, str] = {}
        self.size, self.extra_ids, self.eos_id, self.start = len(self._table), 0, None, (0,)
        self.unk_id = self.size - 1

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, self.size - 1) for word in (text.split(" ") if self._split_on_space else [text])]

    def detokenizer(self) -> detokenizing.Detokenizer:
        return detokenizing.PerToken(self._text, lambda _: True, self._shown)

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(self._piece, ids))

    def _piece(self, token: int) -> str:
        return self._table[token if 0 <= token < self.size else -1]

    def _settings(self) -> dict[str, Any]:
        return {"words": self._table[1:-1], "split_on_space": self._split_on_space}


class Codepoints(Vocabulary):
    """seqio.FullCodepointVocabulary and PartialCodepointVocabulary: a character has one id.

    Args:
      table: the code point of each id; None: each id is its own.
      extra_ids: ids above them.
      eos_id: the id that ends a sequence; it is no text.
      unk_id: the id of other characters; None where each has one.
      unk_codepoint: what ids outside the table are as text.
    """

    kind = "codepoints"

    def __init__(
        self,
        table: Sequence[int] | None,
        extra_ids: int,
        eos_id: int,
        unk_id: int | None = None,
        unk_codepoint: int = ord(_UNKNOWN),
    ) -> None:
        self._table = None if table is None else list(table)
        self._ids = {} if table is None else {codepoint: token for token, codepoint in enumerate(table)}
        self._base = 0x10FFFF if table is None else len(table)
        self.size, self.extra_ids, self.start = self._base + extra_ids, extra_ids, (0,)
        self.eos_id, self.unk_id, self._unk_codepoint = eos_id, unk_id, unk_codepoint
        self._shown: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        if self._table is None:
            return list(map(ord, text))
        return [self._ids.get(ord(letter), self.unk_id or 0) for letter in text]

    def detokenizer(self) -> detokenizing.Detokenizer:
        return detokenizing.PerToken(self._text, lambda _: True, self._shown)

    @property
    def _known(self) -> int:
        return self._base

    def _text(self, ids: list[int]) -> str:
        return "".join(self._piece(token) for token in ids if token != self.eos_id)

    def _piece(self, token: int) -> str:
        codepoint = token
        if self._table is not None:
            codepoint = self._table[token] if 0 <= token < self._base else self._unk_codepoint
        surrogate = 0xD800 <= codepoint < 0xE000
        return chr(codepoint) if 0 <= codepoint <= 0x10FFFF and not surrogate else _UNKNOWN

    def _settings(self) -> dict[str, Any]:
        names = ("table", "unk_codepoint")
        return {name: getattr(self, f"_{name}") for name in names} | {
            name: getattr(self, name) for name in ("extra_ids", "eos_id", "unk_id")
        }


class WordPieces(Vocabulary):
    """seqio.BertWordPieceVocabulary: seqio and tensorflow_text are imported once there is text to encode.

    A text's ids are those of all its words in a row. (seqio lays words of several pieces side by side in a matrix that
    is filled up with 0.)

    Args:
      content: its vocab.txt.
      size, eos_id, unk_id, pad_id: as seqio's has them.
      arguments: what seqio's is made with, except the file.
    """

    kind, suffix = "wordpieces", ".vocab.txt"

    def __init__(
        self, content: bytes, size: int, eos_id: int, unk_id: int, pad_id: int, arguments: Mapping[str, Any]
    ) -> None:
        self._source, self._arguments = content, dict(arguments)
        self._pieces = content.decode("utf-8", "replace").removesuffix("\n").split("\n")
        self.size, self.eos_id, self.unk_id, self.pad_id = size, eos_id, unk_id, pad_id
        self.extra_ids, self.start = 0, first_of(pad_id)
        self._shown: dict[int, str] = {}

    @functools.cached_property
    def _seqio(self) -> Any:
        from meshway.framework.data.seqio_adapter import import_seqio

        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            file.write(self._source)
            file.flush()
            return import_seqio().BertWordPieceVocabulary(file.name, **self._arguments)

    def encode(self, text: str) -> list[int]:
        words = self._seqio.tokenizer.tokenize(text)  # seqio's own fills words up to the same number of pieces
        return [int(token) for token in words.flat_values.numpy()]

    def detokenizer(self) -> detokenizing.Detokenizer:
        return detokenizing.PerToken(self._text, lambda _: True, self._shown)

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(self._piece, ids))  # a piece that goes on in a word keeps its '##', as seqio has it

    def _piece(self, token: int) -> str:
        # seqio has one id more than there are lines, for what is in none of them.
        known = 0 <= token < len(self._pieces)
        return self._pieces[token].rstrip("\r") if known else self._arguments["unknown_token"]

    def _settings(self) -> dict[str, Any]:
        names = ("size", "eos_id", "unk_id", "pad_id")
        return {name: getattr(self, name) for name in names} | {"arguments": self._arguments}

    def _content(self) -> bytes:
        return self._source


class Opaque(Vocabulary):
    """A vocabulary of a kind not known here: its numbers only. Only its own code can encode and decode text.

    Args:
      name: what it is, such as its class.
      size: number of ids, extra ids included.
      eos_id: the id that ends a sequence.
      unk_id: the id of unknown text.
      extra_ids: how many of the highest ids are sentinels.
      sample: ids of a fixed text, by which two of one size are compared; () if it encodes no text.
      bos_id: the id that a text begins with; None: seqio's padding, 0.

    Attributes:
      why: why its own code was not found, for messages; "" where nobody looked, or it has no text.
    """

    kind = "opaque"
    why = ""

    def __init__(
        self,
        name: str,
        size: int,
        eos_id: int | None = None,
        unk_id: int | None = None,
        extra_ids: int = 0,
        sample: Sequence[int] = (),
        bos_id: int | None = None,
    ) -> None:
        self.name, self.size, self.extra_ids = name, size, extra_ids
        self.eos_id, self.unk_id, self._bos_id = eos_id, unk_id, bos_id
        self.start = first_of(bos_id, self.pad_id)
        self._sample = list(sample)

    @property
    def marks(self) -> frozenset[int]:
        return super().marks if self._bos_id is None else super().marks | {self._bos_id}

    @property
    def is_ids(self) -> bool:
        """Whether there is no text at all, whose code could be looked for: seqio's pass-through one."""
        return self.name == "seqio.vocabularies.PassThroughVocabulary"

    def encode(self, text: str) -> list[int]:
        """Raises ValueError, so that a record can be left out."""
        raise ValueError(f"text, and there is none in {self}{self.why}: give token ids, as [17, 4, 1]")

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the ids themselves, as '<5> <17>'."""
        return self._text([int(token) for token in ids])

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.name}"

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(self._piece, ids))

    def _piece(self, token: int) -> str:
        return f"<{token}>"

    def _settings(self) -> dict[str, Any]:
        names = ("name", "size", "eos_id", "unk_id", "extra_ids")
        bos = {} if self._bos_id is None else {"bos_id": self._bos_id}
        return {name: getattr(self, name) for name in names} | {"sample": self._sample} | bos


class Own(Opaque):
    """A vocabulary of users' code, with its text. Saved, or in another process, it is `Opaque`.

    Args:
      code: an object with `encode` and `decode`, as seqio's vocabularies have them.
      numbers: what is known of it without its code.
    """

    def __init__(self, code: Any, numbers: Opaque) -> None:
        super().__init__(**numbers._settings())
        self._code = code

    def encode(self, text: str) -> list[int]:
        """Raises ValueError where the code does, or returns no row of ids."""
        try:
            return [int(token) for token in self._code.encode(text)]
        except Exception as error:  # users' code raises anything
            raise ValueError(f"{self.name} cannot encode {text[:40]!r}: {type(error).__name__}: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Raises UserError where the code does, or returns no text."""
        return self._text([int(token) for token in ids])

    def __reduce__(self) -> tuple[Any, ...]:
        return Opaque.rebuild, (b"", self._settings())

    def _text(self, ids: list[int]) -> str:
        try:
            text = self._code.decode(ids) if ids else ""
        except Exception as error:  # users' code raises anything
            raise UserError(f"{self.name} cannot decode {ids[:8]}: {type(error).__name__}: {error}") from error
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if not isinstance(text, str):
            raise UserError(f"{self.name}.decode returned {type(text).__name__} for {ids[:8]}: it must return text")
        return text


def by_its_tables(vocabulary: Any, name: str) -> Vocabulary | None:
    """Returns a vocabulary of seqio's class `name` by what it holds; None for a class without tables."""
    if name == "UnigramVocabulary":
        return Unigrams(vocabulary._unigram_by_id[1:-1], bool(vocabulary._split_on_space))
    if name == "FullCodepointVocabulary":
        return Codepoints(None, int(vocabulary.extra_ids), vocabulary.EOS_CODEPOINT)
    if name == "PartialCodepointVocabulary":
        ids = vocabulary._id_to_codepoint
        table, (eos_id, unk_id) = [ids[token] for token in range(len(ids))], (vocabulary.EOS_ID, vocabulary.UNK_ID)
        return Codepoints(table, int(vocabulary.extra_ids), eos_id, unk_id, vocabulary.UNK_CODEPOINT)
    if name == "BertWordPieceVocabulary" and vocabulary._token_out_type.is_integer:
        numbers = {"size": int(vocabulary.vocab_size)}
        numbers |= {each: int(getattr(vocabulary, each)) for each in ("eos_id", "unk_id", "pad_id")}
        arguments = {each: getattr(vocabulary, f"_{each}") for each in _WORD_PIECE_ARGUMENTS}
        arguments |= {"start_of_sequence_id": int(vocabulary.sos_id), "end_of_sequence_id": numbers["eos_id"]}
        arguments["pad_id"] = numbers["pad_id"]
        return WordPieces(vocabulary._wp_model, **numbers, arguments=arguments)
    return None


TABLES = (
    "UnigramVocabulary",
    "FullCodepointVocabulary",
    "PartialCodepointVocabulary",
    "BertWordPieceVocabulary",
)
_WORD_PIECE_ARGUMENTS = (
    "suffix_indicator",
    "max_bytes_per_word",
    "max_chars_per_token",
    "unknown_token",
    "split_unknown_characters",
    "lower_case",
    "keep_whitespace",
    "normalization_form",
    "preserve_unused_token",
)
