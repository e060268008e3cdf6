"""Dividing a seqio task at its cache: the preprocessors whose output is cached, and those that run when it is read."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_sources
from meshway.framework.data.cache.fingerprint import step_name, takes_lengths
from meshway.framework.data.cache.format import BYTES
from meshway.framework.data.objective import FeatureInfo, VocabularyInfo
from meshway.framework.data.rows.examples import TENSORFLOW, TWINS, with_problems
from meshway.framework.data.rows.mixing import key_of
from meshway.framework.data.rows.packing import Example
from meshway.framework.data.seqio_adapter import (
    columns_of,
    dataset_of,
    draws_random_numbers,
    import_seqio,
    in_order,
    numpy_examples,
    seqio_lock,
    task_errors,
)
from meshway.framework.errors import UserError


@dataclasses.dataclass(frozen=True)
class DividedSteps:
    """A task's preprocessors, divided at the cache.

    Attributes:
      cached: those run once, offline: the first of the task's list.
      online: those run each time an example is read.
      online_from: where in the task's list `online` begins; a CacheDatasetPlaceholder is in neither.
      reason: what is cached and what decided it, as text.
    """

    cached: tuple[Callable[..., Any], ...]
    online: tuple[Callable[..., Any], ...]
    online_from: int
    reason: str


@functools.lru_cache(maxsize=256)
def divide_steps(task: Any) -> DividedSteps:
    """Divides a task's preprocessors at the cache.

    The cache is at the task's CacheDatasetPlaceholder if there is one; else before the first preprocessor that takes
    `sequence_length` or draws random numbers through TensorFlow or seqio. (Random numbers drawn inside a
    `tf.py_function` cannot be seen.)

    Raises:
      UserError: a preprocessor fails while the dataset is built, or appends an EOS that a vocabulary lacks.
    """
    import tensorflow as tf

    seqio = import_seqio()

    check_eos(task)
    with task_errors(task.name, "preprocessors"):
        steps = tuple(task.preprocessors)
    total = len(steps)
    for place, step in enumerate(steps):
        if isinstance(step, seqio.CacheDatasetPlaceholder):
            reason = f"{place} of {total - 1} preprocessors, up to the task's CacheDatasetPlaceholder"
            return DividedSteps(steps[:place], steps[place + 1 :], place + 1, reason)
    spec = seqio_sources.opened(task, _splits(task)[0], 0).element_spec
    dataset = tf.data.Dataset.from_generator(list, output_signature=spec)
    last_of_dicts = 0
    for place, step in enumerate(steps):
        stops = "reads sequence_length" if takes_lengths(step) else ""
        if not stops:
            with task_errors(task.name, f"preprocessor {place + 1} of {total} ({step_name(step)})"), _seeded(0):
                before = seqio.utils._NEXT_MAP_SEED
                dataset = task._preprocess_dataset(dataset, [step])
                if before != seqio.utils._NEXT_MAP_SEED or draws_random_numbers(dataset):
                    stops = "draws random numbers"
        if stops:
            reason = f"{last_of_dicts} of {total} preprocessors; {step_name(step)} {stops}"
            return DividedSteps(steps[:last_of_dicts], steps[last_of_dicts:], last_of_dicts, reason)
        if isinstance(dataset.element_spec, dict):
            last_of_dicts = place + 1
    return DividedSteps(steps, (), total, f"all {total} preprocessors")


def check_eos(task: Any) -> None:
    """Raises UserError where a task appends EOS to a feature whose vocabulary has none."""
    preprocessors = import_seqio().preprocessors
    twins = [getattr(preprocessors, name) for name in TWINS]
    with task_errors(task.name, "preprocessors"):
        if not any(getattr(step, "func", step) in twins for step in task.preprocessors):
            return
    for name, feature in task.output_features.items():
        if not (feature.add_eos and feature.required and feature.rank):
            continue
        with task_errors(task.name, "vocabulary"):
            vocabulary = feature.vocabulary
            eos_id, size = vocabulary.eos_id, vocabulary.vocab_size
        if eos_id is None or eos_id < 0 or 0 < size <= eos_id:
            own = "no EOS" if eos_id is None or eos_id < 0 else f"{size:,} ids, and its EOS would be {eos_id}"
            raise UserError(
                f"task {task.name!r} appends EOS to feature {name!r}, whose vocabulary {vocabulary} has {own}: give it "
                "one (HuggingFaceVocabulary takes eos_token, as '</s>'), or declare the feature with add_eos=False"
            )


def features(
    task: Any, splits: Sequence[str], open_split: Callable[[Any, str], Any] | None = None, where: str = ""
) -> dict[str, FeatureInfo]:
    """Returns the cached features of a task, by name: those of the examples that the cached preprocessors yield.

    Args:
      task, splits: of the task, which must all have these features.
      open_split: (task, split) -> the dataset that is cached, where its preprocessors do not make it.
      where: that dataset comes from, for messages.

    Raises:
      UserError: an element is not a dict of dense arrays, splits differ, or a feature is not as the task declares
        it (checked if only the appending of EOS comes after the cache).
    """
    found: dict[str, FeatureInfo] = {}
    for split in splits:
        with task_errors(task.name, f"split {split!r}{where}"), _seeded(0):
            dataset = (open_split or cached_dataset)(task, split)
            if online_entries(task) != TENSORFLOW:
                task._validate_preprocessing(dataset)
        infos = _infos(task, split, dataset)
        if found and found.keys() != infos.keys():
            raise UserError(
                f"task {task.name!r}: split {split!r} has features {list(infos)}, but {splits[0]!r} has {list(found)}"
            )
        for name, info in infos.items():
            known = found.get(name, info)
            if (known.dtype, len(known.shape)) != (info.dtype, len(info.shape)):
                raise UserError(
                    f"task {task.name!r}: feature {name!r} is {info.dtype} {list(info.shape)} in split {split!r}, but "
                    f"{known.dtype} {list(known.shape)} in {splits[0]!r}"
                )
            shape = tuple(a if a == b else None for a, b in zip(known.shape, info.shape, strict=True))
            found[name] = dataclasses.replace(info, shape=shape)
    return found


def declared(task: Any) -> dict[str, FeatureInfo]:
    """Returns the features that a task declares, after all its preprocessors."""
    return {
        name: FeatureInfo(feature.dtype.name, (None,) * feature.rank, _vocabulary(feature))
        for name, feature in task.output_features.items()
    }


def id_sizes(task: Any) -> dict[str, int]:
    """Returns how many ids the vocabulary of each cached feature of token ids has."""
    # Features that steps in TensorFlow still change may not hold token ids yet.
    found = {} if online_entries(task) == TENSORFLOW else declared(task)
    return {name: info.vocabulary.size for name, info in found.items() if info.vocabulary and len(info.shape) == 1}


def cacheable(
    task: Any,
    split: str,
    shard: int,
    num_shards: int,
    seed: int = 0,
    max_bad: int = 0,
    bad: list[str] | None = None,
) -> Iterator[Example]:
    """Yields the examples of one shard of a split, as the cached preprocessors make them.

    Shard k has every num_shards-th file of the source, or every num_shards-th example where it has fewer files.

    Args:
      task: the seqio task.
      split: of its source.
      shard: which, from 0.
      num_shards: how many there are.
      seed: of preprocessors that draw random numbers before a CacheDatasetPlaceholder; fresh in every shard.
      max_bad: how many examples may fail in this shard; they are left out.
      bad: filled with a line about each example left out.

    Raises:
      UserError: the task cannot be read, or more than `max_bad` examples fail or hold ids outside their vocabulary.
    """
    bad = [] if bad is None else bad
    with task_errors(task.name, f"split {split!r}"), _seeded(key_of(seed, task.name, split, shard)):
        dataset = in_order(cached_dataset(task, split, shard, num_shards, seed))
    failed = 0
    for number, (example, reason) in enumerate(with_problems(_each(task, split, dataset), id_sizes(task))):
        if isinstance(example, Exception):
            reason = cause(example)
        elif not reason:
            yield example
            continue
        bad.append(f"task {task.name!r}, split {split!r}, example {number} of shard {shard} of {num_shards}: {reason}")
        failed += 1
        if failed > max_bad:
            count = f"; {failed} bad examples in this shard, {max_bad} allowed" if max_bad else ""
            raise UserError(f"{bad[-1]}{count}. `meshway cache --max_bad_examples=N` leaves out up to N")


def _each(task: Any, split: str, dataset: Any) -> Iterator[Example | Exception]:
    """Yields a dataset's elements, or the exception of one that a preprocessor failed on."""
    import tensorflow as tf

    read = 0
    with task_errors(task.name, f"split {split!r}"):
        try:
            for example in numpy_examples(dataset):
                yield example
                read += 1
            return
        except tf.errors.OpError:
            pass  # one of a batch failed: find out which
    iterator = dataset.skip(read).as_numpy_iterator()
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            yield error


def online(
    task: Any,
    examples: Sequence[Example],
    features: Mapping[str, FeatureInfo],
    online_from: int,
    lengths: Mapping[str, int],
    seed: int,
) -> list[Example]:
    """Returns cached examples after the preprocessors that run online; pure. The source is not read.

    The result is not truncated to `lengths`. A dataset is built at each call, so pass many examples at a time.

    Args:
      task: the seqio task.
      examples: as they are cached.
      features: of the cached examples.
      online_from: index of the first online step, as in `DividedSteps` and info.json.
      lengths: passed to the preprocessors as `sequence_length`.
      seed: of all their random numbers.

    Raises:
      UserError: a preprocessor fails, or the result is not what the task declares.
    """
    with task_errors(task.name, f"preprocessors after the cache, lengths {dict(lengths)}"):
        with _seeded(seed):
            dataset = dataset_of(columns_of(examples, features), features, 0, len(examples))
            dataset = task._preprocess_dataset(dataset, task.preprocessors[online_from:], dict(lengths))
            dataset = in_order(task._validate_preprocessing(dataset))
        return list(numpy_examples(dataset))


def online_entries(task: Any) -> list[dict[str, Any]] | str:
    """Returns the online steps as info.json holds them: a list if all have numpy equivalents, else TENSORFLOW."""
    seqio = import_seqio()
    entries = []
    for step in divide_steps(task).online:
        twin = next((name for name in TWINS if step is getattr(seqio.preprocessors, name)), None)
        if twin is None:
            return TENSORFLOW
        with task_errors(task.name, "vocabulary"):
            eos = {
                name: int(feature.vocabulary.eos_id)
                for name, feature in task.output_features.items()
                if feature.add_eos
            }
        entries.append({"step": twin, "features": eos})
    return entries


def _splits(task: Any) -> list[str]:
    with task_errors(task.name, "splits"):
        return list(task.splits)


def cached_dataset(task: Any, split: str, shard: int = 0, num_shards: int = 1, seed: int = 0) -> Any:
    """Returns the dataset of a shard, after the cached preprocessors."""
    seqio = import_seqio()
    source = task.source
    if not source.caching_permitted:
        raise UserError(f"task {task.name!r}: its source forbids caching (caching_permitted=False)")
    if num_shards > 1 and (source.supports_arbitrary_sharding or len(source.list_shards(split)) >= num_shards):
        info = seqio.ShardInfo(shard, num_shards)
        dataset = source.get_dataset(split=split, shuffle=False, seed=seed, shard_info=info)
    else:
        whole = seqio_sources.held if num_shards > 1 else seqio_sources.opened
        dataset = whole(task, split, seed)
        dataset = dataset.shard(num_shards, shard) if num_shards > 1 else dataset
    return dense(task, task._preprocess_dataset(dataset, divide_steps(task).cached))


def dense(task: Any, dataset: Any) -> Any:
    """Returns a dataset with ragged and sparse features filled up with 0, where no step in TensorFlow comes later."""
    import tensorflow as tf

    specs = dataset.element_spec
    kinds = (tf.RaggedTensorSpec, tf.SparseTensorSpec)
    names = [name for name, spec in specs.items() if isinstance(spec, kinds)] if isinstance(specs, dict) else []
    if not names or online_entries(task) == TENSORFLOW:
        return dataset

    def filled(value: Any) -> Any:
        return value.to_tensor() if isinstance(value, tf.RaggedTensor) else tf.sparse.to_dense(value)

    return dataset.map(lambda example: {**example, **{name: filled(example[name]) for name in names}})


def _infos(task: Any, split: str, dataset: Any) -> dict[str, FeatureInfo]:
    """Returns the features of a dataset, sorted by name."""
    import tensorflow as tf

    where = f"task {task.name!r}, split {split!r}, after {divide_steps(task).reason}"
    specs = dataset.element_spec
    if not isinstance(specs, dict):
        raise UserError(f"{where}: an element is {specs}, but only a dict of features can be cached")
    first: Example | None = None
    found = {}
    for name, spec in sorted(specs.items()):
        if not isinstance(spec, tf.TensorSpec):
            raise UserError(
                f"{where}: feature {name!r} is {spec}; only dense tensors can be cached "
                "where steps in TensorFlow come after the cache: make it dense before, or move those steps"
            )
        shape = spec.shape
        feature = task.output_features.get(name)
        if feature is not None and feature.dtype != spec.dtype:
            feature = None  # later steps still change its type, such as text before it is tokenized
        if shape.rank is None and feature is not None:
            shape = tf.TensorShape([None] * feature.rank)
        elif shape.rank is None:  # as from a py_function: only an example shows it
            with task_errors(task.name, f"split {split!r}"):
                first = first or next(dataset.take(1).as_numpy_iterator(), {})
            shape = tf.TensorShape([None] * np.ndim(first.get(name, 0)))
        vocabulary = _vocabulary(feature) if feature is not None and feature.rank == shape.rank else None
        dtype = BYTES if spec.dtype == tf.string else spec.dtype.name
        found[name] = FeatureInfo(dtype, tuple(shape.as_list()), vocabulary)
    return found


def _vocabulary(feature: Any) -> VocabularyInfo | None:
    """Returns a feature's vocabulary as objectives see it; None if the feature is not a sequence of ids."""
    if not feature.dtype.is_integer or not feature.rank or not feature.vocabulary.vocab_size:
        return None
    vocabulary = feature.vocabulary
    eos_id = None if vocabulary.eos_id is None or vocabulary.eos_id < 0 else int(vocabulary.eos_id)  # -1 is none
    return VocabularyInfo(int(vocabulary.vocab_size), eos_id, int(vocabulary.extra_ids))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Holds seqio's lock, and makes all randomness of a dataset that is built inside follow from `seed`."""
    import tensorflow as tf
    from tensorflow.python.eager import context

    utils = import_seqio().utils
    with seqio_lock:
        map_seed, global_seed = utils._NEXT_MAP_SEED, context.global_seed()
        utils._NEXT_MAP_SEED = seed % 2**62
        tf.random.set_seed(seed % 2**31)
        try:
            yield
        finally:
            utils._NEXT_MAP_SEED = map_seed
            context.set_global_seed(global_seed)


def cause(error: BaseException) -> str:
    """Returns an element's error message without the text that TensorFlow puts around it."""
    around = r"\{\{[^}]*\}\}|Error in user-defined function passed to \S+ transformation with iterator: \S+: "
    lines = [line.strip() for line in re.sub(around, "", str(error)).splitlines() if line.strip()]
    frames = [line for line in lines if re.match(r'File "(?!.*-packages[/\\](tensorflow|seqio)[/\\])', line)]
    at = re.match(r'File "(.*)", line (\d+)', frames[-1]) if frames else None
    return (lines[0][:400] if lines else type(error).__name__) + (f" (at {at.group(1)}:{at.group(2)})" if at else "")
