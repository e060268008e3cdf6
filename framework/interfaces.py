"""The contracts between the framework and what it runs: nothing here is inherited, all is met by shape.

Those of data are in `data/source.py`, those of feature converters in `data/objective.py`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

Params = dict[str, Any]  # nested dicts, keys are strings, leaves are arrays
Axes = dict[str, Any]  # the same tree; each leaf is a tuple of logical axis names
Batch = Mapping[str, Any]  # feature name -> array [batch, ...] (numpy on the host, jax.Array on devices)
Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight): the mean is taken once, globally
Cache = Any  # a pytree of arrays, of the model's own choice


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and logical axes of one feature of a global batch."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]


class Model(Protocol):
    """An objective with its network: what training, scoring and teacher-forced evaluation need of a model."""

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


class Updates(Protocol):
    """What a model with variables that its loss itself updates, such as batch statistics, has beside `Model`. They are
    among its parameters, of `init` and `axes`; evaluation and decoding read them there."""

    def untrained(self) -> Collection[str]:
        """Returns the '/'-joined paths of these variables: no gradient trains them."""
        ...

    def loss_and_updates(
        self, params: Params, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, Metrics, Params]:
        """Returns what `loss` does, and the new values of `untrained`, a part of the tree of `params`."""
        ...


def untrained(model: Model) -> Collection[str]:
    """Returns the paths of the variables that a model's loss updates itself; () of a model without (see `Updates`)."""
    paths = getattr(model, "untrained", None)
    return () if paths is None else paths()


class Stacked(Protocol):
    """What a model that stores parameters of layers as [layers, ...] may have beside `Model`: every method then takes
    each of them as a tuple of one array a layer, too, and a cache may differ with that."""

    def stacked(self) -> Collection[str]:
        """Returns the '/'-joined paths of these parameters."""
        ...


def stacked(model: Model) -> Collection[str]:
    """Returns the paths of the parameters that a model also takes by layer; () of a model without (see `Stacked`)."""
    paths = getattr(model, "stacked", None)
    return () if paths is None else paths()


class Quantizes(Protocol):
    """What a model that computes with quantised parameters may have beside `Model`: every method then takes each of
    those it names as a `qwix.QArray`, too, of the same shape."""

    def summed(self) -> Mapping[str, tuple[str, ...]]:
        """Returns by '/'-joined path the logical axes that products with a parameter sum over: one scale serves all
        entries along these."""
        ...


class Decodes(Protocol):
    """What prediction needs of a model beside `Model`: decoding with a cache, one token of each row at a time."""

    def prefill(self, params: Params, batch: Batch, max_length: int) -> tuple[jax.Array, jax.Array, Cache]:
        """Reads the inputs of a batch and returns the state that decoding starts from.

        Returns:
          (tokens [batch, 1] to feed first, their positions [batch], a cache with room for `max_length` new tokens).
        """
        ...

    def decode(self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds tokens [batch, 1] at positions [batch], one of each row; returns (logits [batch, vocab], cache)."""
        ...

    def fork(self, cache: Cache, times: int) -> Cache:
        """Returns a cache of `times` copies of each row, one after the other: several predictions of an example."""
        ...

    def reorder(self, cache: Cache, chosen: jax.Array) -> Cache:
        """Returns a cache of predictions as `fork` orders them: the j-th of example i is the old one's
        `chosen[i, j]`-th of that example; chosen int32 [batch, times]."""
        ...


class Extends(Protocol):
    """What a model that reads several tokens of each row at once may have beside `Decodes`: prompts are then read in
    chunks, between the steps of other rows, and what begins alike is read once."""

    def extend(self, params: Params, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Feeds tokens [batch, n] at positions [batch, n], each after those of its row at smaller positions; returns
        (logits [batch, n, vocab], cache)."""
        ...


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a writer is told that has `begin(attempt)`: one start of a run, or of evaluations beside it.

    Attributes:
      directory: the run directory; it may be in a bucket.
      start: the step that it resumes from, 0 where there is no checkpoint.
      reported: the last step that earlier attempts have reported, -1 for none: later than `start` after a crash.
      recipe: the resolved recipe, as gin text.
      evaluation: whether these are evaluations of saved checkpoints, whose steps come in any order.
    """

    directory: Path
    start: int
    reported: int
    recipe: str
    evaluation: bool = False


class Writer(Protocol):
    """Receives each report of a run: TensorBoard's, JSON lines', or one of a recipe (`train.train.loggers`).

    Made in every process, and called in process 0 alone: what it opens, it opens when it is first called. After a
    restart steps after the last checkpoint come again. A writer may also have `write_values(step, values)`, which gets
    what metrics return besides numbers, as `task_metrics.plain_values` has it: texts, images, sounds, histograms; and
    `begin(attempt)`, which is called before the others, in process 0.
    """

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of `step` by name: 'loss', 'validation/<task>/<metric>', ..."""
        ...

    def close(self) -> None:
        """Is called at the end, however the run ends."""
        ...
