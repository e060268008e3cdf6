"""One record of an input: its fields, or why it has none."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Record:
    """What one line of a file, or one row of a table, holds.

    Attributes:
      index: its place in the whole input, from 0; records with a problem count.
      values: its fields by name, {} where it has a problem.
      place: where it was read, for people: `questions.jsonl:17` (lines from 1), `x.parquet row 3` (rows from 1).
      raw: what was read, without the end of the line, for digests. A TSV line comes after the names of its
        columns, which change its meaning; of a Parquet row it is its JSON, keys sorted. It never holds a newline,
        but for the one between the names and the line of TSV.
      ids: token ids of fields, where they are known: of a task's examples.
      problem: why it cannot be used, such as `not JSON: Expecting value at column 5`; "" where it can.
    """

    index: int
    values: Mapping[str, Any]
    place: str
    raw: bytes
    problem: str = ""
    ids: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
