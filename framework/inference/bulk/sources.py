"""What a job reads, one record at a time: files, globs, standard input, prompts of the command line, a task."""

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


class PromptSource:
    """Texts, each a record of the field `field`; a `Source`."""

    def __init__(self, prompts: Sequence[str], field: str = INPUTS) -> None:
        self._prompts, self._field = list(prompts), field
        self.description = f"{len(self._prompts)} given prompts"

    @property
    def total(self) -> int:
        """How many records there are."""
        return len(self._prompts)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from place `start` on."""
        for index, text in enumerate(self._prompts[start:], start):
            yield Record(index, {self._field: text}, f"prompt {index + 1}", json.dumps(text).encode())


_AT_ONCE = 64  # examples


class ReadableTask(Protocol):
    """A split of a task; `data.eval_task.TaskEvaluation` is one."""

    name: str

    @property
    def num_examples(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]: ...

    def text(self, feature: str, index: int) -> str: ...


class TaskSource:
    """The examples of tasks, one task after the other; a `Source`.

    A record holds the task's name, the example's number in it, `inputs` and `targets` as text, and, for what is
    computed, the very token ids that the task made.
    """

    def __init__(self, tasks: Sequence[ReadableTask], split: str, needed: Collection[str]):
        """Opens a split of tasks; those without the `needed` features are left out, which is said.

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
        """How many records there are."""
        return sum(task.num_examples for task in self._tasks)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from place `start` on."""
        first = 0
        for task in self._tasks:
            for begin in range(max(0, start - first), task.num_examples, _AT_ONCE):
                numbers = range(begin, min(begin + _AT_ONCE, task.num_examples))
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
