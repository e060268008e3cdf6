"""Rows of results as Parquet: one schema over all chunks, found as they come."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from meshway.framework.errors import UserError, first_line
from meshway.framework.inference.bulk.arrow import import_arrow
from meshway.framework.inference.bulk.rows import plain

_COMPRESSION = "zstd"


class ParquetRows:
    """Parquet files: a row group a chunk, columns in the order in which they first appear, missing values null.

    The types of the first chunk hold for all, but a column that was always null or a list always empty takes the
    type of its first values, integers among floats become floats, and columns may be added.
    """

    def __init__(self, committed: Sequence[Path]) -> None:
        """Begins with the schema of the chunks that are there, in order. Raises UserError without pyarrow."""
        self._arrow, self._parquet = import_arrow()
        self._schema = self._arrow.schema([])
        for path in committed:
            self._schema = self._unified(self._parquet.read_schema(path), path.name)

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        """Returns a file of these rows.

        Raises:
          UserError: a column holds values of two types, in this chunk or between it and those before.
        """
        values = [_whole_text(plain(row, strict=False)) for row in rows]
        columns = {key: self._column(key, values, name) for key in dict.fromkeys(key for row in values for key in row)}
        table = self._arrow.table(columns)
        content = io.BytesIO()
        try:
            self._parquet.write_table(table, content, row_group_size=max(len(rows), 1), compression=_COMPRESSION)
        except self._arrow.ArrowException as error:
            raise UserError(f"{name}: Parquet cannot hold these results ({first_line(error)}): use .jsonl") from error
        # As it is read back: of what a list holds, Parquet has its own name.
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
                f"{name}: column {key!r} has no one type that Parquet knows ({first_line(error)}): use .jsonl"
            ) from error

    def _unified(self, schema: Any, name: str) -> Any:
        try:
            return self._arrow.unify_schemas([self._schema, schema], promote_options="permissive")
        except self._arrow.ArrowException as error:
            raise UserError(
                f"{name}: a column has another type than in the chunks before ({first_line(error)}): use .jsonl"
            ) from error

    def _cast(self, table: Any, path: Path) -> Any:
        """Returns the table with all columns of the schema, as it has them."""
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


def _whole_text(value: Any) -> Any:
    """Returns the value with what is no character (half of a surrogate pair) written as an escape."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_whole_text(key): _whole_text(item) for key, item in value.items()}
    return [_whole_text(item) for item in value] if isinstance(value, list) else value
