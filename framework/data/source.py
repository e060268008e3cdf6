"""What data is to the rest of the framework: nothing here is inherited, all is met by shape."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch


class Dataset(Protocol):
    """An endless stream of batches with a position instead of an iterator's hidden state."""

    def __next__(self) -> Batch:
        """Returns this process's rows of the next global batch, numpy."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def state(self) -> dict[str, int]:
        """Returns the position after the last batch returned: a few integers, the same on every process."""
        ...

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a position that `state` returned, on any process count."""
        ...

    def spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns (global shape, dtype) of each feature."""
        ...


class SplitRead(NamedTuple):
    """A split of a task that a run reads.

    Attributes:
      task, split: their names.
      purpose: 'training' or 'evaluation'.
      examples: how many it has; those of its source where it is not cached; None where nothing tells.
      cached: whether it is; None for what is read uncached.
    """

    task: str
    split: str
    purpose: str
    examples: int | None
    cached: bool | None


class DataSource(Protocol):
    """What a recipe says of its data: light until opened.

    A source whose methods write something, as caches, has `for_dry_run()`, which returns one that makes the same checks
    and writes nothing; and one that reads splits of tasks may have `reads(evaluate: bool) -> list[SplitRead]`, for
    people.
    """

    batch_size: int
    lengths: Mapping[str, int]

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Returns the vocabulary of each task feature that holds token ids; saved with the run."""
        ...

    def framing(self) -> Framing | None:
        """Returns what decoders read before a text and what ends a prediction, as training has it; None without text. A
        source may lack this: then the vocabulary of `targets` tells."""
        ...

    def train(self, rows: slice) -> Dataset:
        """Opens the endless training stream; `rows` are this process's rows of each global batch."""
        ...

    def eval_tasks(self, split: str | None = None) -> Sequence["EvalTask"]:
        """Opens a split of each (sub-)task, by default the recipe's validation split; a source without splits need
        not take the argument."""
        ...


def other_split(data: DataSource, split: str | None) -> str | None:
    """Returns a split's name, None where it is the validation split of `data`."""
    return None if split == getattr(data, "eval_split", None) else split


def for_dry_run(data: DataSource) -> DataSource:
    """Returns the source that makes the same checks and writes nothing, as caches."""
    source: DataSource = data.for_dry_run() if hasattr(data, "for_dry_run") else data
    return source


def reads_of(data: DataSource, evaluate: bool) -> list[SplitRead]:
    """Returns the splits that training reads, and with `evaluate` evaluations, as far as the source tells."""
    return list(data.reads(evaluate)) if hasattr(data, "reads") else []


def tasks_of(data: DataSource, split: str | None) -> Sequence["EvalTask"]:
    """Returns the tasks of a split, by default those of the validation split.

    Raises:
      UserError: the source has no such split, or none to choose from.
    """
    if split is None:
        return data.eval_tasks()
    if not inspect.signature(data.eval_tasks).parameters:
        raise UserError(f"split {split!r}: {type(data).__name__} has no splits to choose from; leave it out")
    return data.eval_tasks(split)


class Measured(NamedTuple):
    """What metric functions found.

    Attributes:
      values: metrics by name.
      failures: function -> what it raised.
      shown: what else they return, as `task_metrics.plain_values` has it: text, images, sounds, histograms, tensors.
    """

    values: dict[str, float]
    failures: dict[str, str]
    shown: dict[str, dict[str, Any]]


class Overlong(NamedTuple):
    """How many examples do not fit their lengths.

    Attributes:
      truncated: a part of them is not read.
      skipped: they are left out.
    """

    truncated: int
    skipped: int


class Merging(Protocol):
    """The metrics of a task that need no more than one batch at a time, over one evaluation.

    Attributes:
      needs_predictions, needs_tokens, needs_intermediates: what the task's other metrics need of all examples:
        postprocessed predictions, their token ids, what the model computed beside scores.
      takes_scores: whether `scored` gives what it gets to any metric.
    """

    needs_predictions: bool
    needs_tokens: bool
    needs_intermediates: bool
    takes_scores: bool

    def predicted(self, indices: Sequence[int], tokens: np.ndarray, scores: Sequence[Any]) -> None:
        """Takes the predictions of some examples, ids [examples, ..., length], and their scores."""
        ...

    def scored(self, indices: Sequence[int], scores: Sequence[float], intermediates: Any) -> None:
        """Takes the scores of some examples, and what the model computed beside them, None where nothing needs it."""
        ...


class EvalTask(Protocol):
    """One split of a task, read once, in a fixed order, and its metrics."""

    name: str

    @property
    def batch_size(self) -> int:
        """Rows of a batch, over all processes."""
        ...

    @property
    def lengths(self) -> Mapping[str, int]:
        """Tokens by task feature that a row has room for."""
        ...

    @property
    def num_examples(self) -> int:
        """How many examples it has."""
        ...

    @property
    def num_rows(self) -> int:
        """How many rows `batches` gives."""
        ...

    @property
    def has_metrics(self) -> bool:
        """Whether it has metrics of predictions."""
        ...

    @property
    def has_score_metrics(self) -> bool:
        """Whether it has metrics of the log-probabilities of targets."""
        ...

    @property
    def needs_intermediates(self) -> bool:
        """Whether some of these need what the model computes beside the scores."""
        ...

    @property
    def stop_ids(self) -> Sequence[int]:
        """The ids that end a prediction."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """What of its metrics cannot be run, in words."""
        ...

    def overlong(self, rows: int, examples: int) -> "Overlong":
        """Returns how many of the examples in the first `rows` rows of `batches`, and of the first `examples` examples,
        do not fit `lengths`."""
        ...

    def batches(self) -> Iterator[tuple[Batch, int]]:
        """Yields (global batch, number of real rows); rows past that number are padding of weight 0."""
        ...

    def score_batches(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (global batch, example index of each real row); an example may have several rows, or none."""
        ...

    def prompt_batches(self, batch_size: int | None = None) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (batch to predict from, example index of each real row); rows past those repeat the last one.

        Raises UserError when the task's converter has nothing to predict from.
        """
        ...

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Returns examples as their task made them, before any converter."""
        ...

    def inputs_text(self, index: int) -> str:
        """Returns example `index`'s input as text, for people to read ('' where a task has none)."""
        ...

    def postprocess(self, index: int, tokens: np.ndarray) -> Any:
        """Turns the predicted token ids of example `index`, [length] or of all decodes [decodes, length], into what its
        metrics compare."""
        ...

    def target(self, index: int) -> Any:
        """Returns the postprocessed target of example `index`."""
        ...

    def merging(self, paired: bool = False) -> Merging:
        """Begins the metrics of one evaluation. `paired`: metrics of scores get (scores, intermediates)."""
        ...

    def metrics(
        self,
        predictions: Sequence[Any] | None = None,
        aux_values: Mapping[str, Sequence[Any]] | None = None,
        scores: Mapping[int, float] | None = None,
        tokens: np.ndarray | None = None,
        intermediates: Mapping[str, Any] | None = None,
        paired: bool = False,
        merged: Any = None,
    ) -> Measured:
        """Returns the task's metrics of postprocessed predictions, in example order (may be the first n examples), of
        values that belong to them, of scores by example index, of the predictions' token ids [n, ..., length], and of
        what the model computed beside the scores, in the examples' order. `paired`: metrics of scores get both.
        `merged`: what `merging` returned, given all batches."""
        ...
