"""A task before it is cached: what a dry run can tell of it without writing anything."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from meshway.framework.data import seqio_steps
from meshway.framework.data.objective import Converter, Objective, Spec, TaskInfo
from meshway.framework.data.rows.examples import Examples
from meshway.framework.data.rows.online_steps import TENSORFLOW
from meshway.framework.errors import UserError

_LOOKED_AT = 16  # examples that tell which features of a task hold nothing


class Unread:
    """The stream of a task that is not cached: what its batches would be, and none of them.

    Args:
      spec: of the batches.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._spec)


class NotCached:
    """The examples of a split that is not cached: perhaps how many."""

    def __init__(self, count: int | None) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count or 0

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        self._refuse()

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Any]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError("a dry run reads no examples")


def open_task(
    task: Any, split: str, converter: Converter, lengths: Mapping[str, int], start: Sequence[int], bos: Sequence[int]
) -> tuple[Objective, Examples, bool]:
    """Returns (the task's objective, examples that cannot be read, whether steps in TensorFlow come after the cache).

    Raises:
      UserError: a preprocessor fails when it is put together, the features are not what the task declares, or do not
        fit the converter.
    """
    seqio_steps.features(task, list(task.splits))
    online = seqio_steps.online_entries(task) == TENSORFLOW
    promised = seqio_steps.declared(task)
    info = TaskInfo(task.name, promised, tuple(start), bos=tuple(bos))
    try:
        objective = converter.bind(info, lengths)
    except UserError:
        # A text task in T5's manner has `inputs` that are always empty, which a converter may not read.
        empty = _empty(task, split) - set(converter.task_features)
        if online or not empty:
            raise
        kept = {name: feature for name, feature in promised.items() if name not in empty}
        objective = converter.bind(TaskInfo(task.name, kept, tuple(start), frozenset(empty), tuple(bos)), lengths)
    return objective, NotCached(seqio_steps.source_count(task, split)), online


def _empty(task: Any, split: str) -> set[str]:
    """Returns the features that hold nothing in the first examples."""
    examples = list(itertools.islice(seqio_steps.cacheable(task, split, 0, 1), _LOOKED_AT))
    seqio_steps.release_sources()
    names = set.intersection(*(set(example) for example in examples)) if examples else set()
    return {name for name in names if all(np.ndim(each[name]) and not len(each[name]) for each in examples)}
