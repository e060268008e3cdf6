"""meshway bench data: what making a recipe's caches takes, beside seqio's way of making one, without Beam."""

import contextlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data import seqio_adapter, seqio_steps
from meshway.framework.data.cache import builder
from meshway.framework.data.cached_task import bare_split
from meshway.framework.data.grain_loader import CachedData
from meshway.launch.bench.stages import Sample


def measure(data: CachedData) -> dict[str, Sample]:
    """Caches the training splits of all tasks once more with one process, and then as seqio's script does, without
    Beam.

    Both run the same preprocessors from the source on and write every example; seqio's examples become
    `tf.train.Example` in TFRecord files. Its tf.data pipeline may use all cores, so what compares is examples by
    second of processor time. Tables that are made once, as those of a vocabulary, are there by the second turn, which
    is seqio's.
    """
    split = bare_split(data.train_split)
    with tempfile.TemporaryDirectory(prefix="meshway-bench-") as directory:
        begin = _Clock()
        built = builder.build([data.name], data.modules, directory, [split], num_workers=1, progress=False)
        counts = {
            "examples": sum(one.examples for one in built),
            "tokens": sum(sum(one.tokens.values()) for one in built),
            "megabytes": sum(one.bytes for one in built) / 1e6,
        }
        found = {"cache": begin.sample(counts)}
        begin, counts = _Clock(), dict.fromkeys(counts, 0)
        for task in data.tasks:
            if split in task.splits:
                written = write_as_seqio(task.task, split, Path(directory), data.converter.task_features)
                counts = {name: count + written[name] for name, count in counts.items()}
        return found | {"cache: seqio": begin.sample(counts)}


def write_as_seqio(task: Any, split: str, directory: Path, features: Sequence[str]) -> dict[str, float]:
    """Writes a split as seqio's script does; returns its examples, tokens of `features` and megabytes."""
    import tensorflow as tf

    seqio = seqio_adapter.import_seqio()
    paths = [directory / f"{split}.tfrecord-{number:05d}" for number in range(builder.NUM_SHARDS)]
    examples, tokens = 0, 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(seqio_adapter.task_errors(task.name, "seqio's cache"))
        writers = [stack.enter_context(tf.io.TFRecordWriter(str(path))) for path in paths]
        for example in seqio_steps.cached_dataset(task, split).as_numpy_iterator():
            writers[examples % len(writers)].write(seqio.dict_to_tfexample(example).SerializeToString())
            examples += 1
            tokens += sum(np.size(example[name]) for name in features if name in example)
    return {"examples": examples, "tokens": tokens, "megabytes": sum(path.stat().st_size for path in paths) / 1e6}


class _Clock:
    """Seconds from now on, and processor time of all threads of this process."""

    def __init__(self) -> None:
        self._seconds, self._core_seconds = time.perf_counter(), time.process_time()

    def sample(self, counts: Mapping[str, float]) -> Sample:
        """Returns what was done until now."""
        core_seconds = time.process_time() - self._core_seconds
        return Sample(time.perf_counter() - self._seconds, counts, core_seconds=core_seconds)
