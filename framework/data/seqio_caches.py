"""Offline caches that seqio's own script (`seqio_cache_tasks`) wrote, read as they are: no preprocessor runs again.

    DIR/TASK/                         a task named a:b is in DIR/a/b
      info.SPLIT.json                 num_shards, seqio_version, features: shape and dtype of each
      stats.SPLIT.json                examples, FEATURE_tokens, FEATURE_max_tokens
      SPLIT.tfrecord-00003-of-00064   tf.train.Example records
      COMPLETED                       written last

Examples keep the order of files, and of records in them. seqio itself interleaves 16 files, so that its own order
without shuffling depends on how many there are.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data import seqio_steps
from meshway.framework.data.cache.format import read_json
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.rows.examples import with_problems
from meshway.framework.data.rows.packing import Example
from meshway.framework.data.seqio_adapter import import_seqio, in_order, numpy_examples, task_errors
from meshway.framework.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class SeqioCache:
    """A complete cache of one task.

    Attributes:
      directory: DIR/TASK, whatever TensorFlow's file systems open.
      infos: split -> content of info.SPLIT.json.
      stats: split -> content of stats.SPLIT.json.
    """

    directory: str
    infos: Mapping[str, Mapping[str, Any]]
    stats: Mapping[str, Mapping[str, Any]]

    @property
    def splits(self) -> list[str]:
        """Its splits, by name."""
        return sorted(self.infos)

    @property
    def num_shards(self) -> int:
        """The number of files of the split that has most."""
        return max(int(info["num_shards"]) for info in self.infos.values())

    @property
    def identity(self) -> str:
        """Differs between caches of other examples, as far as their counts and schemas tell; not by their place."""
        return hashlib.sha256(json.dumps([self.infos, self.stats], sort_keys=True).encode()).hexdigest()

    def count(self, split: str) -> int:
        """Returns how many examples a split has."""
        return int(self.stats[split]["examples"])


def origin(task: Any, directory: Path | None, from_seqio: str | None = None) -> SeqioCache | None:
    """Returns the cache of seqio's from which our cache of a task is made; None where its preprocessors make it.

    Args:
      task: the seqio task.
      directory: CACHE_DIR/TASK. If it exists, it tells: seqio's cache may be gone once ours is complete. None: it does
        not, being made anew.
      from_seqio: where a cache must be, as `open_cache`; None looks in seqio's global cache directories.
    """
    if from_seqio is not None:
        return open_cache(task, from_seqio)
    if directory is not None and (path := directory / "info.json").is_file():
        told = read_json(path).get("seqio_cache")
        return None if told is None else SeqioCache(**told)
    with task_errors(task.name, "cache directories"):
        found = task.cache_dir if task.supports_caching else None
    return None if found is None else open_cache(task, found)


def splits(task: Any, directory: Path | None, from_seqio: str | None = None) -> list[str]:
    """Returns the splits that our cache of a task has, or will have; arguments as `origin`."""
    found = origin(task, directory, from_seqio)
    with task_errors(task.name, "splits"):
        return found.splits if found else list(task.splits)


def open_cache(task: Any, directory: str) -> SeqioCache:
    """Opens the cache of a task in `directory`, which is `output_cache_dir` of the script, or the task's folder in it.

    Raises:
      UserError: there is none, it is incomplete, or the task has no CacheDatasetPlaceholder.
    """
    import tensorflow as tf

    if not task.supports_caching:
        raise UserError(
            f"task {task.name!r} has no CacheDatasetPlaceholder, so seqio cannot have cached it: which of its "
            "preprocessors already ran is told by that placeholder"
        )
    files = tf.io.gfile
    inside = import_seqio().get_task_dir_from_name(task.name)
    with _gfile_errors(directory):
        folder = next(
            (each for each in (f"{directory.rstrip('/')}/{inside}", directory) if files.glob(f"{each}/info.*.json")),
            None,
        )
        if folder is None:
            found = sorted({path.split("/")[-2] for path in files.glob(f"{directory.rstrip('/')}/*/COMPLETED")})
            raise UserError(
                f"{directory} has no seqio cache of task {task.name!r}: no {inside}/info.SPLIT.json; it has "
                f"{found}{did_you_mean(task.name, found)}"
            )
        if not files.exists(f"{folder}/COMPLETED"):
            raise UserError(f"the seqio cache {folder} is incomplete: COMPLETED, which is written last, is not there")
        splits = [path.split("/")[-1][len("info.") : -len(".json")] for path in files.glob(f"{folder}/info.*.json")]
        infos = {split: _json(f"{folder}/info.{split}.json") for split in splits}
        stats = {split: _json(f"{folder}/stats.{split}.json") for split in splits}
    for split in splits:
        # An empty split has neither features nor counts.
        if infos[split] and not {"num_shards", "features"} <= infos[split].keys():
            raise UserError(f"{folder}/info.{split}.json lacks num_shards or features")
        if infos[split] and "examples" not in stats[split]:
            raise UserError(f"{folder}/stats.{split}.json lacks examples, the number of them")
    kept = {split: info for split, info in infos.items() if info}
    if not kept:
        raise UserError(f"the seqio cache {folder} has no examples in any split")
    return SeqioCache(folder, kept, {split: stats[split] for split in kept})


def add_directories(directories: Sequence[str]) -> None:
    """Adds directories to seqio's global cache directories, as T5X's --seqio_additional_cache_dirs does."""
    if not directories:
        return
    seqio = import_seqio()
    known = seqio.utils.get_global_cache_dirs()
    if new := [directory for directory in directories if directory not in known]:
        seqio.add_global_cache_dirs(new)


def features(task: Any, cache: SeqioCache) -> dict[str, FeatureInfo]:
    """Returns the features of a cache, by name.

    Raises:
      UserError: as `seqio_steps.features`, or a file is missing.
    """

    def open_split(task: Any, split: str) -> Any:
        return seqio_steps.dense(task, _reader(cache, split)(_files(task, cache, split)[0]))

    return seqio_steps.features(task, cache.splits, open_split, f" of the seqio cache {cache.directory}")


def examples(
    cache: SeqioCache, task: Any, split: str, shard: int, num_shards: int, max_bad: int, bad: list[str]
) -> Iterator[Example]:
    """Yields the examples of one of `num_shards` parts of a split, each some of the files that follow each other.

    Args:
      cache: the cache.
      task: whose it is.
      split: which of its splits.
      shard: which part, from 0.
      num_shards: how many there are; those past the number of files are empty.
      max_bad: how many examples of the part may hold ids outside their vocabulary; they are left out.
      bad: filled with a line about each example left out.

    Raises:
      UserError: a file is missing or damaged, or more than `max_bad` examples are bad.
    """

    files = _files(task, cache, split)
    reader = _reader(cache, split)
    sizes = seqio_steps.id_sizes(task)
    for path in files[shard * len(files) // num_shards : (shard + 1) * len(files) // num_shards]:
        for number, (example, cause) in enumerate(with_problems(_records(task, reader, path), sizes)):
            if not cause:
                yield example
                continue
            bad.append(f"task {task.name!r}, split {split!r}, example {number} of {path}: {cause}")
            if len(bad) > max_bad:
                raise UserError(f"{bad[-1]}. Was it cached with another vocabulary? --max_bad_examples=N leaves out N")


def _records(task: Any, reader: Any, path: str) -> Iterator[Example]:
    import tensorflow as tf

    try:
        yield from numpy_examples(in_order(seqio_steps.dense(task, reader(path))))
    except tf.errors.OpError as error:
        raise UserError(
            f"{path} of the seqio cache of task {task.name!r} is damaged: {seqio_steps.cause(error)}; write that cache "
            "again, or cache the task without it"
        ) from error


def _files(task: Any, cache: SeqioCache, split: str) -> list[str]:
    """Returns the files of a split, in order; UserError if there are not as many as info.SPLIT.json says."""
    import tensorflow as tf

    total = int(cache.infos[split]["num_shards"])
    with _gfile_errors(cache.directory):
        found = sorted(tf.io.gfile.glob(f"{cache.directory}/{split}.tfrecord-*-of-{total:05d}"))
    if len(found) != total:
        there = {path.rpartition(".tfrecord-")[2] for path in found}
        missing = [name for i in range(total) if (name := f"{i:05d}-of-{total:05d}") not in there]
        raise UserError(
            f"the seqio cache {cache.directory} of task {task.name!r} has {len(found)} of the {total} files of split "
            f"{split!r}; it lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return found


def _reader(cache: SeqioCache, split: str) -> Any:
    """Returns (path of a file) -> dataset of its examples, as seqio parses them."""
    return import_seqio().dataset_providers._CachedDataSource(cache.directory, split)._reader


def _json(path: str) -> dict[str, Any]:
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(path) as file:
            text = file.read()
        return json.loads(text) if text.strip() else {}
    except (tf.errors.NotFoundError, ValueError) as error:
        raise UserError(f"{path} of a seqio cache cannot be read: {type(error).__name__}") from error


@contextlib.contextmanager
def _gfile_errors(directory: str) -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except tf.errors.OpError as error:
        raise UserError(f"the seqio cache {directory} cannot be read: {seqio_steps.cause(error)}") from error
