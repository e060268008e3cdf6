"""The kinds of vocabularies, without TensorFlow or seqio: a run saves them and compares them when it is resumed.

`of_seqio` turns a task's seqio vocabulary into one of these; ids and text are the same as seqio's.
"""

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from meshway.framework.data import detokenizing
from meshway.framework.data.seqio_vocabularies import (
    TABLES,
    Codepoints,
    Opaque,
    Own,
    Unigrams,
    WordPieces,
    by_its_tables,
)
from meshway.framework.data.vocabulary import Framing, HuggingFace, Vocabulary, byte_text, first_of
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import open_path

_SAMPLE = "The 2 foxes' naïve \u201cjump\u201d:\n\tx = f(a[i], 0.5)  # über 東京 ☃"  # compares opaque vocabularies
_loading = threading.Lock()  # SentencePiece may crash when two threads load models at once


class SentencePiece(Vocabulary):
    """A SentencePiece model with extra ids above its pieces, as seqio.SentencePieceVocabulary has them.

    Args:
      model: a serialized ModelProto, without extra ids.
      extra_ids: pieces '<extra_id_N>' to add at the top.
      reverse_extra_ids: whether '<extra_id_0>' is the highest id (T5's order) or the lowest of them.
      sentinels: the ids of the sentinels, where the model has them itself (mT5's); `extra_ids` is 0 then.

    Raises:
      ValueError: `model` is not a SentencePiece model.
    """

    kind, suffix = "sentencepiece", ".model"

    def __init__(
        self, model: bytes, extra_ids: int = 0, reverse_extra_ids: bool = True, sentinels: Sequence[int] = ()
    ) -> None:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        proto_class: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
        with _loading:
            try:
                proto = proto_class.FromString(model)
                if not proto.pieces:
                    raise ValueError("it has no pieces")
                self._model: bytes = proto.SerializeToString(deterministic=True)
                numbers = range(extra_ids)
                for number in reversed(numbers) if reverse_extra_ids else numbers:
                    sentinel = proto_class.SentencePiece.USER_DEFINED
                    proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=sentinel)
                self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            except Exception as error:  # protobuf's and SentencePiece's own exceptions are of many kinds
                raise ValueError(f"not a SentencePiece model: {error}") from error
        self._reverse_extra_ids, self._added = reverse_extra_ids, extra_ids
        self.extra_ids, self.sentinels = len(sentinels) or extra_ids, tuple(sentinels)
        self.size = self._processor.GetPieceSize()
        eos_id = self._processor.eos_id()
        self.eos_id = eos_id if eos_id >= 0 else None
        self.unk_id = self._processor.unk_id()
        normalizer = proto.normalizer_spec
        self._denormalizes = bool(proto.denormalizer_spec.precompiled_charsmap)
        self._keeps_spaces = normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
        self._shown: dict[int, str] = {}
        self.start = first_of(self._processor.bos_id(), self._processor.pad_id(), eos_id)

    @property
    def marks(self) -> frozenset[int]:
        return super().marks.union(filter(self._processor.IsControl, range(self.size)))

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def _text(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(ids)

    def detokenizer(self) -> detokenizing.Detokenizer:
        if self._denormalizes:
            return super().detokenizer()
        return detokenizing.Pieces(self._text, self._byte, self._is_kept_space, self._shown)

    def _byte(self, token: int) -> int | None:
        return int(self._processor.IdToPiece(token)[3:5], 16) if self._processor.IsByte(token) else None

    def _is_kept_space(self, token: int) -> bool:
        return self._keeps_spaces and self._processor.IdToPiece(token).startswith("▁")

    def _piece(self, token: int) -> str:
        token = token if 0 <= token < self.size else self._processor.unk_id()
        piece: str = self._processor.IdToPiece(token)
        if self._processor.IsByte(token):
            return byte_text(int(piece[3:5], 16))
        return piece.replace("▁", " ")

    def _settings(self) -> dict[str, Any]:
        sentinels = {"sentinels": list(self.sentinels)} if self.sentinels else {}
        return {"extra_ids": self._added, "reverse_extra_ids": self._reverse_extra_ids} | sentinels

    @property
    def ids(self) -> dict[str, int]:
        """The id of each piece, sentinels too."""
        return {self._processor.IdToPiece(token): token for token in range(self.size)}

    def _content(self) -> bytes:
        return self._model


class Bytes(Vocabulary):
    """UTF-8 bytes above three special ids (ByT5): 0 padding, 1 EOS, 2 unknown, 3 to 258 bytes, then extra ids."""

    kind = "bytes"
    _special: ClassVar = ("<pad>", "</s>", "<unk>")
    _first_extra: ClassVar = 259

    def __init__(self, extra_ids: int = 0) -> None:
        self.extra_ids = extra_ids
        self.size = self._first_extra + extra_ids
        self.eos_id, self.unk_id, self.start = 1, 2, (0,)

    @property
    def marks(self) -> frozenset[int]:
        return frozenset({0, 1})

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    @property
    def _known(self) -> int:
        return self._first_extra

    def _text(self, ids: list[int]) -> str:
        """Drops ids that are not bytes, and bytes that are not UTF-8."""
        return bytes(token - 3 for token in ids if token >= 3).decode("utf-8", errors="ignore")

    def detokenizer(self) -> detokenizing.Detokenizer:
        return detokenizing.Utf8(lambda token: bytes([token - 3]) if token >= 3 else b"", "ignore")

    def _piece(self, token: int) -> str:
        if self._first_extra <= token < self.size:
            return f"<extra_id_{self.size - 1 - token}>"
        if 3 <= token < self._first_extra:
            return byte_text(token - 3)
        return self._special[token if 0 <= token < 3 else 2]

    def _settings(self) -> dict[str, Any]:
        return {"extra_ids": self.extra_ids}


def load(directory: Path, name: str) -> Vocabulary:
    """Reads what `Vocabulary.save` wrote.

    Raises:
      UserError: it is missing or damaged.
    """
    path = open_path(directory) / f"{name}.json"
    try:
        about = json.loads(path.read_text("utf-8"))
        suffix = _KINDS[about["kind"]].suffix
        if suffix:
            path = path.with_name(name + suffix)
        vocabulary = _KINDS[about["kind"]].rebuild(path.read_bytes() if suffix else b"", about["settings"])
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: no vocabulary {name!r} is saved there") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the saved vocabulary {path} cannot be read: {error}") from error
    if vocabulary.fingerprint != about["fingerprint"]:
        raise UserError(f"{path} is damaged: its SHA-256 is not the one that {name}.json tells")
    return vocabulary


def read_framing(run: Path) -> Framing:
    """Returns the framing in a run's vocabularies.json; older versions wrote none, and their texts start from id 0.

    Raises:
      UserError: it is missing or damaged.
    """
    path = open_path(run) / "vocabularies.json"
    try:
        index = json.loads(path.read_text("utf-8"))
        names = list(index["features"])
    except FileNotFoundError as error:
        raise UserError(f"{run} holds no vocabularies ({path.name}): its text cannot be read or written") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if "targets" not in names:
        raise UserError(f"{path} names no vocabulary of 'targets', only of {sorted(names)}")
    targets = load(path.parent / "vocabularies", "targets")
    try:
        framing = Framing.of(targets, index.get("start", [0]), index.get("stop"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return dataclasses.replace(framing, append_eos=index.get("append_eos"))


FRAMING = "framing.json"  # of a run that has token ids and no vocabularies


def read_framing_of_ids(run: Path) -> Framing | None:
    """Returns what stands around the token ids of a run without vocabularies; None where nothing is known.

    Raises:
      UserError: its framing.json is damaged.
    """
    path = open_path(run) / FRAMING
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text("utf-8"))
        return Framing(tuple(map(int, said["start"])), said["append_eos"], tuple(map(int, said["stop"])))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def of_seqio(vocabulary: Any) -> Vocabulary:
    """Returns the same vocabulary without seqio; it is recognised by its class, so seqio is not imported.

    seqio's vocabularies of text and meshway's HuggingFaceVocabulary keep it. Any other object with `encode` and
    `decode`, and any subclass with an encoding or decoding of its own, becomes `Own`, which is `Opaque` once saved; one
    without text (PassThroughVocabulary) is `Opaque`.

    Raises:
      UserError: it is no vocabulary: it has no `vocab_size`.
    """
    if isinstance(vocabulary, Vocabulary):
        return vocabulary
    extra_ids = int(getattr(vocabulary, "extra_ids", 0))
    if _is(vocabulary, "SentencePieceVocabulary"):
        return SentencePiece(
            _without_extra_ids(vocabulary.sp_model, extra_ids), extra_ids, bool(vocabulary._reverse_extra_ids)
        )
    if _is(vocabulary, "ByteVocabulary"):
        return Bytes(extra_ids)
    if _is(vocabulary, "HuggingFaceVocabulary"):
        content = vocabulary.tokenizer_json.encode("utf-8")
        return HuggingFace(content, vocabulary.eos_id, extra_ids, literal=vocabulary.literal)
    numbers = numbers_only(vocabulary)
    for name in TABLES:
        made = by_its_tables(vocabulary, name) if _is(vocabulary, name) else None
        if made and (made.size, made.eos_id, made.unk_id) == (numbers.size, numbers.eos_id, numbers.unk_id):
            made.former = numbers.fingerprint
            return made
    named = {base.__name__ for base in type(vocabulary).__mro__ if base.__module__.split(".")[0] == "seqio"}
    has_text = callable(getattr(vocabulary, "encode", None)) and callable(getattr(vocabulary, "decode", None))
    return Own(vocabulary, numbers) if has_text and "PassThroughVocabulary" not in named else numbers


def numbers_only(vocabulary: Any) -> Opaque:
    """Returns what is known of a seqio vocabulary of any kind without its text; see `of_seqio`."""
    name = f"{type(vocabulary).__module__}.{type(vocabulary).__qualname__}"
    if not hasattr(vocabulary, "vocab_size"):
        raise UserError(f"{name} is no vocabulary: it has no vocab_size (and encode, decode, eos_id, as seqio's have)")
    eos_id, unk_id = (_optional(getattr(vocabulary, attribute, None)) for attribute in ("eos_id", "unk_id"))
    try:
        bos_id = _optional(getattr(vocabulary, "bos_id", None))
    except NotImplementedError:  # raised by seqio's base class where a vocabulary has none
        bos_id = None
    extra_ids = int(getattr(vocabulary, "extra_ids", 0))
    return Opaque(name, int(vocabulary.vocab_size), eos_id, unk_id, extra_ids, _sample_ids(vocabulary), bos_id)


def with_their_code(
    saved: Mapping[str, Vocabulary], registered: Callable[[], Mapping[str, Vocabulary]]
) -> dict[str, Vocabulary]:
    """Returns a run's saved vocabularies, those that only code knows replaced by the task's own.

    Args:
      saved: by feature.
      registered: returns those of the run's task; called only where one of `saved` holds no text.
    """
    found = dict(saved)
    lacking = {name: each for name, each in saved.items() if type(each) is Opaque and each.size and not each.is_ids}
    if not lacking:
        return found
    own, why = dict[str, Vocabulary](), "which the run's task does not have"
    try:
        own = dict(registered())
    except UserError as error:
        why = f"which is looked up in the run's task: {error}"
    for name, each in lacking.items():
        if (now := own.get(name)) is not None and each.fingerprint in (now.fingerprint, now.former):
            found[name] = now
            continue
        each.why = f" ({why})" if now is None else f" (the run's task now has another, {now})"
    return found


def check_named(task_name: str, vocabularies: Mapping[str, Any], named: Mapping[str, Any]) -> None:
    """Compares a task's vocabularies with those that a recipe names, {feature: vocabulary} both.

    Raises:
      UserError: the recipe names a feature that the task does not have, a vocabulary that is not the task's, or one
        that cannot be read.
    """
    for feature, wanted in named.items():
        if feature not in vocabularies:
            raise UserError(
                f"VOCABULARIES has one for feature {feature!r}, which task {task_name!r} does not have; "
                f"it has {sorted(vocabularies)}{did_you_mean(feature, vocabularies)}"
            )
        own = of_seqio(vocabularies[feature])
        try:
            given = of_seqio(wanted)
        except Exception as error:  # a vocabulary is seqio's or the user's code, and reads files
            raise UserError(
                f"the vocabulary that the recipe names for feature {feature!r} of task {task_name!r} cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error
        if own.fingerprint != given.fingerprint:
            raise UserError(
                f"task {task_name!r}, feature {feature!r}: the task is registered with a {own}, the recipe names a "
                f"{given}{own.settings_unlike(given)}; register the task with the recipe's, or use the task's: "
                "CachedData.vocabularies = {}"
            )


_CLASSES = (SentencePiece, Bytes, HuggingFace, Unigrams, Codepoints, WordPieces, Opaque)
_KINDS: dict[str, Any] = {cls.kind: cls for cls in _CLASSES}


def _is(vocabulary: Any, name: str) -> bool:
    """Whether it is of seqio's or meshway's class `name`, with that class's own encoding and decoding."""
    for base in type(vocabulary).__mro__:
        if base.__name__ == name and base.__module__.split(".")[0] in ("seqio", "meshway"):
            methods = ("encode", "_encode", "encode_tf", "_encode_tf", "decode", "_decode", "tokenizer")
            return all(getattr(type(vocabulary), m, None) is getattr(base, m, None) for m in methods)
    return False


def _without_extra_ids(model: bytes, extra_ids: int) -> bytes:
    """Returns the model as seqio read it, before it added the sentinels; the model's file is not read again."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    del proto.pieces[len(proto.pieces) - extra_ids :]
    return proto.SerializeToString(deterministic=True)


def _optional(token: Any) -> int | None:
    return None if token is None else int(token)


def _sample_ids(vocabulary: Any) -> list[int]:
    """Returns the ids of a fixed text, or [] where the vocabulary's ids are not of text."""
    try:
        return [int(token) for token in vocabulary.encode(_SAMPLE)]
    except Exception:  # any exception means that it does not encode text
        return []
