"""Inputs of one record a line: JSON lines, tables by tabs, plain text."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.line_formats import Parser, parse_json, parse_text, tsv_parser
from meshway.framework.inference.bulk.lines import STDIN, place, read_again, read_lines, shown
from meshway.framework.inference.bulk.record import Record

_QUICKLY_COUNTED = 2**31  # bytes, whose lines are counted in a few seconds


class LineSource:
    """Files of lines, one after the other, read once for each call of `records`.

    UTF-8. Empty lines at the end of a JSON lines or TSV file are no records; in between they have a problem.

    Attributes:
      description: what is read, for people.
    """

    def __init__(self, paths: Sequence[str], format: str, columns: Sequence[str], description: str) -> None:
        """Opens each file that can be opened again, to see early what is wrong with it.

        Args:
          paths: the files, "-" for standard input.
          format: 'jsonl', 'tsv' or 'text'.
          columns: the columns of TSV files that have no header; () where their first line names them.
          description: what is read, for people.

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
        """About how many records there are, by the ends of lines; None where counting takes a while, or cannot be."""
        counted = all(read_again(path) and not path.endswith(".gz") for path in self._paths)
        if not counted or sum(os.path.getsize(path) for path in self._paths) > _QUICKLY_COUNTED:
            return None
        headers = len(self._paths) if self._format == "tsv" and not self._columns else 0
        return max(0, sum(_num_lines(path) for path in self._paths) - headers)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from place `start` on; those before are read past, not parsed.

        Raises:
          UserError: there is no record at all (also before `start`), a file cannot be read on, or standard input is
            read a second time.
        """
        index = 0
        for path in self._paths:
            header, parse, lines = self._open(path)
            for number, line in lines:
                if index >= start:
                    raw = header + b"\n" + line if header else line
                    values, problem = _parsed(line, parse)
                    yield Record(index, values, place(path, number), raw, problem)
                index += 1
        if not index:
            raise UserError(f"the input is empty: {self.description}")

    def _open(self, path: str) -> tuple[bytes, Parser, Iterator[tuple[int, bytes]]]:
        """Returns (names of its columns, where they matter, parser of a line, numbered lines that are records)."""
        if path == STDIN:
            if self._spent:
                raise UserError("standard input can be read only once: save it as a file first")
            self._spent = True
        lines = enumerate(read_lines(path), 1)
        if self._format == "text":
            return b"", parse_text, lines
        if self._format == "jsonl":
            return b"", parse_json, _not_blank_at_the_end(_not_a_document(lines, path), bytes.strip)
        names = self._columns or self._header(next(lines, None), path)
        # A line of tabs is a row of empty cells.
        return "\t".join(names).encode(), tsv_parser(names), _not_blank_at_the_end(lines, bytes)

    def _header(self, first: tuple[int, bytes] | None, path: str) -> list[str]:
        """Returns the columns that a file's first line names, the same in all files; an empty file has no rows."""
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
                "give columns where files have no header"
            )
        return names


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


def _not_blank_at_the_end(
    lines: Iterator[tuple[int, bytes]], content: Callable[[bytes], bytes]
) -> Iterator[tuple[int, bytes]]:
    """Yields all lines but the last ones, where these have no content."""
    blank = []
    for line in lines:
        if not content(line[1]):
            blank.append(line)
            continue
        yield from blank
        blank.clear()
        yield line


def _not_a_document(lines: Iterator[tuple[int, bytes]], path: str) -> Iterator[tuple[int, bytes]]:
    """Yields all lines, unless the first shows that values go on over several."""
    for number, line in lines:
        if number == 1 and line.strip() in (b"[", b"{"):
            raise UserError(
                f"{shown(path)} is one JSON value over several lines, not an object a line "
                "(jq -c '.[]' makes lines of a list)"
            )
        yield number, line


def _check_columns(names: Sequence[str], where: str) -> None:
    for number, name in enumerate(names, 1):
        if not name:
            raise UserError(f"{where}: column {number} has no name")
        if name in names[: number - 1]:
            raise UserError(f"{where}: column {number} is named {name!r}, as one before it")
