"""Sources of records for a job: files, globs, standard input, prompts of the command line, tasks."""

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.bulk.inputs import Record, check_format, find_files, format_of
from meshway.framework.inference.bulk.lines import INPUTS, STDIN, LineSource, read_again
from meshway.framework.inference.bulk.parquet import ParquetSource
from meshway.framework.terminal import count_of

_READ_AHEAD = 64  # examples


class Source(Protocol):
    """Records in a fixed order, which can be read any number of times (standard input: once)."""

    @property
    def description(self) -> str:
        """What is read, for messages and to distinguish inputs: names, format, number of files, bytes."""
        ...

    @property
    def total(self) -> int | None:
        """The approximate number of records, for an estimate of the time; None if unknown."""
        ...

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from index `start` on, with few of them in memory at a time.

        Raises:
          UserError: the input cannot be read, or has no record at all.
        """
        ...


def open_source(where: str, format: str | None = None, columns: Sequence[str] = ()) -> Source:
    """Opens an input.

    Formats: 'jsonl', on each line a JSON object, or a string, which becomes the field `inputs`; 'tsv', cells of text
    separated by tabs, without quoting, under a header line; 'text', each line the field `inputs`; 'parquet'. A problem
    of a single record is its `problem`; one of the whole input is raised here, if the first lines of files show it.

    Args:
      where: a file, a glob (its files sorted by name) or "-" for standard input. Line formats may be compressed
        (`.gz`).
      format: the format; None chooses by the suffix (`.jsonl`, `.json`, `.ndjson`, `.tsv`, `.txt`, `.text`,
        `.parquet`), and JSON lines for standard input.
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


class PromptSource:
    """A `Source` of texts, each a record with the field `field`."""

    def __init__(self, prompts: Sequence[str], field: str = INPUTS) -> None:
        self._prompts, self._field = list(prompts), field
        self.description = f"{len(self._prompts)} given prompts"

    @property
    def total(self) -> int:
        """The number of records."""
        return len(self._prompts)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from index `start` on."""
        for index, text in enumerate(self._prompts[start:], start):
            yield Record(index, {self._field: text}, f"prompt {index + 1}", json.dumps(text).encode())


class ReadableTask(Protocol):
    """A split of a task; `data.eval_task.TaskEvaluation` is one."""

    name: str

    @property
    def num_examples(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]: ...

    def text(self, feature: str, index: int) -> str: ...


class TaskSource:
    """A `Source` of the examples of tasks, one task after the other.

    A record has the task's name, the example's index in it, `inputs` and `targets` as text, and the token ids that the
    task made, from which predictions and scores are computed.
    """

    def __init__(self, tasks: Sequence[ReadableTask], split: str, needed: Collection[str]):
        """Opens a split of tasks; prints which are left out for lack of the `needed` features.

        Raises:
          UserError: no task has them.
        """
        self._tasks = [task for task in tasks if task.num_examples and set(needed) <= _features(task)]
        self.description = f"split {split!r} of {', '.join(task.name for task in self._tasks)}"
        lacking = ", ".join(task.name for task in tasks if task not in self._tasks)
        what = " and ".join(repr(name) for name in needed)
        if not self._tasks:
            raise UserError(f"split {split!r}: no task has examples with {what}: {lacking}")
        if lacking:
            print(f"data: {lacking} left out: no examples with {what}", file=sys.stderr)

    @property
    def total(self) -> int:
        """The number of records."""
        return sum(task.num_examples for task in self._tasks)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from index `start` on."""
        first = 0
        for task in self._tasks:
            for begin in range(max(0, start - first), task.num_examples, _READ_AHEAD):
                numbers = range(begin, min(begin + _READ_AHEAD, task.num_examples))
                for number, example in zip(numbers, task.read(numbers)):
                    yield _record(task, first + number, number, example)
            first += task.num_examples


def _features(task: ReadableTask) -> set[str]:
    return {name for name, value in task.read([0])[0].items() if _is_tokens(value) and len(value)}


def _record(task: ReadableTask, index: int, number: int, example: Mapping[str, Any]) -> Record:
    ids = {name: [int(t) for t in example[name]] for name in ("inputs", "targets") if _is_tokens(example.get(name))}
    values: dict[str, Any] = {"task": task.name, "example": number}
    values |= {name: task.text(name, number) for name in ids}
    raw = json.dumps([task.name, number, ids], sort_keys=True).encode()
    return Record(index, values, f"task {task.name!r} example {number}", raw, ids=ids)


def _is_tokens(value: Any) -> bool:
    return value is not None and np.ndim(value) == 1 and np.asarray(value).dtype.kind in "iu"
