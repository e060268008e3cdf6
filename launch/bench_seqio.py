"""The stages of `meshway bench data` on seqio's side: the same work, done as a user of seqio would have it done.

Only these stages import seqio and TensorFlow here, inside functions; no verb but `bench data` reads this file.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_adapter
from meshway.framework.data.features import EncoderDecoderRows, JoinedRows, LanguageModelRows
from meshway.framework.data.objective import Objective
from meshway.framework.data.rows.packing import Example
from meshway.framework.data.windowed_text import WindowedText
from meshway.framework.interfaces import Batch
from meshway.launch.data_stages import Sample, Stage, densities, timed_batches

_SHUFFLE_BUFFER = 1000  # seqio's own
_CONVERTERS: dict[type, str] = {
    EncoderDecoderRows: "EncDecFeatureConverter",
    LanguageModelRows: "LMFeatureConverter",
    JoinedRows: "PrefixLMFeatureConverter",
}


def twin(objective: Objective, sizes: Mapping[str, np.ndarray]) -> str | None:
    """Returns the name of the seqio feature converter that does the same with these examples; None if none does.

    An objective that corrupts text as it is read has no twin, but passes examples with inputs on as they are.
    """
    if isinstance(objective, WindowedText):
        if not objective.has_inputs or not np.all(sizes["inputs"]):
            return None
        objective = objective.pairs
    rows = getattr(objective, "rows", None)
    beyond = getattr(rows, "weighted", False) or not getattr(rows, "prefix", True)
    return None if beyond else _CONVERTERS.get(type(rows))


class SeqioPacking(Stage):
    """`seqio.utils.trim_and_pack_dataset` over items held in memory, its rows handed to numpy in batches.

    Args:
      name: what the table calls it.
      items: row features of each item.
      lengths: tokens of a row, by row feature.
      batch_size: rows handed over at a time.
    """

    share = 2.0

    def __init__(self, name: str, items: Sequence[Example], lengths: Mapping[str, int], batch_size: int) -> None:
        self.name = name
        self._lengths = dict(lengths)
        self._count = len(items)
        seqio = seqio_adapter.import_seqio()
        with seqio_adapter.task_errors(name, "packing"):
            dataset = seqio.utils.trim_and_pack_dataset(_in_memory(items, self._lengths), self._lengths, False)
            self._dataset = dataset.batch(batch_size)

    def once(self, seconds: float) -> Sample:
        """Packs all items once; a pass takes as long as it takes."""
        with seqio_adapter.task_errors(self.name, "packing"):
            begin = time.perf_counter()
            batches = list(self._dataset.as_numpy_iterator())
            passed = time.perf_counter() - begin
        tokens = {name: sum(int(np.count_nonzero(batch[name])) for batch in batches) for name in self._lengths}
        rows = sum(len(next(iter(batch.values()))) for batch in batches)
        counts = {"examples": self._count, "tokens": sum(tokens.values())}
        return Sample(passed, counts, densities(tokens, self._lengths, rows))


class SeqioLoading(Stage):
    """A seqio pipeline to numpy batches. Each slice starts it anew, lets it settle, and then times it.

    Kept between slices, it would fill its buffers while other stages are timed.

    Args:
      name: what the table calls it.
      dataset: of batches, without end.
    """

    share = 3.0

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self._dataset = dataset

    def once(self, seconds: float) -> Sample:
        with seqio_adapter.task_errors(self.name, "reading"):
            batches: Iterator[Batch] = self._dataset.as_numpy_iterator()
            next(batches)
            timed_batches(batches, seconds / 3)  # it comes in bursts, and begins with one
            return timed_batches(batches, seconds)


def pipeline(
    name: str, split: str, lengths: Mapping[str, int], converter: str, pack: bool, batch_size: int, seed: int
) -> Any:
    """Returns the batches that seqio makes of a registered task or mixture, read from its own source, shuffled.

    Raises:
      UserError: seqio cannot.
    """
    seqio = seqio_adapter.import_seqio()
    with seqio_adapter.task_errors(name, "seqio's pipeline"), seqio_adapter.seqio_lock, _quiet():
        dataset = seqio.get_mixture_or_task(name).get_dataset(
            dict(lengths),
            split,
            shuffle=True,
            num_epochs=None,
            seed=seed,
            try_in_mem_cache=False,  # a slice ends before such a cache is full
        )
        return getattr(seqio, converter)(pack=pack)(dataset, dict(lengths)).batch(batch_size, drop_remainder=True)


def pipeline_from_memory(
    examples: Sequence[Example], lengths: Mapping[str, int], converter: str, pack: bool, batch_size: int, seed: int
) -> Any:
    """Returns the batches that seqio makes of prepared examples held in memory, shuffled in a buffer as seqio does.

    Raises:
      UserError: seqio cannot.
    """
    seqio = seqio_adapter.import_seqio()
    with seqio_adapter.task_errors("in memory", "seqio's pipeline"), _quiet():
        dataset = _in_memory(examples, lengths).repeat().shuffle(_SHUFFLE_BUFFER, seed=seed)
        dataset = seqio.utils.trim_dataset(dataset, dict(lengths), dict(lengths))
        return getattr(seqio, converter)(pack=pack)(dataset, dict(lengths)).batch(batch_size, drop_remainder=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what seqio says of uncached sources and of features that are left out."""
    from absl import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _in_memory(examples: Sequence[Example], features: Mapping[str, Any]) -> Any:
    """Returns a dataset of some features of examples, kept in TensorFlow's memory from the first pass on."""
    import tensorflow as tf

    spec = {name: tf.TensorSpec([None], tf.int32) for name in features}
    rows = [{name: np.asarray(example[name], np.int32) for name in features} for example in examples]
    dataset = tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec).cache()
    for _ in dataset:
        pass
    return dataset
