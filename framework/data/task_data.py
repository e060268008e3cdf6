"""What the data sources share: arguments, vocabularies, preprocessors on other records, tasks not cached yet."""

import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from meshway.framework.data import cached_task, seqio_adapter, seqio_caches, seqio_sources, seqio_steps
from meshway.framework.data.cache.fingerprint import qualified_name
from meshway.framework.data.objective import Converter, FeatureInfo, Objective, Spec, TaskInfo
from meshway.framework.data.rows.examples import TENSORFLOW, Examples, First, Stepped
from meshway.framework.data.seqio_adapter import task_errors
from meshway.framework.data.seqio_caches import SeqioCache
from meshway.framework.data.seqio_steps import declared
from meshway.framework.data.vocabularies import check_named, of_seqio
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError, did_you_mean


def check_arguments(kind: str, batch_size: Any, seed: Any, eval_examples: Any) -> None:
    """Raises UserError, naming the argument of data source `kind`, unless these are usable numbers."""
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{kind}.{name} must be a whole number of at least {least}, not {value!r}")
    if eval_examples is not None and eval_examples < 1:
        raise UserError(f"{kind}.eval_examples must be at least 1 or None (all), not {eval_examples!r}")


def module_names(module: str | Sequence[str] | None) -> list[str]:
    """Returns the modules that a recipe names to register tasks: one, several or none."""
    return [module] if isinstance(module, str) else list(module or ())


def vocabularies_of(
    name: str, tasks: Sequence[Any], converter: Converter, named: Mapping[str, Any]
) -> dict[str, Vocabulary]:
    """Returns the vocabulary of each feature that the converter reads and a seqio task declares.

    Raises:
      UserError: a vocabulary cannot be loaded, lacks an EOS that its task appends, or is not the one the recipe names.
    """
    for task in tasks:
        seqio_steps.check_eos(task)
    with task_errors(name, "vocabulary"):
        texts = {feature for task in tasks for feature, info in declared(task).items() if info.vocabulary is not None}
        features = {feature: value for task in tasks for feature, value in task.output_features.items()}
        read = [feature for feature in converter.task_features if feature in texts]
        found = {feature: of_seqio(features[feature].vocabulary) for feature in read}
    check_named(name, {feature: features[feature].vocabulary for feature in read}, named)
    return found


def framing_of(
    vocabularies: Mapping[str, Vocabulary], start: Sequence[int] | None, stop_ids: Sequence[int] | None
) -> Framing | None:
    """Returns the ids that start and end a decoder's texts; None if there are no `targets`.

    Args:
      vocabularies: by feature.
      start: the recipe's start ids; None takes those of the vocabulary of `targets`.
      stop_ids: ids that end a prediction, beside the EOS of that vocabulary, with which tasks end their targets.

    Raises:
      UserError: the vocabulary does not have these ids.
    """
    if "targets" not in vocabularies:
        return None
    targets = vocabularies["targets"]
    own = () if targets.eos_id is None else (targets.eos_id,)
    framing = Framing.of(targets, start, stop_ids)
    return dataclasses.replace(framing, stop=tuple(dict.fromkeys((*framing.stop, *own))))


def with_split(tasks: Mapping[str, Sequence[str]], split: str, purpose: str, name: str) -> list[str]:
    """Returns which of `tasks`, {name: its splits}, have `split`, and prints which do not.

    Raises:
      UserError: none of the tasks of mixture `name` has it.
    """
    having = [task for task, splits in tasks.items() if split in splits]
    if not having:
        known = sorted({known for splits in tasks.values() for known in splits})
        raise UserError(f"{name!r} has no split {split!r} for {purpose}; it has {known}{did_you_mean(split, known)}")
    if lacking := [task for task in tasks if task not in having]:
        print(f"data: {purpose} leaves out {', '.join(lacking)}: no split {split!r}", file=sys.stderr)
    return having


_MEASURED = 1_000_000  # examples of a task


def say_cut(name: str, examples: Examples, objective: Objective, read: Sequence[str]) -> None:
    """Prints how many examples of a task are longer than its lengths, and what share of its tokens no row shows.

    Args:
      name: the task.
      examples: with their sizes; of more than a million, the first million are looked at.
      objective: what cuts them, or leaves them out.
      read: the features that it reads.
    """
    if not objective.row_lengths:
        return
    count = min(len(examples), _MEASURED)
    first = examples.first(count) if isinstance(examples, Stepped) else First(examples, count)
    lost = objective.lost(first.sizes) + (first.lost if isinstance(first, Stepped) else 0)
    cut = int((lost > 0).sum())
    if not cut:
        return
    whole = first.whole if isinstance(first, Stepped) else first.sizes
    tokens = sum(int(sizes.sum(dtype=np.int64)) for feature, sizes in whole.items() if feature in read)
    of = "" if count == len(examples) else "the first "
    print(
        f"data: task {name!r}: {cut:,} of {of}{count:,} examples are longer than TASK_FEATURE_LENGTHS, and "
        f"{100 * int(lost.sum()) / max(tokens, 1):.2g} % of all tokens in no row: raise them, or "
        "choose the converter's `overlong`",
        file=sys.stderr,
    )


def trims(steps: Sequence[Callable[..., Any]]) -> bool:
    """Returns whether preprocessors have seqio's append_eos_after_trim among them, and none needs `sequence_length`."""
    return seqio_adapter.import_seqio().preprocessors.append_eos_after_trim in steps and not any(
        map(_needs_lengths, steps)
    )


def _needs_lengths(step: Callable[..., Any]) -> bool:
    parameter = inspect.signature(step).parameters.get("sequence_length")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def check_measurable(name: str, steps: Sequence[Callable[..., Any]], lengths: Mapping[str, int]) -> None:
    """Raises UserError where `lengths` are none, and a preprocessor of task `name` needs some: then its longest example
    cannot be measured (as seqio's Evaluator has it)."""
    for step in () if lengths else steps:
        if _needs_lengths(step):
            raise UserError(
                f"task {name!r}: its preprocessor {qualified_name(step)!r} needs sequence_length, so its longest "
                "example cannot be measured: give EVAL_FEATURE_LENGTHS"
            )


_KINDS: tuple[tuple[type, str], ...] = ((bool, "bool"), (int, "int64"), (float, "float32"), (str, "bytes"))


def preprocess(
    name: str, modules: Sequence[str], lengths: Mapping[str, int]
) -> Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]:
    """Returns a function: (fields of records) -> features of one example each, token ids as lists.

    Args:
      name: the registered task.
      modules: names of the modules that register it.
      lengths: passed to its preprocessors as `sequence_length`.

    Raises:
      UserError: there is no such task, it is a mixture, or it appends an EOS that a vocabulary lacks. The returned
        function raises ValueError where a preprocessor fails, or makes more or fewer examples than there are records.
    """
    provider = seqio_adapter.find_provider(name, modules)
    tasks = seqio_adapter.subtasks(provider)
    if [task.name for task in tasks] != [name]:
        raise UserError(f"--preprocess={name} is a mixture; name one of its tasks: {[task.name for task in tasks]}")
    seqio_steps.check_eos(tasks[0])

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


_LOOKED_AT = 16  # examples read to find which features of a task are always empty


class Unread:
    """The stream of a task that is not cached, for a dry run: it has a spec and no batches.

    Args:
      spec: of the batches.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._spec)

    def state(self) -> dict[str, int]:
        """Returns the position at the start."""
        return {"batch": 0, "rows": 0}


class NotCached:
    """The examples of a split that is not cached, for a dry run: only their number, if it is known."""

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
    task: Any,
    split: str,
    converter: Converter,
    lengths: Mapping[str, int],
    start: Sequence[int],
    bos: Sequence[int],
    imported: SeqioCache | None = None,
) -> tuple[Objective, Examples, bool]:
    """Returns (the task's objective, examples that cannot be read, whether steps in TensorFlow come after the cache).

    Raises:
      UserError: a preprocessor fails when it is put together, the features are not what the task declares, or do not
        fit the converter.
    """
    if imported:
        seqio_caches.features(task, imported)
    else:
        seqio_steps.features(task, list(task.splits))
    online = seqio_steps.online_entries(task) == TENSORFLOW
    promised = seqio_steps.declared(task)
    info = TaskInfo(task.name, promised, tuple(start), bos=tuple(bos))
    try:
        objective = converter.bind(info, lengths)
    except UserError:
        # A text task in T5's style declares `inputs` that are always empty, which a converter may not read.
        empty = _empty(task, split, imported) - set(converter.task_features)
        if online or not empty:
            raise
        kept = {name: feature for name, feature in promised.items() if name not in empty}
        objective = converter.bind(TaskInfo(task.name, kept, tuple(start), frozenset(empty), tuple(bos)), lengths)
    whole = cached_task.bare_split(split)
    count = imported.count(whole) if imported else seqio_sources.source_count(task, whole)
    return objective, NotCached(count if count is None else len(cached_task.slice_of(split, count))), online


def _empty(task: Any, split: str, imported: SeqioCache | None) -> set[str]:
    """Returns the features that are empty in the first examples."""
    if imported:
        all_of_them = seqio_caches.examples(imported, task, cached_task.bare_split(split), 0, 1, 0, [])
    else:
        all_of_them = seqio_steps.cacheable(task, cached_task.bare_split(split), 0, 1)
    examples = list(itertools.islice(all_of_them, _LOOKED_AT))
    seqio_sources.release()
    names = set.intersection(*(set(example) for example in examples)) if examples else set()
    return {name for name in names if all(np.ndim(each[name]) and not len(each[name]) for each in examples)}
