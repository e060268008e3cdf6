"""Lines of bytes from a file, a gzip file or standard input, without holding more than one."""

import contextlib
import gzip
import os
import stat
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.input_files import COMPRESSED

STDIN = "-"
_LONGEST = 1 << 28  # bytes of a line; what is longer has another format than it is read as
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1\x15"


def read_lines(path: str) -> Iterator[bytes]:
    r"""Yields each line without its end, which is `\n` or `\r\n`, and the first without a byte order mark.

    Args:
      path: a file, decompressed where it ends in `.gz`, or "-" for standard input.

    Raises:
      UserError: it cannot be read on, or begins as another kind of file does.
    """
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(_LONGEST):
                number += 1
                if number == 1:
                    _refuse_other_kinds(line, path)
                    line = line.removeprefix(_BOM)
                if line.endswith(b"\n"):
                    line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
                elif len(line) == _LONGEST:
                    raise UserError(f"{place(path, number)} is longer than {_LONGEST >> 20} MiB: not a file of lines?")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        where = f"{shown(path)}, after line {number}" if number else shown(path)
        raise UserError(f"cannot read {where}: {getattr(error, 'strerror', None) or error}") from error


def read_again(path: str) -> bool:
    """Returns whether `path` can be opened several times, which standard input and pipes cannot."""
    return path != STDIN and stat.S_ISREG(os.stat(path).st_mode)


def shown(path: str) -> str:
    """Returns how messages name it."""
    return "<stdin>" if path == STDIN else path


def place(path: str, number: int) -> str:
    """Returns how messages name line `number`, from 1."""
    return f"{shown(path)}:{number}"


def _opened(path: str) -> contextlib.AbstractContextManager[BinaryIO | gzip.GzipFile]:
    if path == STDIN:
        return contextlib.nullcontext(sys.stdin.buffer)  # stays open
    return gzip.open(path, "rb") if path.endswith(COMPRESSED) else open(path, "rb")


def _refuse_other_kinds(head: bytes, path: str) -> None:
    if head.startswith(_PARQUET):
        raise UserError(f"{shown(path)} is a Parquet file, not one of lines: give --format=parquet")
    if head.startswith(_GZIP):
        advice = "pipe it through gunzip" if path == STDIN else f"its name must end in {COMPRESSED}"
        raise UserError(f"{shown(path)} is compressed by gzip: {advice}")
    if head.startswith(_UTF_16):
        raise UserError(f"{shown(path)} is UTF-16: convert it to UTF-8 (iconv -f utf-16 -t utf-8)")
