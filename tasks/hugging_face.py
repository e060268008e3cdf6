"""Hugging Face `tokenizers` files as seqio vocabularies: files that came with a model, and newly trained ones."""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from meshway.tasks.registry import cache_directory, cached_file


class HuggingFaceVocabulary(seqio.Vocabulary):
    """A Hugging Face `tokenizers` file as a seqio vocabulary; read when it is first used.

    Ids are the file's own, so they are the rows of the embedding of the model it came with. seqio calls id 0
    padding; in many of these files (GPT-2's, Llama 3's) it is a real token, and stays one: meshway recognises padding
    by segment ids and lengths, never by a token id. Code that takes id 0 for padding, as seqio's own feature
    converters do, must not be used with such a file.

    Nothing is added to a text: no BOS, no EOS (seqio's `append_eos` does that), no truncation, no padding, even if the
    file asks for it. The text of a special token in a text becomes that token, unless `literal` is set. Decoding ends
    at the first EOS and shows every other token, special ones too.

    Args:
      path: a tokenizer.json, or the folder that holds it.
      eos_token: the token that ends a sequence, as '</s>' or '<|endoftext|>'; the file itself does not name it.
        None: there is none, and the tasks must not append it.
      extra_ids: sentinels '<extra_id_N>', the first being the highest id. They are added above the file's
        tokens, and the model's embedding needs as many more rows; sentinels that the file already has there (T5's)
        are used.
      literal: whether the text of a special token, '</s>' or '<|eot|>', in a text is tokenized like any other text.
        Set it for text of users, who could otherwise end an example, or write for another side of a chat.
    """

    def __init__(
        self, path: str | Path, eos_token: str | None = None, extra_ids: int = 0, literal: bool = False
    ) -> None:
        super().__init__(extra_ids=extra_ids)
        self._path = path
        self._eos_token = eos_token
        self.literal = literal

    @property
    def path(self) -> Path:
        """The tokenizer.json."""
        path = Path(self._path).expanduser()
        return path / "tokenizer.json" if path.is_dir() else path

    @functools.cached_property
    def tokenizer_json(self) -> str:
        """The file's text, with the extra ids among its added tokens.

        Raises:
          ValueError: it cannot be read, or has '<extra_id_N>' tokens elsewhere than at the top.
        """
        try:
            text = self.path.read_text("utf-8")
        except OSError as error:
            raise ValueError(f"cannot read the tokenizer {self.path}: {error.strerror}") from error
        return _with_extra_ids(text, self.extra_ids, self.path) if self.extra_ids else text

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The `tokenizers.Tokenizer`; ValueError if the library is missing or the file cannot be read."""
        tokenizer = _tokenizer(self.tokenizer_json, self.path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.literal
        return tokenizer

    @functools.cached_property
    def eos_id(self) -> int | None:
        """The id of `eos_token`; ValueError where the file has no such token."""
        if self._eos_token is None:
            return None
        token: int | None = self.tokenizer.token_to_id(self._eos_token)
        if token is None:
            special = [added.content for added in self.tokenizer.get_added_tokens_decoder().values()]
            raise ValueError(f"{self.path} has no token {self._eos_token!r}; its added tokens: {special[:20]}")
        return token

    @property
    def bos_id(self) -> None:
        """None: this vocabulary adds no BOS."""
        return None

    @functools.cached_property
    def unk_id(self) -> int | None:
        """The id of the model's unknown token; None where it needs none, as byte-level BPE."""
        model = json.loads(self.tokenizer_json)["model"]
        token: int | None = model.get("unk_id")
        return token if model.get("unk_token") is None else self.tokenizer.token_to_id(model["unk_token"])

    @property
    def vocab_size(self) -> int:
        """The highest id + 1, extra ids included."""
        return self._base_vocab_size

    @functools.cached_property
    def _base_vocab_size(self) -> int:
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s, add_special_tokens=False).ids

    def _decode(self, ids: Iterable[int]) -> str:
        kept = [int(token) for token in ids]
        if self.eos_id in kept:
            kept = kept[: kept.index(self.eos_id)]
        return self.tokenizer.decode(kept, skip_special_tokens=False)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Encodes a string [] as int32 [length], strings [n] as a RaggedTensor [n, length]."""
        s = tf.convert_to_tensor(s, tf.string)
        if s.shape.rank:
            one = tf.RaggedTensorSpec([None], tf.int32, ragged_rank=0)
            return tf.map_fn(self._encode_tf, tf.ensure_shape(s, [None]), fn_output_signature=one)
        ids = tf.numpy_function(self._encode_bytes, [s], tf.int32, stateful=False)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Decodes ids [..., length] to strings [...]."""
        text = tf.numpy_function(self._decode_array, [ids], tf.string, stateful=False)
        return tf.ensure_shape(text, ids.shape[:-1])

    def _encode_bytes(self, text: bytes | np.ndarray) -> np.ndarray:
        data = text if isinstance(text, bytes) else text.item()  # an array outside of graphs
        return np.array(self._encode(data.decode("utf-8", "replace")), np.int32)

    def _decode_array(self, ids: np.ndarray) -> np.ndarray:
        texts = [self._decode(row).encode() for row in ids.reshape(-1, ids.shape[-1])]
        return np.array(texts, object).reshape(ids.shape[:-1])

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out everything that can be read again; gin copies vocabularies."""
        return {name: value for name, value in vars(self).items() if name not in ("tokenizer", "tokenizer_json")}

    def __eq__(self, other: object) -> bool:
        """Equal if the file and the settings are."""
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __str__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({str(self._path)!r}, eos_token={self._eos_token!r}, extra_ids={self.extra_ids})"

    def _key(self) -> tuple[Any, ...]:
        return (str(self._path), self._eos_token, self.extra_ids, self.literal)


class TrainedBytePairVocabulary(HuggingFaceVocabulary):
    """Byte-level BPE, trained by `tokenizers` when it is first needed, and kept in the cache.

    Id 0 is '<pad>', 1 is '</s>', then come the 256 bytes and their merges, within words as GPT-2 splits them; newlines
    and indentation are kept, so decoding an encoding returns the text. Training is deterministic; the file's
    name contains a hash of the text and of the settings.

    Args:
      name: the beginning of the file name.
      texts: returns the training texts; called when the vocabulary is first used.
      pieces: vocabulary size without the extra ids.
      extra_ids: sentinels above the pieces; the first is the highest id.
    """

    def __init__(self, name: str, texts: Callable[[], Iterable[str]], pieces: int = 4000, extra_ids: int = 0) -> None:
        super().__init__(name, eos_token="</s>", extra_ids=extra_ids)
        self._texts = texts
        self._pieces = pieces

    @functools.cached_property
    def path(self) -> Path:
        """The tokenizer.json, trained now if the cache has none for this text and these settings."""
        texts = list(self._texts())
        digest = hashlib.sha256(json.dumps([self._pieces, texts]).encode()).hexdigest()[:16]
        name = f"{self._path}-bpe-{self._pieces}-{digest}.tokenizer.json"
        return cached_file(name, lambda: self._train(texts))

    def _train(self, texts: list[str]) -> bytes:
        tokenizers = _import_tokenizers()
        size = sum(map(len, texts))
        print(
            f"vocabulary {self._path}: training {self._pieces:,} byte-level BPE tokens on {size:,} characters, once; "
            f"kept in {cache_directory()}",
            file=sys.stderr,
        )
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self._pieces,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() != self._pieces:
            raise ValueError(
                f"vocabulary {self._path!r}: {size} characters give {tokenizer.get_vocab_size()} byte-level BPE "
                f"tokens, not {self._pieces}"
            )
        return tokenizer.to_str().encode()

    def _key(self) -> tuple[Any, ...]:
        return (self._path, self._texts, self._pieces, self.extra_ids)


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("a Hugging Face vocabulary needs the package tokenizers: pip install 'meshway[hf]'") from error
    return tokenizers


def _tokenizer(text: str, path: Path) -> Any:
    """Returns the Tokenizer of a tokenizer.json; ValueError if it is not one, or is read with other ids than it has."""
    tokenizers = _import_tokenizers()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{path} is not a tokenizer.json that tokenizers can read: {error}") from error
    for token in json.loads(text).get("added_tokens", ()):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise ValueError(
                f"{path}: added token {token['content']!r} has id {token['id']}, but tokenizers reads it as "
                f"{tokenizer.token_to_id(token['content'])}: the file's ids have a hole"
            )
    return tokenizer


def _with_extra_ids(text: str, extra_ids: int, path: Path) -> str:
    """Returns a tokenizer.json with '<extra_id_N>' at its top, N = 0 highest."""
    ids = _tokenizer(text, path).get_vocab(with_added_tokens=True)
    sentinels = [f"<extra_id_{number}>" for number in range(extra_ids)]
    highest = max(ids.values())
    present = {token: ids[token] for token in sentinels if token in ids}
    if present == {token: highest - number for number, token in enumerate(sentinels)}:
        return text
    if present:
        raise ValueError(
            f"{path} has {len(present)} of the {extra_ids} tokens <extra_id_N>, and not as its highest ids from "
            "<extra_id_0> down; give the extra_ids that it has, or 0"
        )
    described = json.loads(text)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    described["added_tokens"] += [
        {"id": highest + 1 + place, "content": token} | flags for place, token in enumerate(reversed(sentinels))
    ]
    return json.dumps(described, ensure_ascii=False)
