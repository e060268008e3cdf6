"""How rows of results are written: JSON lines, or their predictions as lines of text."""

import base64
import datetime
import decimal
import json
import math
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from meshway.framework.errors import UserError

PREDICTION = "prediction"
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


class Encoding(Protocol):
    """The files of one format: chunks, and what they make together."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        """Returns a file of these rows. Raises UserError, naming the chunk `name`, if the format cannot hold them."""
        ...

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        """Writes the rows of all files, one after the other, as one; holds one chunk at a time."""
        ...

    def is_final(self, path: Path) -> bool:
        """Returns whether a chunk's file can be a shard of the result as it is."""
        ...


class JsonLines:
    """One compact JSON object a line, keys in the order given; strict, so NaN and infinities are null."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        lines = [
            json.dumps(plain(row, strict=True), allow_nan=False, ensure_ascii=False, separators=_COMPACT)
            for row in rows
        ]
        # What is no character (half of a surrogate pair) is left as JSON's own escape.
        return "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        _concatenate(paths, file)

    def is_final(self, path: Path) -> bool:
        return True


class TextLines:
    r"""One prediction a line, None an empty one; `\`, newline and carriage return are written `\\`, `\n`, `\r`."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        return "".join(self._line(row) for row in rows).encode("utf-8", "backslashreplace")

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        _concatenate(paths, file)

    def is_final(self, path: Path) -> bool:
        return True

    def _line(self, row: Mapping[str, Any]) -> str:
        if PREDICTION not in row:
            raise UserError(f"a .txt output holds predictions, these results have none ({', '.join(row)}): use .jsonl")
        text = row[PREDICTION]
        if not isinstance(text, str | None):
            raise UserError(
                f"a .txt output holds one text an input, these results have {type(text).__name__}: use .jsonl"
            )
        return (text or "").translate(_ESCAPES) + "\n"


_COMPACT = (",", ":")
_PLAIN = {int, str, bool, type(None)}  # as they are: lists of tokens are long

# What Parquet holds and JSON has no word for.
_AS_JSON: dict[Any, Callable[[Any], Any]] = {
    datetime.date | datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: datetime.timedelta.total_seconds,
    decimal.Decimal | uuid.UUID: str,
    bytes: lambda value: base64.b64encode(value).decode(),
}


def plain(value: Any, strict: bool) -> Any:
    """Returns numpy's numbers and arrays as Python's, in dicts and lists too; `strict` is for JSON: what is not finite
    is None, dates and times are ISO 8601, durations seconds, decimals text, bytes base64.

    Raises:
      TypeError: a value is of a type that JSON has no word for.
    """
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) or not strict else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, strict) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _PLAIN else plain(item, strict) for item in value]
    for types, as_json in _AS_JSON.items():
        if isinstance(value, types):
            return as_json(value) if strict else value
    raise TypeError(f"a result cannot hold a {type(value).__name__}: {value!r}")


def _concatenate(paths: Sequence[Path], file: BinaryIO) -> None:
    for path in paths:
        with open(path, "rb") as chunk:
            shutil.copyfileobj(chunk, file, 1 << 20)
