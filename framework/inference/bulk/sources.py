"""What a job reads: records of files, globs or standard input, one at a time."""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from meshway.framework.counting import count_of
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.bulk.input_files import check_format, find_files, format_of
from meshway.framework.inference.bulk.line_source import LineSource
from meshway.framework.inference.bulk.lines import STDIN, read_again
from meshway.framework.inference.bulk.parquet_source import ParquetSource
from meshway.framework.inference.bulk.record import Record


class Source(Protocol):
    """Records in a fixed order, as often as asked for (standard input: once)."""

    @property
    def description(self) -> str:
        """What is read, for people and to tell one input from another: names, format, number of files, bytes."""
        ...

    @property
    def total(self) -> int | None:
        """About how many records there are, for an estimate of the time; None where nobody knows."""
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from place `start` on, holding few of them at a time.

        Raises UserError where the input cannot be read on, or has no record at all.
        """
        ...


def open_source(where: str, format: str | None = None, columns: Sequence[str] = ()) -> Source:
    """Opens an input.

    Formats: 'jsonl', one JSON object a line, or a string, which is then the field `inputs`; 'tsv', cells of text with
    a tab between them and no quoting, under a header line; 'text', lines that are the field `inputs`; 'parquet'. What
    is wrong with a single record is its `problem`; what is wrong with the whole is raised here, as far as the first
    lines of files show it.

    Args:
      where: a file, a glob (its files in the order of their names) or "-" for standard input. Lines may be compressed
        (`.gz`).
      format: the format; None goes by the suffix (`.jsonl`, `.json`, `.ndjson`, `.tsv`, `.txt`, `.text`, `.parquet`)
        and takes standard input for JSON lines.
      columns: the names of TSV columns, in files without a header; or which columns of Parquet files to read.

    Raises:
      UserError: there is no such file or format, a file cannot be read or is of another kind, headers differ.
    """
    if where == STDIN:
        format = format or "jsonl"
        check_format(format)
        if format == "parquet":
            raise UserError("Parquet cannot be read from standard input: give the file's name")
        return LineSource([STDIN], format, columns, f"standard input ({format})")
    paths = find_files(str(local_path(where)))
    format = format_of(paths, format)
    size = sum(os.path.getsize(path) for path in paths if read_again(path))
    files = "" if paths == [where] else f"{count_of(len(paths), 'file')}, "
    description = f"{where} ({files}{format}, {size:,} bytes)"
    if format == "parquet":
        return ParquetSource(paths, columns, description)
    return LineSource(paths, format, columns, description)
