"""A seqio task's validation split as the framework's `EvalTask`; handed a task, it imports no seqio."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.features import Converter
from meshway.framework.data.packing import Arrays, Example
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch


class SeqioEvalTask:
    """Evaluates a seqio task through its own vocabulary, postprocessor and metric functions.

    Only metric functions of (targets, predictions) are run; functions of scores or of auxiliary values are
    not.

    Args:
      task: a seqio Task.
      read: returns the split's examples in order; called once, when they are first needed.
      converter: turns examples into rows.
      lengths: TASK_FEATURE_LENGTHS, in tokens.
      batch_size: rows of a batch.
    """

    def __init__(
        self,
        task: Any,
        read: Callable[[], list[Example]],
        converter: Converter,
        lengths: Mapping[str, int],
        batch_size: int,
    ) -> None:
        self.name: str = task.name
        self._task = task
        self._read = read
        self._converter = converter
        self._lengths = dict(lengths)
        self._batch_size = batch_size

    @property
    def num_examples(self) -> int:
        """How many examples the split (or its first `eval_examples`) has."""
        return len(self._examples)

    @property
    def has_metrics(self) -> bool:
        """Whether the task has metrics of predictions, and its converter something to predict from."""
        return self._converter.can_predict and bool(self._task.predict_metric_fns)

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Yields (global batch, real rows), packed if the converter packs; padding rows are all 0."""
        count = len(next(iter(self._rows.values())))
        for start in range(0, count, self._batch_size):
            real = min(self._batch_size, count - start)
            padding = [(0, self._batch_size - real), (0, 0)]
            yield (
                {name: np.pad(array[start : start + real], padding) for name, array in self._rows.items()},
                real,
            )

    def prompt_batches(self, batch_size: int | None = None) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (batch to predict from, example index of each real row); more rows repeat the last one.

        Args:
          batch_size: rows of a batch; by default the batch size of the recipe.

        Raises:
          UserError: the converter has nothing to predict from.
        """
        size = batch_size or self._batch_size
        for start in range(0, self.num_examples, size):
            indices = np.arange(start, min(start + size, self.num_examples))
            # A repeated row ends its search when the row it repeats does; an empty one might never.
            filled = np.minimum(np.arange(start, start + size), self.num_examples - 1)
            yield self._converter.prompts([self._examples[i] for i in filled], self._lengths), indices

    def inputs_text(self, index: int) -> str:
        """Returns example `index`'s input as text, as the model sees it ('' where a task has none)."""
        feature = self._task.output_features.get("inputs")
        if feature is None:
            return ""
        tokens = self._examples[index]["inputs"][: self._lengths.get("inputs")]
        return str(_decode(feature.vocabulary, tokens))

    def postprocess(self, index: int, tokens: np.ndarray) -> Any:
        """Turns predicted ids [length] of example `index`, read up to EOS, into what the metrics compare."""
        text = _decode(self._task.output_features["targets"].vocabulary, tokens)
        return self._task.postprocess_fn(text, example=self._examples[index], is_target=False)

    def target(self, index: int) -> Any:
        """Returns the postprocessed target, of `targets_pretokenized` (untrimmed) where the task keeps it."""
        example = self._examples[index]
        text: Any = example.get("targets_pretokenized")
        if text is None:
            text = _decode(self._task.output_features["targets"].vocabulary, example["targets"])
        elif isinstance(text, bytes):
            text = text.decode("utf-8")
        return self._task.postprocess_fn(text, example=example, is_target=True)

    def metrics(self, predictions: list[Any]) -> dict[str, float]:
        """Returns the task's scalar metrics of the first `len(predictions)` examples.

        Numbers and seqio Scalars are kept, mappings are flattened ('a/b'), anything else (text, images,
        histograms) is left out.

        Raises:
          UserError: two metric functions return the same name, or there are more predictions than examples.
        """
        if len(predictions) > self.num_examples:
            raise UserError(f"task {self.name!r}: {len(predictions)} predictions for {self.num_examples} examples")
        targets = [self.target(index) for index in range(len(predictions))]
        result: dict[str, float] = {}
        for metric_fn in self._task.predict_metric_fns:
            for name, value in _scalars(metric_fn(targets, predictions)):
                if name in result:
                    raise UserError(f"task {self.name!r}: two metric functions return {name!r}")
                result[name] = value
        return result

    @functools.cached_property
    def _examples(self) -> Sequence[Example]:
        return self._read()

    @functools.cached_property
    def _rows(self) -> Arrays:
        return self._converter.rows(self._examples, self._lengths, packed=self._converter.pack)


def _decode(vocabulary: Any, tokens: np.ndarray) -> Any:
    """Decodes ids up to, and without, the first EOS."""
    ids = [int(token) for token in tokens]
    if vocabulary.eos_id is not None and vocabulary.eos_id in ids:
        ids = ids[: ids.index(vocabulary.eos_id)]
    return vocabulary.decode(ids)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        value = getattr(value, "value", value)  # a seqio Scalar carries its number there
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float | np.number) or getattr(value, "shape", None) == ():
            yield prefix + name, float(value)
