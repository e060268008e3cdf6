"""Registering tasks with seqio (repeatedly, if need be), the packages they need, and files made once and cached."""

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import seqio
import tensorflow as tf

from meshway.tasks.preprocessors import Step


def package_directory(name: str, extra: str) -> Path:
    """Returns the directory of installed package `name`, which is not imported.

    Raises:
      ValueError: it is not installed; names the `extra` that installs it.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise not_installed(name, extra)
    return Path(spec.submodule_search_locations[0])


def not_installed(name: str, extra: str) -> ValueError:
    """Returns the error that names the extra which installs package `name`."""
    return ValueError(f"package {name!r}, which these tasks read, is not installed: pip install 'meshway[{extra}]'")


def cache_directory() -> Path:
    """Returns $MESHWAY_CACHE_DIR, else $XDG_CACHE_HOME/meshway, else ~/.cache/meshway."""
    if own := os.environ.get("MESHWAY_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meshway"


def cached_file(name: str, make: Callable[[], bytes]) -> Path:
    """Returns the path of cache file `name`, written from `make()` if it is not there.

    The file is written atomically, beside its final path and then moved there, so processes that race each make it and
    the last one wins. `name` must change whenever `make()` would return other bytes.

    Raises:
      ValueError: the cache directory cannot be written.
    """
    path = cache_directory() / name
    if path.is_file():
        return path
    content = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=name + ".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; set MESHWAY_CACHE_DIR to a directory that can be written"
        ) from error
    return path


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

    `inputs` is declared as an optional feature, because seqio mixes only tasks that declare the same features: so a
    text task mixes with one that has inputs and targets.
    """
    return {
        "inputs": seqio.Feature(vocabulary, add_eos=True, required=False),
        "targets": seqio.Feature(vocabulary, add_eos=True),
    }
