"""A registered task's preprocessors, run on records that come from elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_door, seqio_steps
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.errors import UserError

_KINDS: tuple[tuple[type, str], ...] = ((bool, "bool"), (int, "int64"), (float, "float32"), (str, "bytes"))


def preprocess(
    name: str, modules: Sequence[str], lengths: Mapping[str, int]
) -> Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]:
    """Returns (fields of records) -> features of examples, one each, token ids as lists.

    Args:
      name: the registered task.
      modules: what registers it.
      lengths: what its preprocessors see as `sequence_length`.

    Raises:
      UserError: there is no such task, or it is a mixture. What is returned raises ValueError where a preprocessor
        fails, or makes more or fewer examples than there are records.
    """
    provider = seqio_door.find_provider(name, modules)
    tasks = seqio_door.subtasks(provider)
    if [task.name for task in tasks] != [name]:
        raise UserError(f"--preprocess={name} is a mixture; name one of its tasks: {[task.name for task in tasks]}")

    def run(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        features = {field: _feature(field, [record.get(field) for record in records]) for field in _fields(records)}
        encoded = [
            {field: np.asarray(value.encode() if isinstance(value, str) else value) for field, value in record.items()}
            for record in records
        ]
        try:
            made = seqio_steps.online(tasks[0], encoded, features, 0, lengths, 0)
        except UserError as error:
            raise ValueError(str(error)) from error
        if len(made) != len(records):
            raise ValueError(
                f"the preprocessors of {name!r} make {len(made)} examples of {len(records)} records; only those that "
                "make one of each can be used here"
            )
        return [{field: _plain(value) for field, value in example.items()} for example in made]

    return run


def _fields(records: Sequence[Mapping[str, Any]]) -> list[str]:
    fields = list(records[0])
    for record in records:
        if set(record) != set(fields):
            raise ValueError(f"its fields are {sorted(record)}, and those of another record {sorted(fields)}")
    return fields


def _feature(field: str, values: Sequence[Any]) -> FeatureInfo:
    if all(isinstance(value, list) for value in values):
        return FeatureInfo(_kind(field, [each for value in values for each in value] or [0]), (None,))
    return FeatureInfo(_kind(field, values), ())


def _kind(field: str, values: Sequence[Any]) -> str:
    for kind, name in _KINDS:
        if all(type(value) is kind or (kind is float and type(value) is int) for value in values):
            return name
    raise ValueError(f"field {field!r} is {values[0]!r}: preprocessors take text, numbers, and lists of them")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    array = np.asarray(value)
    return array.tolist() if array.dtype.kind in "iufb" else value
