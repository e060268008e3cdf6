"""The tokenizer that lies beside a model's weights: its files, and the vocabulary that they are."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshway.framework.data.vocabularies import HuggingFace, SentencePiece
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError

TOKENIZERS, SENTENCE_PIECES = "tokenizer.json", ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# What is copied with a model, where it is there.
FILES = (
    TOKENIZERS,
    *SENTENCE_PIECES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_T5_SENTINELS = 100  # transformers adds as many to a T5 SentencePiece model that does not say otherwise
_PADDING = 512, 0.02  # rows of an embedding without a token: so many, or this share of them


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """Returns the vocabulary of a model directory, None where it has no tokenizer that can be read.

    `tokenizer.json` is preferred to a SentencePiece model.

    Args:
      directory: of the model.
      config: its config.json, which tells the EOS.

    Raises:
      UserError: the file is damaged, or a library is missing.
    """
    path = directory / TOKENIZERS
    try:
        if path.is_file():
            content = path.read_bytes()
            sentinels = _sentinels(HuggingFace(content).ids)
            return HuggingFace(content, _eos_id(config), **sentinels)
        for name in SENTENCE_PIECES:
            path = directory / name
            if path.is_file():
                extra = _extra_ids(directory) if config.get("model_type") in ("t5", "mt5") else 0
                return SentencePiece(path.read_bytes(), extra)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"the tokenizer {path} cannot be read: {error}") from error
    return None


def read_sentence_pieces(path: Path) -> Vocabulary:
    """Returns a SentencePiece model as T5X's tasks have it: with T5's sentinels above its pieces.

    Raises:
      UserError: it is not there, or is none.
    """
    try:
        return SentencePiece(path.read_bytes(), _T5_SENTINELS)
    except (OSError, ValueError) as error:
        raise UserError(f"the vocabulary {path} cannot be read: {error}") from error


def read_framing(directory: Path, config: Mapping[str, Any], has_encoder: bool) -> Framing:
    """Returns what a model directory's tokenizer puts around text.

    Args:
      directory: of the model.
      config: its config.json.
      has_encoder: whether inputs go to an encoder: then they end with EOS, and the decoder starts as config.json says.

    Raises:
      UserError: the tokenizer cannot be read.
    """
    if has_encoder:
        return Framing((int(config.get("decoder_start_token_id") or 0),), True)
    bos = config.get("bos_token_id")
    try:
        if (directory / TOKENIZERS).is_file():
            import tokenizers

            tokenizer = tokenizers.Tokenizer.from_file(str(directory / TOKENIZERS))
            framed, plain = (tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
            added = len(framed) - len(plain)
            start = next(n for n in range(added + 1) if framed[n : n + len(plain)] == plain)
            return Framing(tuple(framed[:start]), False)
        adds = any((directory / name).is_file() for name in SENTENCE_PIECES)
        path = directory / "tokenizer_config.json"
        if adds and path.is_file():
            adds = bool(json.loads(path.read_text("utf-8")).get("add_bos_token", True))
    except (OSError, ValueError, ImportError, StopIteration) as error:
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return Framing((int(bos),) if adds and bos is not None else (), False)


def check_size(vocabulary: Vocabulary, vocab_size: int, directory: Path) -> None:
    """Raises UserError where a tokenizer is not the model's by its size: an id without a row of the embedding, or more
    rows without an id than a table is padded by."""
    spare = vocab_size - vocabulary.size
    if spare < 0:
        raise UserError(
            f"the tokenizer in {directory} has {vocabulary.size} ids and the model's vocabulary only {vocab_size}: it "
            "is another model's"
        )
    if spare > max(_PADDING[0], _PADDING[1] * vocab_size):
        raise UserError(
            f"the tokenizer in {directory} has {vocabulary.size} ids and the model's vocabulary {vocab_size}, more "
            "than padding explains: it is another model's"
        )


def copy_files(source: Path, target: Path, names: tuple[str, ...] = FILES) -> list[str]:
    """Copies those of the files that are there; returns their names.

    Raises:
      UserError: the disk refuses.
    """
    found = [name for name in names if (source / name).is_file()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in found:
            shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise UserError(f"cannot copy to {target}: {error.strerror or error}") from error
    return found


def write_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Writes the vocabulary of a model that was trained here, under the name that transformers looks for."""
    vocabulary.save(directory, "vocabulary")
    (directory / "vocabulary.json").unlink()
    for suffix, name in ((".tokenizer.json", TOKENIZERS), (".model", SENTENCE_PIECES[0])):
        path = directory / f"vocabulary{suffix}"
        if path.is_file():
            path.rename(directory / name)


def _eos_id(config: Mapping[str, Any]) -> int | None:
    eos = config.get("eos_token_id")
    return (eos[0] if eos else None) if isinstance(eos, list) else eos


def _sentinels(ids: Mapping[str, int]) -> dict[str, Any]:
    """Returns what `HuggingFace` is told of the tokens `<extra_id_N>`, wherever their ids lie: {token: id} of all."""
    matches = [match for name in ids if (match := re.fullmatch(r"▁?<extra_id_(\d+)>", name))]
    found = [ids[match[0]] for match in sorted(matches, key=lambda match: int(match[1]))]
    highest = max(ids.values(), default=-1)
    if found == [highest - number for number in range(len(found))]:
        return {"extra_ids": len(found)}
    return {"sentinels": found}


def _extra_ids(directory: Path) -> int:
    path = directory / "tokenizer_config.json"
    described = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return int(described.get("extra_ids", _T5_SENTINELS))
