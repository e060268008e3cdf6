"""Vocabularies: text to token ids and back, a fingerprint, files. No TensorFlow, no seqio."""

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from meshway.framework.data import detokenizing
from meshway.framework.data.detokenizing import AllAtEnd, Detokenizer
from meshway.framework.data.objective import VocabularyInfo
from meshway.framework.errors import UserError
from meshway.framework.files import io_errors, open_path, replace_file

Ids = TypeVar("Ids", list[int], Sequence[int], np.ndarray)


class Vocabulary(abc.ABC):
    """Text to token ids and back. Immutable; may be sent to another process.

    Attributes:
      kind: its kind, as its files name it.
      size: number of ids, extra ids included.
      eos_id: the id that ends a sequence, None if there is none.
      unk_id: the id of unknown text and of ids out of range, None if there is none.
      pad_id: the id of padding, None if there is none: 0, as in seqio, but a tokenizer.json's own `<pad>`. Only pages
        for people use it: segment ids mark padding, never a token id, and 0 may be text (GPT-2's '!').
      extra_ids: how many ids are sentinels.
      sentinels: those ids, <extra_id_0> first, where they are not the highest, from the top down; else ().
      start: ids that a decoder reads before the first token of a text, unless the recipe names others: the vocabulary's
        BOS, T5's padding id, or the EOS that ended the text before; () if it has none of these.
      former: the fingerprint that earlier versions gave it, None where it is the same.
    """

    kind: ClassVar[str]
    suffix: ClassVar[str | None] = None  # of the file with its content, which is beside NAME.json
    size: int
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None = 0
    extra_ids: int
    sentinels: tuple[int, ...] = ()
    start: tuple[int, ...]
    former: str | None = None

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an EOS. Raises ValueError if the vocabulary cannot encode it."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` up to the first EOS; ids out of range are read as `unk_id`."""
        kept = [self.known(int(token)) for token in ids]
        if self.eos_id is not None and self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id) + 1]
        return self._text(kept)

    def known(self, token: int) -> int:
        """Returns the id itself, or `unk_id` for one that is out of range."""
        return self.unk_id if self.unk_id is not None and token >= self._known else token

    def detokenizer(self) -> Detokenizer:
        """Returns a decoder of `known` ids, one id at a time, to the text of `decode`; it does not stop at EOS."""
        return AllAtEnd(self._text)

    def bytes_of_ids(self) -> tuple[list[bytes], list[bytes]]:
        """Returns the bytes that each id adds to a text: where it is the first, and behind others. A text without other
        ids is what these bytes joined are; b"" for those that are no text: control ids, sentinels, the unknown.

        Raises:
          ValueError: a text is not the bytes of its ids one after the other.
        """
        sentinels = self.sentinels or range(self.size - self.extra_ids, self.size)
        marks = self.marks
        text = [each not in marks and each != self.unk_id and each < self._known for each in range(self.size)]
        for token in sentinels:
            text[token] = False
        empty, begun = self.detokenizer(), self.detokenizer()
        first = [empty.bytes_of(token) if text[token] else b"" for token in range(self.size)]
        words = (token for token, each in enumerate(first) if each.isalnum())  # nothing else may count as a beginning
        begun.feed(next(words, next((token for token, each in enumerate(first) if each), 0)))
        return first, [begun.bytes_of(token) if text[token] else b"" for token in range(self.size)]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Returns the text of each id by itself, for display; a byte that is not ASCII is shown as '<0xE2>'."""
        return [self._piece(int(token)) for token in ids]

    @property
    def marks(self) -> frozenset[int]:
        """Control ids such as BOS, which are not text. A text whose ids begin with its start contains it already."""
        return frozenset() if self.eos_id is None else frozenset({self.eos_id})

    @property
    def info(self) -> VocabularyInfo:
        """The facts that objectives need."""
        return VocabularyInfo(self.size, self.eos_id, self.extra_ids, self.sentinels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines ids and text."""
        digest = hashlib.sha256(json.dumps([self.kind, self._settings()], sort_keys=True).encode())
        digest.update(self._canonical())
        return digest.hexdigest()

    def cuts_like(self, other: "Vocabulary") -> bool:
        """Whether both encode text to the same ids, even if their EOS and sentinels differ."""
        return (self.kind, self.size, self._canonical()) == (other.kind, other.size, other._canonical())

    def settings_unlike(self, other: "Vocabulary") -> str:
        """Returns the settings in which a task's vocabulary (self) and a recipe's (other) differ, for an error message.

        "" where no setting differs, or they encode text differently.
        """
        ours, theirs = self._settings(), other._settings()
        differ = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if not differ or not self.cuts_like(other):
            return ""
        said = (f"{name} is {ours.get(name)} in the task's and {theirs.get(name)} in the recipe's" for name in differ)
        return f" (the same tokens, but {', '.join(said)})"

    def save(self, directory: Path, name: str) -> None:
        """Writes `name`.json and, where the kind has content, `name`.model or `name`.tokenizer.json.

        Raises:
          UserError: the files cannot be written.
        """
        about = {"kind": self.kind, "fingerprint": self.fingerprint, "settings": self._settings()}
        if self.suffix:
            _write(open_path(directory) / (name + self.suffix), self._content())
        _write(open_path(directory) / f"{name}.json", (json.dumps(about, indent=1) + "\n").encode())

    def __str__(self) -> str:
        extra = f", {self.extra_ids} of them extra" if self.extra_ids else ""
        return f"{self.kind} vocabulary of {self.size:,} ids{extra} (sha256 {self.fingerprint[:12]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).rebuild, (self._content(), self._settings())

    @classmethod
    def rebuild(cls, content: bytes, settings: Mapping[str, Any]) -> "Vocabulary":
        """Returns the vocabulary of a content file (b"" for a kind that has none) and of `settings`."""
        make: Callable[..., Vocabulary] = cls
        return make(content, **settings) if cls.suffix else make(**settings)

    @property
    def _known(self) -> int:
        """Ids from here on have no text."""
        return self.size

    @abc.abstractmethod
    def _text(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _piece(self, token: int) -> str: ...

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments except the content, as JSON holds them."""

    def _content(self) -> bytes:
        """The bytes of the content file."""
        return b""

    def _canonical(self) -> bytes:
        """The content, without parts that do not affect ids and text."""
        return self._content()


@dataclasses.dataclass(frozen=True)
class Framing:
    """The ids around a model's texts: at their start, and at the end of predictions.

    Attributes:
      start: ids that the decoder reads before anything else; () for none.
      append_eos: whether inputs end with EOS; None: not known, and those of an encoder do.
      stop: ids that end a prediction; () for none.
      bos: `start` where these are control ids (`Vocabulary.marks`), which a text may contain already and then is not
        given twice; else (). Follows from the vocabulary.
    """

    start: tuple[int, ...]
    append_eos: bool | None = None
    stop: tuple[int, ...] = ()
    bos: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, start: Sequence[int] | None = None, stop_ids: Sequence[int] | None = None
    ) -> "Framing":
        """Returns the framing of a recipe for texts of `vocabulary`; None takes the vocabulary's own ids.

        Raises:
          UserError: the vocabulary does not have these ids.
        """
        own = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
        begin = vocabulary.start if start is None else check_ids("start", start, vocabulary.size)
        stop = own if stop_ids is None else check_ids("stop_ids", stop_ids, vocabulary.size)
        return cls(begin, None, tuple(dict.fromkeys(stop)), begin if vocabulary.marks.issuperset(begin) else ())


def source_framing(source: Any) -> Framing | None:
    """Returns a data source's framing, else the one that follows from the vocabulary of its `targets`, if any."""
    if hasattr(source, "framing"):
        found: Framing | None = source.framing()
        return found
    targets = source.vocabularies().get("targets")
    return None if targets is None else Framing.of(targets)


def vocabulary_sizes(vocabularies: Mapping[str, Vocabulary], lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns the vocabulary size of each feature that is read as tokens, that is, each feature in `lengths`."""
    return {name: vocabulary.size for name, vocabulary in vocabularies.items() if name in lengths}


def after_start(tokens: Ids, bos: Sequence[int]) -> Ids:
    """Returns the ids without `bos` at their beginning, if they begin with it (see `Framing.bos`)."""
    return tokens[len(bos) :] if bos and list(tokens[: len(bos)]) == list(bos) else tokens


def before_stop(tokens: Iterable[int], stop: Sequence[int]) -> list[int]:
    """Returns the ids before the first that is one of `stop`."""
    ids = [int(token) for token in tokens]
    return ids[: next((place for place, token in enumerate(ids) if token in stop), len(ids))]


def check_ids(name: str, ids: Any, size: int) -> tuple[int, ...]:
    """Returns ids as a tuple; UserError, naming the setting, unless they are whole numbers from 0 to below `size`."""
    given: list[Any] = list(ids) if isinstance(ids, list | tuple) else [None]
    for token in given:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
            raise UserError(f"{name} must be a list of ids below {size}, the size of the vocabulary, not {ids!r}")
    return tuple(given)


def _write(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def first_of(*ids: int | None) -> tuple[int, ...]:
    """Returns the first id that exists, as (id,), else (); SentencePiece returns -1 for a missing id."""
    return next(((token,) for token in ids if token is not None and token >= 0), ())


class HuggingFace(Vocabulary):
    """A Hugging Face tokenizer. Its ids are kept: they are rows of the embedding of the model it came with.

    Nothing is added to text (no BOS, no EOS), and the file's own truncation and padding are off. Decoding
    shows every token except EOS, special ones too.

    Args:
      content: a tokenizer.json (UTF-8).
      eos_id: the id that ends a sequence.
      extra_ids: how many of the highest ids are sentinels.
      sentinels: the ids of the sentinels, where they are not the highest; `extra_ids` is their number then.
      literal: whether the text of a special token, such as '</s>', in a text is tokenized like any other text.

    Attributes:
      special_tokens: id -> the special token that a text may contain; {} if `literal`.

    Raises:
      UserError: `tokenizers` is not installed.
      ValueError: `content` is not a tokenizer.
    """

    kind, suffix = "huggingface", ".tokenizer.json"

    def __init__(
        self,
        content: bytes,
        eos_id: int | None = None,
        extra_ids: int = 0,
        sentinels: Sequence[int] = (),
        literal: bool = False,
    ) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "a Hugging Face vocabulary needs the package tokenizers: pip install 'meshway[hf]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ValueError(f"not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = self._literal = literal
        self._source = content
        described = json.loads(content)
        ids = self.ids
        if not ids:
            raise ValueError("not a tokenizer.json: it has no tokens")
        self.size = max(ids.values()) + 1  # some ids below may be unused
        self.eos_id, self.extra_ids, self.sentinels = eos_id, len(sentinels) or extra_ids, tuple(sentinels)
        model = described["model"]
        unknown = model.get("unk_token")
        self.unk_id = model.get("unk_id") if unknown is None else ids.get(unknown)
        self._added = {token["id"] for token in described.get("added_tokens", ())}
        special = {token["id"]: token["content"] for token in described.get("added_tokens") or () if token["special"]}
        self.special_tokens: Mapping[int, str] = {} if literal else special
        self._decoder = described.get("decoder")
        self._byte_level = "ByteLevel" in json.dumps(self._decoder)
        self._shown: dict[int, str] = {}
        pads = [token["id"] for token in described.get("added_tokens") or () if token["content"] == "<pad>"]
        self.pad_id = next(iter(pads), None)
        # T5-like vocabularies have padding at 0, and start from it; GPT-2's texts follow the EOS of the one before.
        self.start = self.template()[0] or first_of(0 if self.pad_id == 0 else None, eos_id)

    @property
    def ids(self) -> dict[str, int]:
        """The id of each token, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def literal(self) -> "HuggingFace":
        """The same tokenizer, to which the text of a special token is like any other text."""
        return self if self._literal else HuggingFace(self._source, literal=True)

    def template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that the file's post-processor puts before and after a text; none if it cannot encode one."""
        try:
            framed, plain = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is not an Exception
            return (), ()
        starts = range(len(framed) - len(plain) + 1)
        start = next((n for n in starts if framed[n : n + len(plain)] == plain), 0)
        return tuple(framed[:start]), tuple(framed[start + len(plain) :])

    @property
    def marks(self) -> frozenset[int]:
        return super().marks.union(self._added, *self.template())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _text(self, ids: list[int]) -> str:
        if self.eos_id is not None and self.eos_id in ids:
            ids = ids[: ids.index(self.eos_id)]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def detokenizer(self) -> detokenizing.Detokenizer:
        token = self._tokenizer.id_to_token
        return detokenizing.of_decoder(self._decoder, self._text, token, _byte_of_letter(), self._shown)

    def _piece(self, token: int) -> str:
        piece = self._tokenizer.id_to_token(token) if token >= 0 else None
        if piece is None:
            return f"<{token}>"
        if token in self._added:
            return piece
        if not self._byte_level:
            return piece.replace("▁", " ")
        data = bytes(_byte_of_letter()[letter] for letter in piece)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(map(byte_text, data))

    def _settings(self) -> dict[str, Any]:
        sentinels = {"sentinels": list(self.sentinels)} if self.sentinels else {}
        literal = {"literal": True} if self._literal else {}
        return {"eos_id": self.eos_id, "extra_ids": self.extra_ids} | sentinels | literal

    def _content(self) -> bytes:
        return self._source

    def _canonical(self) -> bytes:
        return json.dumps(json.loads(self._source), sort_keys=True).encode()


def byte_text(byte: int) -> str:
    letter = chr(byte)
    return letter if byte < 128 and (letter.isprintable() or letter.isspace()) else f"<0x{byte:02X}>"


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Returns letter -> byte of GPT-2's byte-level tokens.

    A byte's letter is itself if it is visible in Latin-1, else the next unused code point from 256 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
