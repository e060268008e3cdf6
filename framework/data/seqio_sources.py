"""The sources of seqio tasks, as a cache is made of them: read in order, again for each shard."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from meshway.framework.data.seqio_adapter import task_errors

_MEMORY = 1 << 27  # bytes of a source that a process may hold
_SEEN = 64  # examples, from whose size that of all is told
_OVERHEAD = 256  # bytes that an example takes beside its content


@functools.lru_cache(maxsize=1)
def opened(task: Any, split: str, seed: int) -> Any:
    """Returns a split's whole source dataset; kept while its shards are read one after the other."""
    return in_order(task.source, split, seed)


def in_order(source: Any, split: str, seed: int | None) -> Any:
    """Returns a source's dataset of a split, unshuffled; a function that takes no seed is given none."""
    source_fn = getattr(source, "_dataset_fn", None)
    seeded = source_fn is None or "seed" in inspect.signature(source_fn).parameters
    return source.get_dataset(split=split, shuffle=False, seed=seed if seeded else None)


@functools.lru_cache(maxsize=1)
def held(task: Any, split: str, seed: int) -> Any:
    """Returns `opened`, held in memory from its first pass on if it is small: every shard passes over all of it."""
    import tensorflow as tf

    dataset = opened(task, split, seed)
    count = _count(task, split, lambda: dataset)
    try:
        sizes = [_bytes(example) for example in dataset.take(_SEEN)]
        most = int(_MEMORY / (np.mean(sizes or [0]) + _OVERHEAD))
        kept = dataset.cache()
        if count is None or count <= most:  # this pass fills it, whole
            count = int(kept.take(most + 1).reduce(np.int64(0), lambda number, _: number + 1))
    except tf.errors.OpError:  # the source fails: which example did is told when a shard is read
        return dataset
    return kept if count <= most else dataset


def _bytes(example: Any) -> int:
    import tensorflow as tf

    total = 0
    for tensor in tf.nest.flatten(example, expand_composites=True):
        content = tf.strings.length(tensor) if tensor.dtype == tf.string else tensor
        total += int(tf.reduce_sum(content)) if tensor.dtype == tf.string else content.numpy().nbytes
    return total


def source_count(task: Any, split: str) -> int | None:
    """Returns how many examples a split's source has, None if the source does not report it."""
    return _count(task, split, lambda: opened(task, split, 0))


def _count(task: Any, split: str, dataset: Callable[[], Any]) -> int | None:
    with task_errors(task.name, f"split {split!r}"):
        count = task.source.num_input_examples(split)
        if count is None:
            count = int(dataset().cardinality())
    return None if count < 0 else int(count)


def release() -> None:
    """Releases source datasets that were kept to be read again."""
    opened.cache_clear()
    held.cache_clear()
