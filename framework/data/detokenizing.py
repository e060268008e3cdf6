"""Token ids to text one at a time: the pieces joined are the text of all ids at once, and each token costs the same.

A piece is returned once no later token can change it. What a decoder does across tokens (bytes that make a character
together, spaces at the beginning) is kept as state. Decoders of an unknown kind return all text at the end.
"""

import codecs
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

Decode = Callable[[list[int]], str]
REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x(\+?[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")


class Detokenizer(Protocol):
    """The text of one sequence."""

    def feed(self, token: int) -> str:
        """Takes the next id; returns the text that is now certain, "" while it depends on later ids."""
        ...

    def finish(self) -> str:
        """Returns the rest of the text; `feed` must not be called afterwards."""
        ...

    def bytes_of(self, token: int) -> bytes:
        """Returns what an id, if it came next, would add to the text, as bytes: perhaps a part of a character.

        Raises:
          ValueError: a text is not the bytes of its ids one after the other.
        """
        ...


class AllAtEnd:
    """All text at the end, by `decode` of all ids."""

    def __init__(self, decode: Decode) -> None:
        self._decode, self._ids = decode, list[int]()

    def feed(self, token: int) -> str:
        self._ids.append(token)
        return ""

    def finish(self) -> str:
        return self._decode(self._ids)

    def bytes_of(self, token: int) -> bytes:
        raise ValueError("the text of an id depends on those around it")


class Utf8:
    """Bytes as text, `of_token` being those of an id; `errors` as in `bytes.decode`: the text of all bytes at once."""

    def __init__(self, of_token: Callable[[int], bytes], errors: str) -> None:
        self._of_token = of_token
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def feed(self, token: int) -> str:
        return self._decoder.decode(self._of_token(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)

    def bytes_of(self, token: int) -> bytes:
        return self._of_token(token)


class PerToken:
    """Tokens whose text depends only on whether they are the first.

    `known` keeps the text of tokens that are not the first, over many sequences; an id without a token has none.
    """

    def __init__(self, decode: Decode, exists: Callable[[int], bool], known: dict[int, str]) -> None:
        self._decode, self._exists, self._known = decode, exists, known
        self._first: int | None = None

    def feed(self, token: int) -> str:
        text = self._text(token)
        if self._first is None and self._exists(token):
            self._first = token
        return text

    def finish(self) -> str:
        return ""

    def bytes_of(self, token: int) -> bytes:
        return self._text(token).encode()

    def _text(self, token: int) -> str:
        if not self._exists(token):
            return ""
        if self._first is None:
            return self._decode([token])
        if token not in self._known:
            before = self._decode([self._first])
            self._known[token] = self._decode([self._first, token])[len(before) :]
        return self._known[token]


class ByteFallback:
    """Tokens as text where tokens such as `<0xE2>` are bytes.

    A run of bytes becomes its characters or, where it is not UTF-8, one replacement character for each byte, as in
    tokenizers' ByteFallback followed by Fuse.

    Args:
      of_token: the token of an id, after replacements; None where there is none.
      strip: (character, how many of them at most are dropped from the beginning of the text).
    """

    def __init__(self, of_token: Callable[[int], str | None], strip: tuple[str, int] = ("", 0)) -> None:
        self._of_token, self._strip = of_token, strip
        self._run: list[bytes] | None = []  # bytes that may yet be characters; None once the run is broken
        self._new_run()

    def feed(self, token: int) -> str:
        piece = self._of_token(token)
        if piece is None:
            return ""
        if _BYTE_TOKEN.fullmatch(piece):
            return self._stripped(self._byte(bytes([int(piece[3:5], 16)])))
        text = self._ended_run() + piece
        self._new_run()
        return self._stripped(text)

    def finish(self) -> str:
        return self._stripped(self._ended_run())

    def bytes_of(self, token: int) -> bytes:
        piece = self._of_token(token)
        if piece is None:
            return b""
        data = bytes([int(piece[3:5], 16)]) if _BYTE_TOKEN.fullmatch(piece) else piece.encode()
        character, count = self._strip
        for _ in range(count if not self._run else 0):
            data = data.removeprefix(character.encode())
        return data

    def _new_run(self) -> None:
        self._run, self._decoder = [], codecs.getincrementaldecoder("utf-8")("strict")

    def _byte(self, byte: bytes) -> str:
        if self._run is None:
            return REPLACEMENT
        self._run.append(byte)
        try:
            self._decoder.decode(byte)
        except UnicodeDecodeError:
            broken, self._run = len(self._run), None
            return REPLACEMENT * broken
        return ""

    def _ended_run(self) -> str:
        if self._run is None:
            return ""
        try:
            return b"".join(self._run).decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT * len(self._run)

    def _stripped(self, text: str) -> str:
        character, count = self._strip
        if not count or not text:
            return text
        kept = text
        while count and kept.startswith(character):
            kept, count = kept[len(character) :], count - 1
        self._strip = (character, 0 if kept else count)
        return kept


class Pieces:
    """SentencePiece's own decoding.

    A byte that is part of no character becomes a replacement character, and the first piece's space is dropped.

    Args:
      decode: ids to text.
      byte: id -> its byte; None where it is not a byte.
      is_space: whether an id, when it is first, is a space that is dropped (no further space is dropped then).
      known: the text of pieces that are not the first, kept over many sequences.
    """

    def __init__(
        self,
        decode: Decode,
        byte: Callable[[int], int | None],
        is_space: Callable[[int], bool],
        known: dict[int, str],
    ) -> None:
        self._decode, self._byte_of, self._is_space, self._known = decode, byte, is_space, known
        self._bytes = b""
        self._before: list[int] | None = None  # ids after which a piece is not the first; None while it is

    def feed(self, token: int) -> str:
        byte = self._byte_of(token)
        if byte is not None:
            self._before = self._before or [token]
            self._bytes += bytes([byte])
            return self._characters(whole=False)
        return self._characters(whole=True) + self._piece(token)

    def finish(self) -> str:
        return self._characters(whole=True)

    def bytes_of(self, token: int) -> bytes:
        byte = self._byte_of(token)
        return self._text(token).encode() if byte is None else bytes([byte])

    def _piece(self, token: int) -> str:
        text = self._text(token)
        if self._before is None and (text or self._is_space(token)):
            self._before = [token]
        return text

    def _text(self, token: int) -> str:
        if self._before is None:
            return self._decode([token])
        if token not in self._known:
            before = self._decode(self._before)
            self._known[token] = self._decode([*self._before, token])[len(before) :]
        return self._known[token]

    def _characters(self, whole: bool) -> str:
        """Removes and returns the characters that are certain; `whole` if no more bytes follow."""
        text = ""
        while self._bytes:
            size = _character_size(self._bytes[0])
            if len(self._bytes) < size and not whole:
                break
            try:
                text += self._bytes[:size].decode("utf-8")
                self._bytes = self._bytes[size:]
            except UnicodeDecodeError:
                text += REPLACEMENT
                self._bytes = self._bytes[1:]
        return text


def of_decoder(
    decoder: Mapping[str, Any] | None,
    decode: Decode,
    token: Callable[[int], str | None],
    letters: Mapping[str, int],
    known: dict[int, str],
) -> Detokenizer:
    """Returns the detokenizer of a tokenizer.json's decoder.

    Args:
      decoder: the object `decoder` of the file.
      decode: ids to text, by the tokenizer itself.
      token: the token of an id, None where there is none.
      letters: the letter that represents each byte in byte-level tokens, as letter -> byte.
      known: the text of tokens, kept over many sequences.
    """
    stages = _stages(decoder)
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"]:
        return Utf8(lambda id: _letters_to_bytes(token(id) or "", letters), "replace")
    if set(kinds) <= {"WordPiece", "Metaspace", "Replace", "Fuse"} and "Fuse" not in kinds[:-1]:
        return PerToken(decode, lambda id: token(id) is not None, known)
    strip = stages.pop() if kinds[-1] == "Strip" else None
    kinds = [stage["type"] for stage in stages]
    replaced = [stage for stage in stages if stage["type"] == "Replace"]
    simple = all("String" in stage["pattern"] for stage in replaced) and (strip is None or not strip["stop"])
    if simple and kinds == ["Replace"] * len(replaced) + ["ByteFallback", "Fuse"]:

        def piece(id: int) -> str | None:
            text = token(id)
            if text is not None:
                for stage in replaced:
                    text = text.replace(stage["pattern"]["String"], stage["content"])
            return text

        return ByteFallback(piece, ("", 0) if strip is None else (strip["content"], strip["start"]))
    return AllAtEnd(decode)


def _stages(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [stage for each in decoder["decoders"] for stage in _stages(each)]


def _letters_to_bytes(token: str, letters: Mapping[str, int]) -> bytes:
    """Returns the bytes of a byte-level token; its own UTF-8 where some letter represents no byte."""
    try:
        return bytes([letters[letter] for letter in token])
    except KeyError:
        return token.encode("utf-8")


def _character_size(first: int) -> int:
    """Returns how many bytes a character that begins with this byte has; 1 if no character begins with it."""
    return 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 1
