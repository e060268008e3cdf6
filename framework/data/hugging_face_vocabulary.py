"""Vocabularies of Hugging Face `tokenizers` files."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from meshway.framework.data import detokenizing
from meshway.framework.data.vocabulary import Vocabulary, first_of
from meshway.framework.errors import UserError


class HuggingFace(Vocabulary):
    """A Hugging Face tokenizer. No id is moved: they are rows of the embedding of the model it came with.

    Nothing is added to text (no BOS, no EOS), and the file's own truncation and padding are off. Decoding
    shows every token but EOS, special ones too.

    Args:
      content: a tokenizer.json (UTF-8).
      eos_id: the id that ends a sequence.
      extra_ids: how many of the highest ids are sentinels.
      sentinels: the ids of the sentinels, where they are others; there are as many extra ids then.
      literal: whether a text that spells out a special token, such as '</s>', is taken literally, cut like any other.

    Attributes:
      special_tokens: id -> the token that it becomes where a text spells it out; none where it is `literal`.

    Raises:
      UserError: `tokenizers` is not installed.
      ValueError: `content` is no tokenizer.
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
        self.size = max(ids.values()) + 1  # there may be holes
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
        # T5's order has padding at 0, and starts from it; GPT-2's texts follow the EOS of the one before.
        self.start = self.template()[0] or first_of(*(token for token in pads if token == 0), eos_id)

    @property
    def ids(self) -> dict[str, int]:
        """The id of each token, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def template(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the ids that the file's post-processor puts before a text and after it; none if it cuts no text."""
        try:
            framed, plain = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (True, False))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of the library is no Exception
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
    """Returns what stands for each byte in GPT-2's byte-level tokens: itself if it is a visible letter of
    Latin-1, else the next unused code point from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
