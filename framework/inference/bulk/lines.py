"""Inputs with a record on each line: JSON lines, TSV or plain text, from files, gzip files or standard input."""

import contextlib
import functools
import gzip
import json
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.inputs import COMPRESSED, Record, Wanted, every

STDIN = "-"
_LONGEST = 1 << 28  # bytes of a line; a longer one suggests that the file has another format
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
_PARQUET = b"PAR1\x15"
_QUICKLY_COUNTED = 2**31  # bytes; their lines are counted in a few seconds

Parser = Callable[[str], dict[str, Any]]  # raises ValueError, its text the problem of the line

_DEEPEST = 40  # nested lists and objects: Parquet's limit is 100 levels of a schema, two for each list

INPUTS = "inputs"  # the field of plain text
_KINDS = {list: "a list", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


class LineSource:
    """Files of lines, one after the other, read once for each call of `records`.

    UTF-8. Empty lines at the end of a JSON lines or TSV file are ignored; elsewhere they are records with a problem.

    Attributes:
      description: what is read, for messages.
    """

    def __init__(self, paths: Sequence[str], format: str, columns: Sequence[str], description: str) -> None:
        """Opens each file that can be opened again, to find problems early.

        Args:
          paths: the files, "-" for standard input.
          format: 'jsonl', 'tsv' or 'text'.
          columns: the columns of TSV files without a header; () if their first line names them.
          description: what is read, for messages.

        Raises:
          UserError: a file cannot be read, is of another kind, or its header cannot be used.
        """
        if columns and format != "tsv":
            raise UserError(f"columns name the cells of tsv files, and choose those of parquet; {format} has none")
        self.description = description
        self._paths = list(paths)
        self._format = format
        self._columns = list(columns)
        self._first_header: tuple[list[str], str] | None = None
        self._spent = False
        if self._columns:
            _check_columns(self._columns, "columns")
        for path in self._paths:
            if read_again(path):
                next(self._open(path)[2], None)

    @functools.cached_property
    def total(self) -> int | None:
        """The approximate number of records, by counting lines; None if that takes long or is impossible."""
        counted = all(read_again(path) and not path.endswith(".gz") for path in self._paths)
        if not counted or sum(os.path.getsize(path) for path in self._paths) > _QUICKLY_COUNTED:
            return None
        headers = len(self._paths) if self._format == "tsv" and not self._columns else 0
        return max(0, sum(_num_lines(path) for path in self._paths) - headers)

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on; those before, and those not `wanted`, are not parsed.

        Raises:
          UserError: there is no record at all (also before `start`), a file cannot be read, or standard input is read
            a second time.
        """
        index = 0
        for path in self._paths:
            header, parse, lines = self._open(path)
            for number, line in lines:
                if index >= start:
                    raw = header + b"\n" + line if header else line
                    values, problem = _parsed(line, parse) if wanted(index) else ({}, "")
                    yield Record(index, values, place(path, number), raw, problem)
                index += 1
        if not index:
            raise UserError(f"the input is empty: {self.description}")

    def _open(self, path: str) -> tuple[bytes, Parser, Iterator[tuple[int, bytes]]]:
        """Returns (names of its columns for TSV, parser of a line, the numbered lines that are records)."""
        if path == STDIN:
            if self._spent:
                raise UserError("standard input can be read only once: save it as a file first")
            self._spent = True
        lines = enumerate(read_lines(path), 1)
        if self._format == "text":
            return b"", parse_text, lines
        if self._format == "jsonl":
            return b"", parse_json, _without_blank_end(_refuse_document(lines, path), bytes.strip)
        names = self._columns or self._header(next(lines, None), path)
        # A line of tabs is a row of empty cells.
        return "\t".join(names).encode(), tsv_parser(names), _without_blank_end(lines, bytes)

    def _header(self, first: tuple[int, bytes] | None, path: str) -> list[str]:
        """Returns the columns that a file's first line names, checked to be the same in all files; [] if it is
        empty."""
        if first is None:
            return []
        try:
            names = first[1].decode().split("\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{place(path, 1)}: the header is not UTF-8") from error
        _check_columns(names, place(path, 1))
        if self._first_header is None:
            self._first_header = (names, shown(path))
        known, where = self._first_header
        if known != names:
            raise UserError(
                f"{place(path, 1)}: the header ({', '.join(names)}) is not that of {where} ({', '.join(known)}); "
                "give columns if files have no header"
            )
        return names


def read_lines(path: str) -> Iterator[bytes]:
    r"""Yields each line without its end, which is `\n` or `\r\n`, and the first without a byte order mark.

    Args:
      path: a file, decompressed where it ends in `.gz`, or "-" for standard input.

    Raises:
      UserError: it cannot be read, or begins like another kind of file.
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
    """Returns the name of a file in messages."""
    return "<stdin>" if path == STDIN else path


def place(path: str, number: int) -> str:
    """Returns the name of line `number`, from 1, in messages."""
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


def parse_json(line: str) -> dict[str, Any]:
    """Returns the object of a line; a string becomes the field `inputs`. Strict: NaN and Infinity are not JSON.

    Raises:
      ValueError: the line is not JSON, or another kind of value.
    """
    if not line.strip():
        raise ValueError("an empty line, not an object")
    try:
        value = json.loads(line, parse_constant=_refuse, object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if isinstance(value, dict):
        if line.count("[") + line.count("{") > _DEEPEST:
            _refuse_deep(value)
        return value
    if isinstance(value, str):
        return {INPUTS: value}
    raise ValueError(f"{_KINDS[type(value)]}, not an object")


def parse_text(line: str) -> dict[str, Any]:
    """Returns the line as the field `inputs`, even if it is empty."""
    return {INPUTS: line}


def tsv_parser(columns: Sequence[str]) -> Parser:
    """Returns the parser of lines with a cell of text for each column, separated by tabs.

    There is no quoting: quotation marks have no special meaning, and cells contain neither tabs nor newlines.
    """
    names = list(columns)

    def parse(line: str) -> dict[str, Any]:
        if not line:
            raise ValueError(f"an empty line, not {_cells(len(names))}")
        cells = line.split("\t")
        if len(cells) != len(names):
            raise ValueError(f"{_cells(len(cells))}, not {len(names)} ({', '.join(names)})")
        return dict(zip(names, cells, strict=True))

    return parse


def _refuse_deep(fields: dict[str, Any]) -> None:
    """Raises ValueError for a field that is nested more deeply than results are written."""
    for name, field in fields.items():
        level, depth = [field], 0
        while level := [each for each in level if isinstance(each, dict | list)]:
            depth += 1
            if depth > _DEEPEST:
                raise ValueError(f"field {name!r} is nested more than {_DEEPEST} deep")
            level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object; raises ValueError for a field that it has twice, of which one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def _num_lines(path: str) -> int:
    with open(path, "rb") as file:
        count, last = 0, b"\n"
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _parsed(line: bytes, parse: Parser) -> tuple[dict[str, Any], str]:
    """Returns (fields, "") or ({}, what is wrong)."""
    try:
        return parse(line.decode()), ""
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
    except ValueError as error:
        return {}, str(error)


def _without_blank_end(
    lines: Iterator[tuple[int, bytes]], content: Callable[[bytes], bytes]
) -> Iterator[tuple[int, bytes]]:
    """Yields all lines except those without content at the end."""
    blank = []
    for line in lines:
        if not content(line[1]):
            blank.append(line)
            continue
        yield from blank
        blank.clear()
        yield line


def _refuse_document(lines: Iterator[tuple[int, bytes]], path: str) -> Iterator[tuple[int, bytes]]:
    """Yields all lines; raises UserError if the first shows that a JSON value spans several."""
    for number, line in lines:
        if number == 1 and line.strip() in (b"[", b"{"):
            raise UserError(
                f"{shown(path)} is one JSON value over several lines, not one object on each line "
                "(jq -c '.[]' converts a list to lines)"
            )
        yield number, line


def _check_columns(names: Sequence[str], where: str) -> None:
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{where}: column {number} has no name")
        if name in names[: number - 1]:
            raise UserError(f"{where}: column {number} is named {name!r}, as one before it")
