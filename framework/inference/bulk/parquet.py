"""Parquet inputs and outputs, which need pyarrow."""

import contextlib
import functools
import io
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from meshway.framework.errors import UserError, did_you_mean, first_line
from meshway.framework.inference.bulk.batches import plain
from meshway.framework.inference.bulk.inputs import Record, Wanted, every

_COMPRESSION = "zstd"
_BATCH = 1024  # rows converted to Python at once


def import_arrow() -> tuple[types.ModuleType, types.ModuleType]:
    """Returns the modules pyarrow and pyarrow.parquet. Raises UserError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files are read and written by pyarrow, which is not installed: pip install 'meshway[parquet]', "
            "or use JSON lines"
        ) from error
    return pyarrow, pyarrow.parquet


class ParquetRows:
    """Parquet files: a row group for each chunk, columns in the order of first appearance, missing values null.

    The types of the first chunk hold for all, except that a column of nulls or empty lists takes the type of its first
    values, integers among floats become floats, and columns may be added.
    """

    def __init__(self, committed: Sequence[Path]) -> None:
        """Starts from the schema of the committed chunks, in order. Raises UserError without pyarrow."""
        self._arrow, self._parquet = import_arrow()
        self._schema = self._arrow.schema([])
        for path in committed:
            self._schema = self._unified(self._parquet.read_schema(path), path.name)

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        """Returns a file of these rows.

        Raises:
          UserError: a column has values of two types, in this chunk or in this one and those before.
        """
        values = [_whole_text(plain(row, strict=False)) for row in rows]
        columns = {key: self._column(key, values, name) for key in dict.fromkeys(key for row in values for key in row)}
        table = self._arrow.table(columns)
        content = io.BytesIO()
        try:
            self._parquet.write_table(table, content, row_group_size=max(len(rows), 1), compression=_COMPRESSION)
        except self._arrow.ArrowException as error:
            raise UserError(f"{name}: Parquet cannot hold these results ({first_line(error)}): use .jsonl") from error
        # Read back, since Parquet renames the element field of lists.
        self._schema = self._unified(self._parquet.read_schema(content), name)
        return content.getvalue()

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        with self._parquet.ParquetWriter(file, self._schema, compression=_COMPRESSION) as writer:
            for path in paths:
                table = self._cast(self._parquet.read_table(path), path)
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)

    def is_final(self, path: Path) -> bool:
        return self._parquet.read_schema(path).equals(self._schema)

    def _column(self, key: str, rows: Sequence[Mapping[str, Any]], name: str) -> Any:
        try:
            return self._arrow.array([row.get(key) for row in rows])
        except (self._arrow.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{name}: column {key!r} has no single type that Parquet supports ({first_line(error)}): use .jsonl"
            ) from error

    def _unified(self, schema: Any, name: str) -> Any:
        try:
            return self._arrow.unify_schemas([self._schema, schema], promote_options="permissive")
        except self._arrow.ArrowException as error:
            raise UserError(
                f"{name}: a column has another type than in the chunks before ({first_line(error)}): use .jsonl"
            ) from error

    def _cast(self, table: Any, path: Path) -> Any:
        """Returns the table with the columns and types of the whole schema."""
        columns = []
        for field in self._schema:
            try:
                known = field.name in table.column_names
                empty = None if known else self._arrow.nulls(table.num_rows, field.type)
                columns.append(table[field.name].cast(field.type) if known else empty)
            except self._arrow.ArrowException as error:
                raise UserError(
                    f"{path.name}: column {field.name!r} cannot be {field.type}, as in other chunks "
                    f"({first_line(error)}): use .jsonl"
                ) from error
        return self._arrow.table(columns, schema=self._schema)


class ParquetSource:
    """Parquet files of the same columns, one after the other, a batch of rows of a row group at a time.

    Values are converted by pyarrow: text, integers, floats, lists, dicts, None for a missing value.

    Attributes:
      description: what is read, for messages.
    """

    def __init__(self, paths: Sequence[str], columns: Sequence[str], description: str) -> None:
        """Reads the footer of each file.

        Args:
          paths: the files.
          columns: which columns to read; () for all.
          description: what is read, for messages.

        Raises:
          UserError: pyarrow is not installed, a file is not Parquet, or it lacks requested columns, or columns of the
            first file.
        """
        self.description = description
        self._paths = list(paths)
        self._columns = list(columns) or None
        first: list[str] = []
        for path in self._paths:
            names = _columns_of(path)
            for name in columns:
                if name not in names:
                    raise UserError(f"{path} has no column {name!r}{did_you_mean(name, names)}")
            chosen = list(columns) or names
            first = first or chosen
            if sorted(chosen) != sorted(first):
                raise UserError(f"{path} has the columns {', '.join(chosen)}; {paths[0]} has {', '.join(first)}")

    @functools.cached_property
    def total(self) -> int:
        """The number of records."""
        count = 0
        for path in self._paths:
            with _reading(path), _parquet_file(path) as file:
                count += file.metadata.num_rows
        return count

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on; files and row groups before it are not read. `raw` is made of what
        was parsed, so all are.

        Raises:
          UserError: there is no record at all (also before `start`), or a file cannot be read.
        """
        first = 0
        for path in self._paths:
            with _reading(path), _parquet_file(path) as file:
                group_first = first
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if group_first + count > start:
                        yield from self._group(file, group, path, first, group_first, start)
                    group_first += count
                first = group_first
        if not first:
            raise UserError(f"the input is empty: {self.description}")

    def _group(
        self, file: Any, group: int, path: str, file_first: int, group_first: int, start: int
    ) -> Iterator[Record]:
        """Yields the records of one row group from index `start` on; its first row is record `group_first`."""
        index = group_first
        for batch in self._batches(file, group, path):
            skip = min(max(start - index, 0), batch.num_rows)
            index += skip
            for values, problem in _rows(batch.slice(skip)):
                canonical = "" if problem else json.dumps(values, sort_keys=True, ensure_ascii=False, default=repr)
                raw = (canonical or problem).encode("utf-8", "backslashreplace")
                yield Record(index, values, f"{path} row {index - file_first + 1}", raw, problem)
                index += 1

    def _batches(self, file: Any, group: int, path: str) -> Iterator[Any]:
        """Yields the rows of a row group in batches, which are halved while a nested column exceeds Arrow's limit of
        2 GiB."""
        arrow, _ = import_arrow()
        size, done = _BATCH, 0
        while True:
            first = 0
            try:
                for batch in _read_batches(file, size, group, self._columns):
                    known, first = min(max(done - first, 0), batch.num_rows), first + batch.num_rows
                    if known < batch.num_rows:
                        done = first
                        yield batch.slice(known)
                return
            except arrow.ArrowNotImplementedError as error:
                if size == 1:
                    column = self._too_large(file, group)
                    raise UserError(
                        f"{path}: column {column!r} holds too much in one row to be read ({first_line(error)})"
                    ) from error
                size //= 2

    def _too_large(self, file: Any, group: int) -> str:
        """Returns the first column that cannot be read row by row."""
        arrow, _ = import_arrow()
        for name in self._columns or file.schema_arrow.names:
            try:
                for _ in _read_batches(file, 1, group, [name]):
                    pass
            except arrow.ArrowNotImplementedError:
                return name
        return "?"


def _read_batches(file: Any, size: int, group: int, columns: Sequence[str] | None) -> Iterator[Any]:
    return file.iter_batches(size, row_groups=[group], columns=columns)


def _columns_of(path: str) -> list[str]:
    with _reading(path), _parquet_file(path) as file:
        names = list(file.schema_arrow.names)
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"{path} has two columns {name!r}")
    return names


def _parquet_file(path: str) -> Any:
    _, parquet = import_arrow()
    return parquet.ParquetFile(path, pre_buffer=False)  # pre-buffering would hold a whole row group


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turns pyarrow's errors about a file into UserErrors."""
    arrow, _ = import_arrow()
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _rows(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (fields, "") or ({}, problem) for each row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            yield _row(batch.slice(number, 1))
        return
    for row in rows:
        yield row, ""


def _row(batch: Any) -> tuple[dict[str, Any], str]:
    """Returns (fields, "") or ({}, problem) of a batch of one row; the problem names the column."""
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            return {}, f"column {name!r} has a value that Python cannot hold: {first_line(error)}"
    return values, ""


def _whole_text(value: Any) -> Any:
    """Returns the value with text that is not Unicode (half of a surrogate pair) escaped."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_whole_text(key): _whole_text(item) for key, item in value.items()}
    return [_whole_text(item) for item in value] if isinstance(value, list) else value
