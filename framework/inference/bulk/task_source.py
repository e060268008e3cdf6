"""A task's examples as records: read by index, a few at a time."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.record import Record

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
