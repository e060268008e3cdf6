"""What one line of JSON lines, of a table by tabs, or of plain text holds."""

import json
from collections.abc import Callable, Sequence
from typing import Any

Parser = Callable[[str], dict[str, Any]]  # raises ValueError, its text the problem of the line

_DEEPEST = 40  # lists and objects in each other: what Parquet holds too (its schema has two levels a list, 100 in all)

INPUTS = "inputs"  # the field of what is only text
_KINDS = {list: "a list", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}


def parse_json(line: str) -> dict[str, Any]:
    """Returns the object of a line; a string alone is its field `inputs`. Strict: NaN and Infinity are not JSON.

    Raises:
      ValueError: the line is not JSON, or another kind of value.
    """
    if not line.strip():
        raise ValueError("an empty line, not an object")
    try:
        value = json.loads(line, parse_constant=_refuse)
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
    """Returns the line as the field `inputs`, an empty one too."""
    return {INPUTS: line}


def tsv_parser(columns: Sequence[str]) -> Parser:
    """Returns the parser of lines that hold a cell of text for each column, a tab between them.

    There is no quoting: a quotation mark is a character like others, and cells hold neither tabs nor newlines.
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


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")
