"""The tokenizer that lies beside a model's weights: its files, and the vocabulary that they are."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meshway.framework.conversion.family import FLAG, OBJECT, PLACE, check_fields, short
from meshway.framework.data.vocabularies import HuggingFace, SentencePiece
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import io_errors
from meshway.framework.terminal import listed

GENERATION = "generation_config.json"
_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
_CHAT, _CHAT_JSON = "chat_template.jinja", "chat_template.json"
TOKENIZERS, SENTENCE_PIECES = "tokenizer.json", ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
# What is copied with a model, where it is there.
FILES = (
    TOKENIZERS,
    *SENTENCE_PIECES,
    _CONFIG,
    _SPECIAL,
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    GENERATION,
    _CHAT,
    _CHAT_JSON,
)
_T5_SENTINELS = 100  # transformers adds as many to a T5 SentencePiece model that does not say otherwise
_START_FIELDS = {True: "decoder_start_token_id", False: "bos_token_id"}  # with an encoder, or without
_PADDING = 512, 0.02  # rows of an embedding without a token: so many, or this share of them


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary | None:
    """Returns the vocabulary of a model directory, None where it has no tokenizer that can be read.

    `tokenizer.json` is preferred to a SentencePiece model. Its EOS, with which targets end, is the `eos_token` of the
    files beside it, as in transformers; where they name none, the first of `stop_ids`.

    Args:
      directory: of the model.
      config: its config.json.

    Raises:
      UserError: the file is damaged, or a library is missing; the files beside it name an EOS that it lacks.
    """
    path = directory / TOKENIZERS
    try:
        if path.is_file():
            content = path.read_bytes()
            vocabulary = HuggingFace(content)
            eos_id = _eos_id(directory, vocabulary)
            if eos_id is None:
                eos_id = next(iter(stop_ids(directory, config)), None)
            sentinels = _sentinels(vocabulary.ids)
            _check_cuts(content.decode("utf-8"))
            if sentinels == _top(vocabulary.size, len(sentinels)):
                return HuggingFace(content, eos_id, len(sentinels))
            return HuggingFace(content, eos_id, sentinels=sentinels)
        for name in SENTENCE_PIECES:
            path = directory / name
            if path.is_file():
                _check_added(directory, SentencePiece(path.read_bytes()))
                _check_eos(directory, SentencePiece(path.read_bytes()))
                extra = _extra_ids(directory) if config.get("model_type") in ("t5", "mt5", "umt5", "longt5") else 0
                content = path.read_bytes()
                own = _sentinels(SentencePiece(content).ids)
                return SentencePiece(content, sentinels=own) if own else SentencePiece(content, extra)
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


def read_framing(directory: Path, config: Mapping[str, Any], has_encoder: bool, vocabulary: Vocabulary) -> Framing:
    """Returns what a model directory's tokenizer puts around text.

    Args:
      directory: of the model.
      config: its config.json.
      has_encoder: whether inputs go to an encoder: then they end with EOS, and the decoder starts as config.json says.
      vocabulary: the tokenizer.

    Raises:
      UserError: the files cannot be read, or an id is none of the tokenizer's.
    """
    framing = _framing(directory, config, has_encoder, vocabulary)
    ids_of_tokens = vocabulary.ids.values() if isinstance(vocabulary, HuggingFace) else range(vocabulary.size)
    known = frozenset(ids_of_tokens)  # a tokenizer.json may leave some below its highest out
    for field, ids in (("eos_token_id", framing.stop), (_START_FIELDS[has_encoder], framing.start)):
        if wrong := [token for token in ids if token not in known]:
            raise UserError(
                f"{directory / 'config.json'}, or {GENERATION}: {field} {wrong[0]} is not a token of the tokenizer "
                f"there, whose ids end at {vocabulary.size - 1}: it is another model's, or lacks tokens that were "
                "added to it"
            )
    return framing


def framing_of_ids(directory: Path, config: Mapping[str, Any], has_encoder: bool, size: int) -> Framing:
    """Returns the same of a model directory without a tokenizer: what its configs say of token ids. Inputs are taken as
    they are given.

    Args:
      directory, config, has_encoder: see `read_framing`.
      size: how many ids the model knows.

    Raises:
      UserError: the files cannot be read, or an id is none of the model's.
    """
    start = _decoder_start(directory, config) if has_encoder else ()
    framing = Framing(start, False, stop_ids(directory, config))
    if wrong := [token for token in (*framing.start, *framing.stop) if token >= size]:
        raise UserError(f"{directory / 'config.json'}, or {GENERATION}: id {wrong[0]} is not among the model's {size}")
    return framing


def _decoder_start(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    said = (config.get("decoder_start_token_id"), _json(directory / GENERATION).get("decoder_start_token_id"))
    start = next((token for token in said if token is not None), config.get("pad_token_id", 0))
    return _ids(directory, _START_FIELDS[True], start)


def _framing(directory: Path, config: Mapping[str, Any], has_encoder: bool, vocabulary: Vocabulary) -> Framing:
    own = () if vocabulary.eos_id is None else (vocabulary.eos_id,)
    stop = tuple(dict.fromkeys((*stop_ids(directory, config), *own)))
    if has_encoder:
        return Framing(_decoder_start(directory, config), True, stop)
    bos = _ids(directory, _START_FIELDS[has_encoder], config.get("bos_token_id"))
    if isinstance(vocabulary, HuggingFace):
        return Framing(vocabulary.template()[0], False, stop)
    try:
        adds = any((directory / name).is_file() for name in SENTENCE_PIECES)
        adds = adds and _tokenizer_config(directory).get("add_bos_token") is not False
    except (OSError, ValueError, ImportError, StopIteration) as error:
        raise UserError(f"the tokenizer in {directory} cannot be read: {error}") from error
    return Framing(bos if adds else (), False, stop)


def stop_ids(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the ids that end a prediction: those of config.json, then those that generation_config.json adds.

    Raises:
      UserError: one of the files says something else than ids.
    """
    found = _ids(directory, "eos_token_id", config.get("eos_token_id"))
    more = _ids(directory, "eos_token_id", _json(directory / GENERATION).get("eos_token_id"), GENERATION)
    return tuple(dict.fromkeys((*found, *more)))


def read_chat_templates(directory: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the Jinja templates of chats by name, "default" and others, {} where there is none; and the special
    tokens that the files name, as `bos_token`.

    Raises:
      UserError: a file is damaged.
    """
    config = _tokenizer_config(directory)
    said = config.get("chat_template", _json(directory / _CHAT_JSON).get("chat_template"))
    try:
        if (directory / _CHAT).is_file():
            said = (directory / _CHAT).read_text("utf-8")
        named = {"default": said} if isinstance(said, str) else {each["name"]: each["template"] for each in said or ()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the chat template in {directory} cannot be read: {error}") from error
    tokens = {}
    for name, token in {**_json(directory / _SPECIAL), **config}.items():
        token = token.get("content") if isinstance(token, Mapping) else token
        if name.endswith("_token") and isinstance(token, str):
            tokens[name] = token
    return named, tokens


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
      UserError: a file cannot be read or written.
      EnvironmentFailure: the disk is full or broken.
    """
    found = [name for name in names if (source / name).is_file()]
    with io_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {source / name}: {error.strerror or error}") from error
        with io_errors(target / name):
            (target / name).write_bytes(content)
    return found


def write_vocabulary(vocabulary: Vocabulary, directory: Path) -> None:
    """Writes the vocabulary of a model that was trained here, under the name that transformers looks for."""
    vocabulary.save(directory, "vocabulary")
    (directory / "vocabulary.json").unlink()
    for suffix, name in ((".tokenizer.json", TOKENIZERS), (".model", SENTENCE_PIECES[0])):
        path = directory / f"vocabulary{suffix}"
        if path.is_file():
            path.rename(directory / name)


def _json(path: Path) -> Mapping[str, Any]:
    """Returns a JSON object, {} where the file is not there; UserError where it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def _ids(directory: Path, field: str, value: Any, name: str = "config.json") -> tuple[int, ...]:
    """Returns the ids of a field, one, several or none; UserError where it holds something else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise UserError(f"{directory / name}: {field} is {value!r}, but must be a token id, or a list of them")
    return tuple(ids)


def _sentinels(ids: Mapping[str, int]) -> tuple[int, ...]:
    """Returns the ids of the tokens `<extra_id_N>` by N, wherever they lie, given the id of each token."""
    matches = [match for name in ids if (match := re.fullmatch(r"▁?<extra_id_(\d+)>", name))]
    return tuple(ids[match[0]] for match in sorted(matches, key=lambda match: int(match[1])))


def _top(size: int, count: int) -> tuple[int, ...]:
    """Returns the highest ids, from the top down."""
    return tuple(range(size - 1, size - 1 - count, -1))


def _check_added(directory: Path, pieces: SentencePiece) -> None:
    """Raises UserError where a file beside a SentencePiece model adds tokens that the model lacks."""
    decoder = _tokenizer_config(directory).get("added_tokens_decoder") or {}
    added = {
        "added_tokens.json": _json(directory / "added_tokens.json"),
        _CONFIG: {token["content"]: int(id) for id, token in decoder.items()},
    }
    known, sentinel = pieces.ids, re.compile(r"<extra_id_\d+>")
    for name, tokens in added.items():
        lacks = [token for token, id in tokens.items() if known.get(token, known.get(token.replace(" ", "▁"))) != id]
        if missing := [token for token in lacks if not sentinel.fullmatch(token)]:
            raise UserError(
                f"{directory / name} adds {listed(map(repr, missing), 4)} to a SentencePiece model, which cannot "
                f"hold them: put the tokenizer's {TOKENIZERS} there too, which transformers' save_pretrained writes "
                "for a fast tokenizer"
            )


def _eos_token(directory: Path) -> tuple[str, str] | None:
    """Returns the EOS that the files beside a tokenizer name, and which of them; None where they name none."""
    for name, described in (
        (_CONFIG, _tokenizer_config(directory)),
        (_SPECIAL, _json(directory / _SPECIAL)),
    ):
        token = described.get("eos_token")
        token = token.get("content") if isinstance(token, Mapping) else token
        if token is not None and (not isinstance(token, str) or not token):
            raise UserError(f"{directory / name}: eos_token is {short(token)}, but must be the text of a token")
        if token is not None:
            return token, name
    return None


def _eos_id(directory: Path, vocabulary: HuggingFace) -> int | None:
    """Returns the id of that EOS; UserError where the tokenizer lacks it."""
    named = _eos_token(directory)
    if named is None:
        return None
    (token, name), ids = named, vocabulary.ids
    if token not in ids:
        near = did_you_mean(token, vocabulary.special_tokens.values())
        raise UserError(
            f"{directory / name}: eos_token {token!r} is not a token of the {TOKENIZERS} there{near}: name the token "
            "that ends its texts, or add this one to the tokenizer"
        )
    return ids[token]


def _check_eos(directory: Path, pieces: SentencePiece) -> None:
    """Raises UserError where the files beside a SentencePiece model name another EOS than its own."""
    named = _eos_token(directory)
    if named is None or pieces.ids.get(named[0], -1) == pieces.eos_id:
        return
    own = next((token for token, id in pieces.ids.items() if id == pieces.eos_id), None)
    raise UserError(
        f"{directory / named[1]}: eos_token is {named[0]!r}, and the SentencePiece model's EOS {own!r}: put the "
        f"tokenizer's {TOKENIZERS} there too, or name the model's"
    )


def _extra_ids(directory: Path) -> int:
    extra_ids = _tokenizer_config(directory).get("extra_ids")
    return _T5_SENTINELS if extra_ids is None else int(extra_ids)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json, {} where there is none; raises UserError where it is damaged."""
    path = directory / _CONFIG
    if not path.is_file():
        return {}
    try:
        described = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(described, dict):
        raise UserError(f"{path} holds {short(described)}, not an object {{...}}")
    kinds = {"extra_ids": PLACE, "add_bos_token": FLAG, "added_tokens_decoder": OBJECT}
    check_fields(described, {name: kind.or_nothing() for name, kind in kinds.items()}, file=str(path))
    return described


def _check_cuts(text: str) -> None:
    """Raises ValueError where a tokenizer.json loads and then cuts no text, as with unknown tokens in its template."""
    import tokenizers

    for special in (False, True):
        try:
            tokenizers.Tokenizer.from_str(text).encode("a", add_special_tokens=special)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is not an Exception
            raise ValueError(f"it cuts no text: {error}") from error
