"""Checks for the tests of a task and of a model of your own.

    from meshway.launch import testing

    testing.check_task("mylab_translate", {"inputs": 64, "targets": 64}, module="mylab.tasks")
    testing.check_model("mine.gin", ["D_MODEL=32", "NUM_LAYERS=1"])

Each raises AssertionError with one message: what is wrong, where, the example, and the nearest right thing. Those of
models are in `model_checks.py`.
"""

import collections
import contextlib
import copy
import dataclasses
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_adapter, seqio_sources, seqio_steps
from meshway.framework.data.cache.builder import build
from meshway.framework.data.eval_task import EVAL_SEED, TaskEvaluation
from meshway.framework.data.features import EncoderDecoder, LanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.objective import Converter
from meshway.framework.data.rows.examples import TENSORFLOW, wrong_id
from meshway.framework.data.task_data import module_names, with_split
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Batch
from meshway.launch.model_checks import CHECKS, TeacherForced, asserted, check_model, raising, require

__all__ = ["CHECKS", "CheckedSplit", "TeacherForced", "check_model", "check_task"]

Example = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CheckedSplit:
    """What was seen of a split that is right.

    Attributes:
      task, split: which.
      examples: how many were looked at, after all preprocessors.
      truncated, skipped: how many of them do not fit `lengths`: read in part, or left out.
      metrics: what the task's metric functions make of its targets as predictions.
    """

    task: str
    split: str
    examples: int
    truncated: int
    skipped: int
    metrics: Mapping[str, float]


def check_task(
    name: str,
    lengths: Mapping[str, int] | None = None,
    num_examples: int = 32,
    module: str | Sequence[str] | None = None,
    split: str | None = None,
    converter: Converter | None = None,
    eos: bool = True,
) -> list[CheckedSplit]:
    """Checks a registered seqio task, or every leaf of a mixture.

    The task has this name; its preprocessors make examples, the same twice, with the features, dtypes and ranks that it
    declares, ids of their vocabularies, EOS where a feature has `add_eos`, and nothing empty; a cache holds the same;
    packed rows hold each example as it is alone; its metric functions take its targets as predictions.

    Args:
      name: as it is registered.
      lengths: TASK_FEATURE_LENGTHS, in tokens; None for the longest example.
      num_examples: records of each split's source that are read.
      module: name(s) of the Python module(s) whose import registers it.
      split: which; None for all.
      converter: what rows are made by; None for `EncoderDecoder`, or `LanguageModel` where there are no inputs.
      eos: whether features with `add_eos` must end with EOS; False for whole texts, to which an objective appends it.

    Raises:
      AssertionError: something is wrong with it.
    """
    with asserted():
        modules = module_names(module)
        tasks = seqio_adapter.subtasks(seqio_adapter.find_provider(name, modules))
        splits = {task.name: list(task.splits) for task in tasks}
        having = with_split(splits, split, "the check", name) if split else list(splits)
    found = []
    for task in tasks:
        if task.name in having:
            found += _check_leaf(task, [split] if split else splits[task.name], lengths, num_examples, converter, eos)
    return found


def _check_leaf(
    task: Any,
    splits: Sequence[str],
    lengths: Mapping[str, int] | None,
    num_examples: int,
    converter: Converter | None,
    eos: bool,
) -> list[CheckedSplit]:
    with (
        _first_records(task, num_examples) as few,
        tempfile.TemporaryDirectory() as folder,
        asserted(f" (task {task.name!r})", few.name, task.name),
    ):
        read = {split: _examples(few, split, lengths or {}) for split in splits}
        for split, examples in read.items():
            _check_examples(f"task {task.name!r}, split {split!r}", task, examples, eos)
        with contextlib.redirect_stdout(io.StringIO()):  # says what it caches
            build([few.name], [], folder, splits, num_shards=1, num_workers=1, progress=False)
        return [_check_rows(task, few, split, read[split], lengths, converter, folder) for split in splits]


@contextlib.contextmanager
def _first_records(task: Any, count: int) -> Iterator[Any]:
    """Registers, for a while, a copy of a task that has the first records of its source alone."""
    seqio = seqio_adapter.import_seqio()
    source = task.source

    def first(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        return seqio_sources.in_order(source, split, seed).take(count)

    few = copy.copy(task)
    name = f"{task.name}__being_checked"
    few._name, few._source = name, seqio.FunctionDataSource(first, splits=list(task.splits))
    few.__dict__.pop("splits", None)
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add_provider(name, few)
    try:
        yield few
    finally:
        seqio.TaskRegistry.remove(name)
        seqio_sources.release()


def _examples(task: Any, split: str, lengths: Mapping[str, int], seed: int = EVAL_SEED) -> list[Example]:
    """Returns the examples of a split after all preprocessors, not truncated; no cache is read."""
    kept = list(seqio_steps.cacheable(task, split, 0, 1))
    if not kept:
        return []
    features = seqio_steps.features(task, [split])
    try:
        return list(seqio_steps.online(task, kept, features, seqio_steps.divide_steps(task).online_from, lengths, seed))
    except UserError as error:
        raise UserError(f"{error}{'' if lengths else '; give `lengths` where a preprocessor reads them'}") from error
    finally:
        seqio_sources.release()


def _check_examples(where: str, task: Any, examples: Sequence[Example], eos: bool) -> None:
    """Checks features, dtypes, ranks, ids and EOS of examples after all preprocessors."""
    require(examples, f"{where} has no examples")
    empty = {name for name in task.output_features if all(not np.size(each.get(name, ())) for each in examples)}
    require(empty < task.output_features.keys(), f"{where}: {sorted(empty)} are empty in every example")
    for number, example in enumerate(examples):
        for name, feature in task.output_features.items():
            at = f"{where}, example {number}: feature {name!r}"
            if name not in example:
                require(not feature.required, f"{at} is missing; it has {sorted(example)}{did_you_mean(name, example)}")
                continue
            if name in empty:  # T5's texts declare `inputs` that they leave empty
                continue
            value = np.asarray(example[name])
            wanted, rank = feature.dtype.name, feature.rank
            dtype = "string" if value.dtype.kind in "OSU" else value.dtype.name
            require(dtype == wanted, f"{at} is {dtype}, and declared {wanted}")
            require(
                value.ndim == rank, f"{at} has rank {value.ndim}, shape {list(value.shape)}, and is declared {rank}"
            )
            require(value.size, f"{at} is empty")
            info = seqio_steps.declared(task)[name].vocabulary
            if info is None or rank != 1:
                continue
            problem = wrong_id(example, {name: info.size})
            require(not problem, f"{where}, example {number}: {problem}")
            if eos and feature.add_eos:
                require(
                    value[-1] == info.eos_id,
                    f"{at} ends with {value[-1]} and not with EOS ({info.eos_id}): append it "
                    "(seqio.preprocessors.append_eos), or declare the feature with add_eos=False",
                )


def _check_rows(
    task: Any,
    few: Any,
    split: str,
    examples: Sequence[Example],
    lengths: Mapping[str, int] | None,
    converter: Converter | None,
    folder: str,
) -> CheckedSplit:
    """Checks a split as it is read again, as its cache holds it, as rows hold it, and by its metric functions."""
    where = f"task {task.name!r}, split {split!r}"
    again = _examples(few, split, lengths or {})
    _assert_same(where, "is not the same when read again, with the same seed", examples, again)
    filled = {name for name in task.output_features if any(np.size(each.get(name, ())) for each in examples)}
    own = converter is None
    converter = converter or (EncoderDecoder() if {"inputs", "targets"} <= filled else LanguageModel())
    read = converter.task_features
    ids = [name for name in read if name in filled and task.output_features[name].rank == 1]
    longest = {name: max(len(each.get(name, ())) for each in examples) for name in ids}
    room = dict(lengths or longest)
    if isinstance(converter, LanguageModel):
        room = {name: size for name, size in room.items() if name in read or name not in task.output_features}
    if own and "targets" not in filled:
        raise AssertionError(f"{where} has no 'targets', only {sorted(filled)}: give the `converter` of its recipe")
    data = CachedData(few.name, room, 8, converter, eval_split=split, cache_dir=folder, num_workers=0)
    objective = data.open_task(data.tasks[0], split)[0]
    (evaluation,) = data.eval_tasks(split)
    trims = room if seqio_steps.online_entries(few) == TENSORFLOW else objective.trims
    cached = evaluation.read(range(evaluation.num_examples))
    _assert_same(where, "is not what its cache holds", _examples(few, split, trims), cached)
    _check_packing(where, evaluation)
    overlong = evaluation.overlong(evaluation.num_rows, evaluation.num_examples)
    return CheckedSplit(task.name, split, len(examples), *overlong, _metrics(where, evaluation, converter))


def _assert_same(where: str, what: str, ones: Sequence[Example], others: Sequence[Example]) -> None:
    require(len(ones) == len(others), f"{where} {what}: {len(ones)} examples, and {len(others)}")
    for number, (one, other) in enumerate(zip(ones, others, strict=True)):
        names = sorted(one.keys() | other.keys())
        differ = [name for name in names if not np.array_equal(one.get(name, ()), other.get(name, ()))]
        if differ:
            raise AssertionError(f"{where}, example {number}: feature {differ[0]!r} {what}")


def _check_packing(where: str, evaluation: TaskEvaluation) -> None:
    """Checks that packed rows have, segment by segment, what rows of one example each have."""
    packed = (each for batch, real in evaluation.batches() for row in range(real) for each in _segments(batch, row))
    left = collections.Counter(packed)
    for batch, indices in evaluation.score_batches():
        for row, index in enumerate(indices):
            for each in _segments(batch, row):
                require(left[each] > 0, f"{where}, example {index}: no segment of a packed row is what it is alone")
                left[each] -= 1
    require(not left.total(), f"{where}: packed rows have {left.total()} segments that no example has alone")


def _segments(batch: Batch, row: int) -> list[str]:
    """Returns what each segment of a row holds, encoder and decoder."""
    sides = [name.removesuffix("segment_ids") for name in batch if name.endswith("segment_ids")]
    count = max((int(np.max(batch[f"{side}segment_ids"][row])) for side in sides), default=0)
    return [
        repr(
            [
                (name, batch[name][row][batch[f"{side}segment_ids"][row] == segment].tolist())
                for side in sides
                for name in sorted(batch)
                if name.startswith(side) and not name.endswith("segment_ids")
            ]
        )
        for segment in range(1, count + 1)
    ]


def _metrics(where: str, evaluation: TaskEvaluation, converter: Converter) -> Mapping[str, float]:
    """Returns what metric functions make of targets as predictions, every target being of log-probability 0."""
    count = evaluation.num_examples
    predictions, tokens, aux = None, None, None
    if converter.can_predict and evaluation.has_metrics:
        ids = [np.asarray(each["targets"]) for each in evaluation.read(range(count))]
        tokens = np.zeros((count, max(map(len, ids))), np.int32)
        for row, each in zip(tokens, ids, strict=True):
            row[: len(each)] = each
        with raising(f"{where}: its postprocess_fn"):
            predictions = [evaluation.postprocess(number, each) for number, each in enumerate(ids)]
        aux = {"scores": [0.0] * count}
    scores = dict.fromkeys(range(count), 0.0) if evaluation.has_score_metrics else None
    with raising(f"{where}: its postprocess_fn or a metric function"):
        measured = evaluation.metrics(predictions, aux, scores, tokens)
    for name, message in measured.failures.items():
        raise AssertionError(f"{where}: metric function {name} raises on its own targets as predictions: {message}")
    return measured.values
