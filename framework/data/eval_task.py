"""A task's validation split as the framework's `EvalTask`; handed a seqio task, it imports no seqio."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data.objective import Converter, Objective
from meshway.framework.data.rows.examples import Examples
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.vocabulary import Vocabulary
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch

EVAL_SEED = 42  # the same for every run, so that runs of different seeds are measured on the same examples


class TaskEvaluation:
    """Evaluates a task: teacher-forced batches, and the metrics of its seqio task where there is one.

    Only metric functions of (targets, predictions) are run; functions of scores or of auxiliary values are
    not.

    Args:
      name: the task's name.
      examples: the split, as the objective reads it.
      objective: what becomes of the examples.
      converter: what the objective is of.
      lengths: TASK_FEATURE_LENGTHS, in tokens.
      batch_size: rows of a batch.
      vocabularies: of the features that hold text, for people to read.
      task: the seqio Task, for its vocabulary, postprocessor and metric functions; None: no metrics.
    """

    def __init__(
        self,
        name: str,
        examples: Examples,
        objective: Objective,
        converter: Converter,
        lengths: Mapping[str, int],
        batch_size: int,
        vocabularies: Mapping[str, Vocabulary],
        task: Any = None,
    ) -> None:
        self.name = name
        self._examples = examples
        self._objective = objective
        self._converter = converter
        self._lengths = dict(lengths)
        self._batch_size = batch_size
        self._vocabularies = vocabularies
        self._task = task

    @property
    def num_examples(self) -> int:
        """How many examples the split (or its first `eval_examples`) has."""
        return len(self._examples)

    @property
    def has_metrics(self) -> bool:
        """Whether the task has metrics of predictions, and its converter something to predict from."""
        return self._task is not None and self._converter.can_predict and bool(self._task.predict_metric_fns)

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Yields (global batch, real rows), packed if the converter packs; padding rows are all 0."""
        source = RowSource(
            self.name,
            self._examples,
            self._objective,
            self._converter.pack,
            shuffle=False,
            seed=EVAL_SEED,
            endless=False,
        )
        total = source.rows_in_round(0)
        spec = self._converter.spec(self._lengths, self._batch_size)
        stream = RowStream(
            self.name, [source], {self.name: 1.0}, [], spec, self._batch_size, slice(0, self._batch_size), limit=total
        )
        for start in range(0, total, self._batch_size):
            yield next(stream), min(self._batch_size, total - start)

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
            yield self._objective.prompts(self._examples.read(filled)), indices

    def inputs_text(self, index: int) -> str:
        """Returns example `index`'s input as text, as the model sees it ('' where a task has none)."""
        example = self._example(index)
        if "inputs" not in example or np.ndim(example["inputs"]) != 1:
            return ""
        return str(self._decode("inputs", example["inputs"][: self._lengths.get("inputs")]))

    def postprocess(self, index: int, tokens: np.ndarray) -> Any:
        """Turns predicted ids [length] of example `index`, read up to EOS, into what the metrics compare."""
        text = self._decode("targets", tokens)
        return self._task.postprocess_fn(text, example=self._example(index), is_target=False)

    def target(self, index: int) -> Any:
        """Returns the postprocessed target, of `targets_pretokenized` (untrimmed) where the task keeps it."""
        example = self._example(index)
        text: Any = example.get("targets_pretokenized")
        if text is None:
            text = self._decode("targets", example["targets"])
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

    def _example(self, index: int) -> Mapping[str, Any]:
        return self._examples.read([index])[0]

    def _decode(self, feature: str, tokens: Sequence[int] | np.ndarray) -> Any:
        """Decodes ids up to, and without, the first EOS; by the task's own vocabulary where there is one."""
        own = self._task.output_features[feature].vocabulary if self._task is not None else self._vocabularies[feature]
        ids = [int(token) for token in tokens]
        if own.eos_id is not None and own.eos_id in ids:
            ids = ids[: ids.index(own.eos_id)]
        return own.decode(ids)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        value = getattr(value, "value", value)  # a seqio Scalar carries its number there
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float | np.number) or getattr(value, "shape", None) == ():
            yield prefix + name, float(value)
