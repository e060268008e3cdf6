"""A task's validation split as the framework's `EvalTask`; handed a seqio task, it imports no seqio."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from meshway.framework.data.objective import Converter, Objective, Sizes
from meshway.framework.data.rows.examples import Examples, check_ids, whole_sizes
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import Measured, Overlong
from meshway.framework.data.task_metrics import (
    PREDICTION,
    PREDICTION_WITH_AUX,
    SCORE,
    SCORE_WITH_INTERMEDIATES,
    MergedMetrics,
    TaskMetrics,
)
from meshway.framework.data.vocabulary import Vocabulary, before_stop, vocabulary_sizes
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Batch

EVAL_SEED = 42  # the same for every run, so that runs of different seeds are measured on the same examples


# Tokens by task feature that evaluation has room for: a number, or None for the longest that the split has, which is
# also taken for a feature that is not named, or of all of them; or those of training.
EvalLengths = Mapping[str, int | None] | Literal["training"] | None
_MUCH = 2**20  # tokens


def given_lengths(kind: str, given: EvalLengths, lengths: Mapping[str, int]) -> dict[str, int]:
    """Returns the lengths of evaluation that need no measuring.

    Args:
      kind: the data source, for messages.
      given: the recipe's EVAL_FEATURE_LENGTHS.
      lengths: its TASK_FEATURE_LENGTHS.

    Raises:
      UserError: `given` names a feature that `lengths` lacks, or something else than a number of tokens.
    """
    if given == "training":
        return dict(lengths)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(
            f"{kind}.eval_lengths (EVAL_FEATURE_LENGTHS) is {given!r}: tokens by feature, None for the longest of the "
            "split, or 'training' for TASK_FEATURE_LENGTHS"
        )
    for name, length in given.items():
        if name not in lengths:
            raise UserError(
                f"EVAL_FEATURE_LENGTHS gives a length for {name!r}, which TASK_FEATURE_LENGTHS lacks: it has "
                f"{list(lengths)}{did_you_mean(name, lengths)}"
            )
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 1):
            raise UserError(
                f"EVAL_FEATURE_LENGTHS[{name!r}] must be a whole number of tokens, or None for the longest, not "
                f"{length!r}"
            )
    return {name: length for name, length in given.items() if length is not None}


def measured_lengths(
    opened: Iterable[tuple[Objective, Examples]], given: Mapping[str, int], lengths: Mapping[str, int]
) -> dict[str, int]:
    """Returns `lengths` with room for the longest example of all tasks, as seqio measures it, but rounded up.

    Only examples that would lose tokens, were they longer, are measured: text that is split into windows loses none,
    and is read in windows of `lengths`.

    Args:
      opened: (objective under `lengths`, examples) of each task.
      given: lengths that stay.
      lengths: TASK_FEATURE_LENGTHS.
    """
    found: dict[str, int] = {}
    for objective, examples in opened:
        if not objective.row_lengths:
            continue
        cut = _would_lose(objective, examples.sizes)
        for name, sizes in whole_sizes(examples).items():
            if name in lengths and name not in given and cut.any():
                least = 1 if cut.all() else lengths[name]
                found[name] = max(found.get(name, 0), least, int(np.max(sizes[cut])))
    return {**lengths, **{name: _rounded(length) for name, length in found.items()}, **given}


def _would_lose(objective: Objective, sizes: Sizes) -> np.ndarray:
    """Returns which examples would be truncated, left out or refused if they were much longer, bool [examples]."""
    longer = {name: np.where(np.asarray(column) > 0, column + _MUCH, 0) for name, column in sizes.items()}
    try:
        objective.parts(longer)
    except UserError:
        return np.ones(len(next(iter(sizes.values()))), bool)
    return objective.lost(longer) > 0


def _rounded(length: int) -> int:
    """Returns `length` or at most an eighth more: a multiple of 8, and of more where it is long, that meshes divide."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class TaskEvaluation:
    """Evaluates a task: teacher-forced batches, and the metric functions of its seqio task where there is one.

    Args:
      name: the task's name.
      examples: the split, as the objective reads it.
      objective: what becomes of the examples.
      converter: what the objective is of.
      lengths: tokens by task feature that a row has room for.
      batch_size: rows of a batch.
      vocabularies: of the features that hold text, for people to read.
      task: the seqio Task, for its vocabulary, postprocessor and metric functions; None: no metrics.
      stop_ids: what ends a prediction; None: the EOS of the vocabulary of its targets.
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
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.lengths: Mapping[str, int] = dict(lengths)
        self._examples = examples
        self._objective = objective
        self._converter = converter
        self._vocabularies = vocabularies
        self._task = task
        self._stop_ids = stop_ids

    @property
    def num_examples(self) -> int:
        """How many examples the split (or its first `eval_examples`) has."""
        return len(self._examples)

    @property
    def num_rows(self) -> int:
        """How many rows `batches` gives."""
        return self._rows.rows_in_round(0)

    @property
    def has_metrics(self) -> bool:
        """Whether the task has metrics of predictions, and its converter something to predict from."""
        return self._converter.can_predict and bool(self._metrics.of_predictions)

    @property
    def has_score_metrics(self) -> bool:
        """Whether the task has metrics of scores."""
        return bool(self._metrics.of_scores)

    @property
    def needs_intermediates(self) -> bool:
        """Whether some of these need what the model computes beside the scores."""
        return bool(self._metrics.of_intermediates)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a prediction."""
        if self._stop_ids is not None:
            return tuple(self._stop_ids)
        eos_id = self._vocabulary("targets").eos_id
        return () if eos_id is None or eos_id < 0 else (int(eos_id),)

    @property
    def left_out(self) -> list[str]:
        """What of the task's metrics cannot be run, in words."""
        if self._task is None:
            return ["its metric functions, if there are any: they are the seqio task's, and seqio is not installed"]
        found = []
        if (names := self._metrics.of_predictions) and not self._converter.can_predict:
            found.append(f"{', '.join(names)}: {type(self._converter).__name__} has nothing to predict from")
        return found

    def overlong(self, rows: int, examples: int) -> Overlong:
        """Returns how many of the examples in the first `rows` rows of `batches`, and of the first `examples` examples,
        do not fit `lengths`. What a task's own preprocessors in TensorFlow cut is not seen here."""
        if not self._objective.row_lengths:
            return Overlong(0, 0)
        truncated, skipped = self._overlong
        read = np.zeros(len(truncated), bool)
        read[:examples] = True
        if rows:
            read[self._rows.examples_of(np.arange(rows))] = True
        passed = read | (rows > 0 and rows == self.num_rows)  # no row shows an example that is left out
        return Overlong(int(np.sum(truncated & read)), int(np.sum(skipped & passed)))

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Yields (global batch, real rows), packed if the converter packs; padding rows are all 0."""
        return ((batch, len(numbers)) for batch, numbers in self._batches_of(self._rows))

    def score_batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (global batch, example index of each real row), a row holding one example or a part of one.

        An example's rows follow each other; one that the converter leaves out has none. Padding rows are all 0.
        """
        source = self._source(pack=False)
        return ((batch, source.examples_of(numbers)) for batch, numbers in self._batches_of(source))

    def prompt_batches(self, batch_size: int | None = None) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (batch to predict from, example index of each real row); more rows repeat the last one.

        Args:
          batch_size: rows of a batch; by default the batch size of the recipe.

        Raises:
          UserError: the converter has nothing to predict from.
        """
        size = batch_size or self.batch_size
        for start in range(0, self.num_examples, size):
            indices = np.arange(start, min(start + size, self.num_examples))
            # A repeated row ends its search when the row it repeats does; an empty one might never.
            filled = np.minimum(np.arange(start, start + size), self.num_examples - 1)
            examples = self._examples.read(filled)
            check_ids(self.name, examples, filled, self._vocabulary_sizes)
            yield self._objective.prompts(examples), indices

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Returns examples as their task made them, before any converter; scalars are numpy's, as seqio gives them."""

        def as_seqio(value: Any) -> Any:
            return value[()] if isinstance(value, np.ndarray) and not value.ndim else value

        return [{name: as_seqio(value) for name, value in each.items()} for each in self._examples.read(indices)]

    def text(self, feature: str, index: int) -> str:
        """Returns a feature of token ids of example `index` as text."""
        return str(self._decode(feature, self._example(index)[feature]))

    def inputs_text(self, index: int) -> str:
        """Returns example `index`'s input as text, as the model sees it ('' where a task has none)."""
        example = self._example(index)
        if "inputs" not in example or np.ndim(example["inputs"]) != 1:
            return ""
        return str(self._decode("inputs", example["inputs"][: self.lengths.get("inputs")]))

    def postprocess(self, index: int, tokens: np.ndarray) -> Any:
        """Turns predicted ids [length] of example `index`, read up to what ends it, into what the metrics compare; of
        ids [decodes, length] the postprocessor gets a list of texts."""
        rows = np.atleast_2d(tokens)
        texts = [self._decode("targets", before_stop(row, self.stop_ids)) for row in rows]
        text = texts if np.ndim(tokens) == 2 else texts[0]
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

    def merging(self, paired: bool = False) -> MergedMetrics:
        """Begins the metrics of one evaluation. `paired`: metrics of scores get (scores, intermediates)."""
        return self._metrics.merging(self.read, paired)

    def metrics(
        self,
        predictions: Sequence[Any] | None = None,
        aux_values: Mapping[str, Sequence[Any]] | None = None,
        scores: Mapping[int, float] | None = None,
        tokens: np.ndarray | None = None,
        intermediates: Mapping[str, Any] | None = None,
        paired: bool = False,
        merged: MergedMetrics | None = None,
    ) -> Measured:
        """Runs the task's metric functions and metric objects, those of what is given; one that raises is named, the
        others are run.

        Args:
          predictions: postprocessed, of the first `len(predictions)` examples.
          aux_values: name -> a value for each of them, for metrics that take such.
          scores: example index -> log-probability of its targets.
          tokens: predicted ids, of the first `len(tokens)` examples, for metric objects.
          intermediates: what the model computed beside the scores, a tree of arrays [scores, ...].
          paired: whether metrics of scores get (scores, intermediates) in their place, as seqio's do where a score
            function returns both.
          merged: what `merging` returned, given all batches; None: metric objects that merge are run like the others.

        Raises:
          UserError: there are more predictions than examples.
        """
        if predictions is not None and len(predictions) > self.num_examples:
            raise UserError(f"task {self.name!r}: {len(predictions)} predictions for {self.num_examples} examples")
        found = Measured({}, {}, {})
        run = functools.partial(self._metrics.run, found=found, merged=merged)
        targets = self._lazy(range(len(predictions or ()))).targets
        examples = self._lazy(range(0 if tokens is None else len(tokens))).examples
        texts: dict[str, Any] | None = None if predictions is None else {"predictions": list(predictions)}
        run(PREDICTION, texts, tokens, targets, examples)
        if aux_values is not None:
            aux = {name: np.asarray(values) for name, values in aux_values.items()}
            texts = None if texts is None else texts | {"aux_values": aux}
            run(PREDICTION_WITH_AUX, texts, None if tokens is None else (tokens, aux), targets, examples)
        if scores is not None:
            indices = sorted(scores)
            values: Any = np.array([scores[index] for index in indices])
            both, of = (values, intermediates), self._lazy(indices)
            given = both if paired else values
            run(SCORE, {"scores": given}, given, of.targets, of.examples)
            run(SCORE_WITH_INTERMEDIATES, None, None if intermediates is None else both, of.targets, of.examples)
        return found

    def _lazy(self, indices: Sequence[int]) -> "_Lazy":
        return _Lazy(
            functools.cache(lambda: [self.target(index) for index in indices]),
            functools.cache(lambda: self.read(indices)),
        )

    @functools.cached_property
    def _metrics(self) -> TaskMetrics:
        return TaskMetrics(self.name, self._task)

    def _source(self, pack: bool) -> RowSource:
        arguments = (self.name, self._examples, self._objective, pack)
        return RowSource(*arguments, shuffle=False, seed=EVAL_SEED, vocabulary_sizes=self._vocabulary_sizes)

    @property
    def _vocabulary_sizes(self) -> dict[str, int]:
        return vocabulary_sizes(self._vocabularies, self.lengths)

    @functools.cached_property
    def _overlong(self) -> tuple[np.ndarray, np.ndarray]:
        """Which examples are truncated, and which are left out because they are too long; bool [examples] each."""
        sizes = self._examples.sizes
        lost, kept = self._objective.lost(sizes) > 0, self._objective.parts(sizes) > 0
        for name, whole in whole_sizes(self._examples).items():
            lost |= whole > sizes[name]
        return lost & kept, lost & ~kept

    @functools.cached_property
    def _rows(self) -> RowSource:
        return self._source(self._converter.pack)

    def _batches_of(self, source: RowSource) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (global batch, numbers of its real rows) of one pass."""
        total, size = source.rows_in_round(0), self.batch_size
        spec = self._converter.spec(self.lengths, size)
        stream = RowStream(self.name, [source], {self.name: 1.0}, [], spec, size, slice(0, size), limit=total)
        for start in range(0, total, size):
            yield next(stream), np.arange(start, min(start + size, total))

    def _example(self, index: int) -> Mapping[str, Any]:
        return self.read([index])[0]

    def _decode(self, feature: str, tokens: Sequence[int] | np.ndarray) -> Any:
        """Decodes ids up to, and without, the first EOS."""
        own = self._vocabulary(feature)
        ids = before_stop(tokens, () if own.eos_id is None else (own.eos_id,))
        return own.decode(ids) if ids else ""  # for which some of seqio's raise

    def _vocabulary(self, feature: str) -> Any:
        """Returns the task's own vocabulary where there is one."""
        return self._task.output_features[feature].vocabulary if self._task is not None else self._vocabularies[feature]


class _Lazy(NamedTuple):
    """Postprocessed targets of some examples, and the examples: they may be many, and are made where a metric asks."""

    targets: Callable[[], list[Any]]
    examples: Callable[[], list[Mapping[str, Any]]]
