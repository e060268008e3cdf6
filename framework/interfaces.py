"""The contracts between the framework and what it runs: nothing here is inherited, all is met by shape."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from meshway.framework.data.vocabulary import Framing, Vocabulary

Params = dict[str, Any]  # nested dicts, keys are strings, leaves are arrays
Axes = dict[str, Any]  # the same tree; each leaf is a tuple of logical axis names
Batch = Mapping[str, Any]  # feature name -> array [batch, ...] (numpy on the host, jax.Array on devices)
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): the mean is taken once, globally
Cache = Any  # a pytree of arrays: what decoding remembers


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and logical axes of one feature of a global batch."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


class Model(Protocol):
    """An objective with its network: all the framework ever asks of a model."""

    def init(self, rng: jax.Array) -> Params:
        """Returns fresh parameters. Pure, so that it can be traced for shapes or jitted into shards."""
        ...

    def axes(self) -> Axes:
        """Returns the logical axis names of each parameter, in the tree of `init`."""
        ...

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, ArraySpec]:
        """Returns what a batch must hold, for `lengths` in tokens by task feature (TASK_FEATURE_LENGTHS)."""
        ...

    def loss(self, params: Params, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics) of a batch, all float32; `rng` None means no dropout."""
        ...

    def score(self, params: Params, batch: Batch) -> jax.Array:
        """Returns the log-probability of each target token, float32 [batch, length], 0 where weights are 0."""
        ...

    def observe(self, params: Params, batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of the pass that `score` makes, by name, [batch, length, ...].

        Raises:
          ValueError: a name that the model does not know; says which it does.
        """
        ...

    def prefill(self, params: Params, batch: Batch, max_length: int) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads the inputs of a batch and returns what greedy search starts from.

        Returns:
          (tokens [batch, 1] to feed first, positions [batch] where they stand, a cache for `max_length` new tokens).
        """
        ...

    def decode(self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds one token a row, tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""
        ...

    def fork(self, cache: Cache, times: int) -> Cache:
        """Returns a cache of `times` copies of each row, one after the other: several predictions of an example."""
        ...

    def reorder(self, cache: Cache, chosen: jax.Array) -> Cache:
        """Returns a cache of predictions as `fork` orders them: the j-th of example i is the old one's
        `chosen[i, j]`-th of that example; chosen int32 [batch, times]."""
        ...


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


class Measured(NamedTuple):
    """What metric functions found.

    Attributes:
      values: metrics by name.
      failures: function -> what it raised.
    """

    values: dict[str, float]
    failures: dict[str, str]


class EvalTask(Protocol):
    """One split of a task, read once, in a fixed order, and its metrics."""

    name: str

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
    def stop_ids(self) -> Sequence[int]:
        """The ids that end a prediction."""
        ...

    @property
    def left_out(self) -> Sequence[str]:
        """What of its metrics cannot be run, in words."""
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

    def inputs_text(self, index: int) -> str:
        """Returns example `index`'s input as text, for people to read ('' where a task has none)."""
        ...

    def postprocess(self, index: int, tokens: np.ndarray) -> Any:
        """Turns the predicted token ids [length] of example `index` into what its metrics compare."""
        ...

    def target(self, index: int) -> Any:
        """Returns the postprocessed target of example `index`."""
        ...

    def metrics(
        self,
        predictions: Sequence[Any] | None = None,
        aux_values: Mapping[str, Sequence[Any]] | None = None,
        scores: Mapping[int, float] | None = None,
    ) -> Measured:
        """Returns the task's metrics of postprocessed predictions, in example order (may be the first n examples), of
        values that belong to them, and of scores by example index."""
        ...


class Writer(Protocol):
    """Receives each report of a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...
