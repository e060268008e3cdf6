"""Registering tasks and mixtures with seqio, again and again if a module is reloaded."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from meshway.tasks.preprocessors import Step


class CountedSource(seqio.FunctionDataSource):
    """A source that counts its examples when asked, so that registering a task reads nothing.

    Args:
      dataset_fn: as seqio has it: (split, shuffle_files, seed=None) -> dataset.
      splits: names of the splits.
      count_fn: split -> number of examples.
    """

    def __init__(
        self, dataset_fn: Callable[..., tf.data.Dataset], splits: Sequence[str], count_fn: Callable[[str], int]
    ) -> None:
        super().__init__(dataset_fn, splits=splits)
        self._count_fn = count_fn

    def num_input_examples(self, split: str) -> int:
        """Returns the number of examples of `split`, before any preprocessor."""
        return self._count_fn(split)


def add_task(
    name: str,
    source: seqio.DataSource,
    features: Mapping[str, seqio.Feature],
    steps: Sequence[Step],
    metric_fns: Sequence[Callable[..., dict[str, float]]] = (),
) -> None:
    """Registers a task, in place of an earlier one of the same name."""
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=list(steps),
        output_features=dict(features),
        metric_fns=list(metric_fns),
    )


def add_mixture(name: str, tasks: Sequence[Any], default_rate: Any = None) -> None:
    """Registers a mixture of names or (name, rate) pairs, in place of an earlier one of the same name."""
    seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, list(tasks), default_rate=default_rate)


def text_features(vocabulary: seqio.Vocabulary) -> dict[str, seqio.Feature]:
    """Returns the features of a task whose examples are whole texts, `targets`, for objectives that corrupt them.

    `inputs` is declared, as a feature that need not be there, because seqio mixes only tasks that declare the
    same features: so a text task mixes with one that has inputs and targets.
    """
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=True, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
