"""Vocabularies of the shipped tasks: pieces trained once on a task's own text, and bytes."""

import functools
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import seqio

from meshway.tasks import corpus, manuals
from meshway.tasks.registry import cache_directory, cached_file

EXTRA_IDS = 100  # sentinels, above the pieces, as T5 has them
# One rule for a code point that text never holds. Without any rule, TensorFlow's SentencePiece logs a line to stderr
# each time a dataset is built.
_NORMALIZATION = "FFFE\tFFFD\n"
_MAX_LINE_BYTES = 4192  # longer training lines are split; SentencePiece would drop them


class TrainedSentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """A SentencePiece unigram vocabulary that is trained when it is first needed, and kept in the cache.

    Text is not normalised (except that U+FFFE, not a character, becomes U+FFFD), runs of spaces and indentation have
    pieces of their own, and characters without a piece (a newline, a rare letter) are encoded as bytes, so decoding an
    encoding returns the text. Training is deterministic (one thread, all lines, no sampling); the file's name contains
    a hash of the text and of the settings.

    Args:
      name: the beginning of the file name.
      texts: returns the training texts; called when the vocabulary is first used.
      pieces: vocabulary size without the extra ids.
      extra_ids: sentinels above the pieces; the first is the highest id.
    """

    def __init__(
        self, name: str, texts: Callable[[], Iterable[str]], pieces: int = 4000, extra_ids: int = EXTRA_IDS
    ) -> None:
        super().__init__("", extra_ids=extra_ids)
        self._name = name
        self._texts = texts
        self._pieces = pieces

    @functools.cached_property
    def path(self) -> Path:
        """The model file, trained now if the cache has none for this text and these settings."""
        lines = _lines(self._texts())
        settings = _settings(self._pieces)
        digest = hashlib.sha256(json.dumps([settings, _NORMALIZATION, lines]).encode()).hexdigest()[:16]
        return cached_file(f"{self._name}-{self._pieces}-{digest}.model", lambda: self._train(lines, settings))

    @property
    def sentencepiece_model_file(self) -> str:
        """The path of the model file, as seqio asks for it."""
        return str(self.path)

    def _model_context(self) -> Any:
        if not self._model:
            self._sentencepiece_model_file = str(self.path)
        return super()._model_context()

    def _train(self, lines: list[str], settings: dict[str, Any]) -> bytes:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        size = sum(map(len, lines))
        print(
            f"vocabulary {self._name}: training {self._pieces:,} pieces on {size:,} characters, once; "
            f"kept in {cache_directory()}",
            file=sys.stderr,
        )
        model = io.BytesIO()
        try:
            with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rule:
                rule.write(_NORMALIZATION)
                rule.flush()
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(lines),
                    model_writer=model,
                    normalization_rule_tsv=rule.name,
                    minloglevel=2,
                    **settings,
                )
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"vocabulary {self._name!r}: SentencePiece cannot train {self._pieces} pieces on "
                f"{size} characters: {error}"
            ) from error
        proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())  # type: ignore[attr-defined]
        proto.normalizer_spec.normalization_rule_tsv = (
            ""  # the rule is compiled in; its temporary file's name would vary
        )
        return proto.SerializeToString(deterministic=True)

    def __eq__(self, other: object) -> bool:
        """Equal if the training text and settings are, whether or not it has been trained yet."""
        if not isinstance(other, TrainedSentencePieceVocabulary):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self._name!r}, pieces={self._pieces}, extra_ids={self.extra_ids})"

    def _key(self) -> tuple[Any, ...]:
        return (self._name, self._texts, self._pieces, self.extra_ids)


def _settings(pieces: int) -> dict[str, Any]:
    return {
        "model_type": "unigram",
        "vocab_size": pieces,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "byte_fallback": True,
        "character_coverage": 0.9999,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "input_sentence_size": 0,
        "max_sentence_length": _MAX_LINE_BYTES,
        "num_threads": 1,  # with more, the order of sums varies and the pieces differ
    }


def _lines(texts: Iterable[str]) -> list[str]:
    """Returns the distinct lines of `texts`, in order of first occurrence, very long ones split."""
    longest = _MAX_LINE_BYTES // 4  # characters of at most 4 bytes
    lines = dict.fromkeys(line for text in texts for line in text.split("\n") if line.strip())
    return [line[at : at + longest] for line in lines for at in range(0, len(line), longest)]


def _pydocs_texts() -> list[str]:
    """Returns the training text of the pydocs vocabulary: the train documents and a sixth of the code."""
    texts = [document.text for document in corpus.documents("train")]
    return texts + [function.source for function in corpus.functions("train")[::6]]


@functools.cache
def pydocs(pieces: int = 4000, extra_ids: int = EXTRA_IDS) -> TrainedSentencePieceVocabulary:
    """Returns the SentencePiece vocabulary of the pydocs tasks; it is trained when it is first used."""
    return TrainedSentencePieceVocabulary("pydocs", _pydocs_texts, pieces, extra_ids)


def _prose_texts() -> list[str]:
    """Returns the training text of the prose vocabulary: an eighth of the train documents, 3.6 MB."""
    return [document.text for document in manuals.documents("train")[::8]]


@functools.cache
def prose(pieces: int = 8000, extra_ids: int = EXTRA_IDS) -> TrainedSentencePieceVocabulary:
    """Returns the SentencePiece vocabulary of the prose tasks; it is trained when it is first used."""
    return TrainedSentencePieceVocabulary("prose", _prose_texts, pieces, extra_ids)


@functools.cache
def byte(extra_ids: int = EXTRA_IDS) -> seqio.ByteVocabulary:
    """Returns ByT5's vocabulary: 3 special ids, 256 bytes, then `extra_ids` sentinels."""
    return seqio.ByteVocabulary(extra_ids)
