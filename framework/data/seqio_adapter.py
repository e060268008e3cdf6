"""The adapter to seqio and TensorFlow: importing them quietly, looking tasks up, running them, reporting errors.

The `seqio_*.py` here are the only files of the framework that import seqio or TensorFlow, and only inside functions: a
run that reads no seqio task never pays for them.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from meshway.framework import terminal
from meshway.framework.data.cache.format import BYTES
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.rows.packing import Example
from meshway.framework.errors import UserError, did_you_mean

# Names of TensorFlow ops and datasets whose result differs from call to call.
_RANDOM = re.compile(
    r"Random|Shuffle|TruncatedNormal|Parameterized|Multinomial|SampleDistorted|Stateful(Uniform|Standard|Truncated)"
    r"|Rng|NonDeterministicInts|.*CandidateSampler"
)


def draws_random_numbers(dataset: Any) -> bool:
    """Returns whether any part of a dataset draws random numbers, its order included."""
    kinds = (re.sub(r"^_", "", type(part).__name__) for part in _parts(dataset))
    return any(_RANDOM.match(kind) for kind in kinds) or maps_randomly(dataset)


def maps_randomly(dataset: Any) -> bool:
    """Returns whether a function mapped over a dataset has a random operation, at any depth."""
    for part in _parts(dataset):
        for function in part._functions():
            graph = function.function.graph.as_graph_def()
            nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
            if any(_RANDOM.match(node.op) for node in nodes):
                return True
    return False


def _parts(dataset: Any) -> Iterator[Any]:
    yield dataset
    for part in dataset._inputs():
        yield from _parts(part)


_NAME = "tensorflow"
# That CUDA cannot start is no error either: TensorFlow gets no accelerator here.
_NOTE = re.compile(rb"[IW]\d{4} |WARNING: All log messages before absl|To enable the following|E\d{4} .*cuInit")


@contextlib.contextmanager
def dropped() -> Iterator[None]:
    """Makes an import of TensorFlow inside the `with` block quiet, and hides accelerators from it.

    Only lines written while TensorFlow itself is imported are filtered; those of a module that imports it are not.
    """
    if _NAME in sys.modules:
        yield
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors stay; information and warnings go
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of no use to data, and it complains about integers
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as the finders after it do, and makes TensorFlow's module run quietly."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _NAME:
            return None
        others = (other.find_spec(name, path, target) for other in sys.meta_path if other is not self)
        spec = next((found for found in others if found is not None), None)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_quietly(module: ModuleType) -> None:
                del loader.exec_module
                with without_notes():
                    run(module)
                    hide_accelerators(module)

            loader.exec_module = run_quietly
        return spec


def hide_accelerators(tensorflow: Any) -> None:
    """Leaves the machine's accelerators to JAX.

    Raises:
      RuntimeError: TensorFlow holds them already.
    """
    for kind in ("GPU", "TPU"):
        tensorflow.config.set_visible_devices([], kind)


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Drops notes from standard error, and passes on all other lines.

    They are written before any log level is read, so the stream itself is redirected. What Python prints meanwhile goes
    where it went before: a thread may say its last words and end the process. Nothing is dropped if the block fails.
    """
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as caught, terminal.spoken_on(saved):
        os.dup2(caught.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            os.dup2(saved, 2)
            caught.seek(0)
            for line in caught:
                if failed or not _NOTE.match(line):
                    os.write(2, line)


_READ_AT_ONCE = 256  # examples handed from TensorFlow to numpy at a time
# Code that is not at fault; a user's own folder may be called seqio.
_FOREIGN = re.compile(r"-packages[/\\](seqio|tensorflow)[/\\]|[/\\]importlib[/\\]|<frozen|autograph")

# seqio hands out preprocessing seeds from one counter of the process, while a dataset is put together; a
# training thread and an evaluation must not take from it at the same time.
seqio_lock = threading.RLock()


def installed() -> bool:
    """Returns whether seqio and TensorFlow are installed; without them a run can only read caches."""
    names = ("seqio", "tensorflow")  # None in sys.modules stands for one that may not be imported
    return all(sys.modules[name] if name in sys.modules else importlib.util.find_spec(name) for name in names)


@functools.cache
def import_seqio() -> ModuleType:
    """Imports seqio with TensorFlow's start-up notes kept quiet and accelerators left to JAX.

    Raises:
      UserError: seqio or TensorFlow cannot be imported.
    """
    stage = contextlib.nullcontext() if "seqio" in sys.modules else terminal.stage("importing seqio and TensorFlow")
    try:
        with stage, dropped():
            import seqio
            import tensorflow as tf

            with without_notes():
                hide_accelerators(tf)
    except ImportError as error:
        raise UserError(f"seqio tasks need seqio and TensorFlow, which cannot be imported: {error}") from error
    except RuntimeError as error:
        raise UserError(f"TensorFlow already holds this machine's accelerators, which JAX needs: {error}") from error
    return seqio


def find_provider(name: str, modules: Sequence[str]) -> Any:
    """Returns the registered task or mixture `name`, after importing the modules that register it.

    Raises:
      UserError: a module cannot be imported, or nothing of that name is registered.
    """
    seqio = import_seqio()
    for module in modules:
        _import_module(module)
    tasks, mixtures = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
    if name not in tasks | mixtures:
        listed = ", ".join(modules) or "no module; MIXTURE_OR_TASK_MODULE names one to import"
        raise UserError(
            f"no task or mixture is registered as {name!r} (registered by: {listed})"
            f"{did_you_mean(name, sorted(tasks | mixtures))}"
        )
    return seqio.get_mixture_or_task(name)


def registered(name: str, modules: Sequence[str]) -> list[Any]:
    """Returns the registered task, or a mixture's tasks; raises as `find_provider`."""
    return subtasks(find_provider(name, modules))


def subtasks(provider: Any) -> list[Any]:
    """Returns the task, or a mixture's tasks; UserError when a mixture's features do not agree."""
    seqio = import_seqio()
    if isinstance(provider, seqio.Mixture):
        with task_errors(provider.name, "features"):
            provider._check_compatible_features()
    return list(seqio.get_subtasks(provider))


def mixing_rates(provider: Any, counts: Mapping[str, Mapping[str, int]] | None = None) -> dict[str, float]:
    """Returns each task's mixing rate, sub-mixtures multiplied out; 1 for a task alone.

    Args:
      provider: the task or mixture.
      counts: task -> split -> number of its cached examples, for rates that ask for them.

    Raises:
      UserError: a rate cannot be computed, or the mixture mixes by a function of its own.
    """
    if not isinstance(provider, import_seqio().Mixture):
        return {provider.name: 1.0}
    import tensorflow as tf

    sample_fn = getattr(provider._sample_fn, "func", provider._sample_fn)
    if sample_fn is not tf.data.Dataset.sample_from_datasets:
        raise UserError(f"mixture {provider.name!r} has a sample_fn of its own; examples are mixed by rate only")
    with task_errors(provider.name, "mixing rates"), _counted(subtasks(provider), counts or {}):
        _check_rates(provider)
        return {task.name: float(provider.get_rate(task)) for task in subtasks(provider)}


def _check_rates(mixture: Any) -> None:
    """Raises UserError for a rate that is below 0 or not a number, in a mixture or its sub-mixtures.

    Each is checked by itself: multiplied or added up, a negative one might not show.
    """
    for name, rate in mixture.rate_per_task_name.items():
        part = mixture._task_map[name]
        is_mixture = isinstance(part, import_seqio().Mixture)
        if is_mixture:
            _check_rates(part)
        number = float(_rate(mixture, part, rate) if callable(rate) else rate)
        if not 0 <= number < math.inf:
            kind = "mixture" if is_mixture else "task"
            raise UserError(
                f"mixture {mixture.name!r}: the rate of {kind} {name!r} must be at least 0, not {number}; it is given "
                "where the mixture is registered"
            )


def _rate(mixture: Any, task: Any, rate: Callable[[Any], float]) -> float:
    try:
        return rate(task)
    except TypeError as error:
        if task.cache_dir or task.num_input_examples("train") is not None:
            raise
        raise UserError(
            f"mixture {mixture.name!r}: the rate of task {task.name!r} asks for its number of examples, which its "
            "source does not tell: cache it (`meshway cache`, which counts), give the source num_input_examples, or "
            "give the mixture a number as rate"
        ) from error


@contextlib.contextmanager
def _counted(tasks: Sequence[Any], counts: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """Puts our caches' counts where `seqio.mixing_rate_num_examples` and similar functions look for seqio's own."""
    counted = [task for task in tasks if task.name in counts]
    before = [(task._cache_dir, task._stats) for task in counted]
    for task in counted:
        task._cache_dir = f"the cache of {task.name}"
        task._stats = {split: {"examples": count} for split, count in counts[task.name].items()}
    try:
        yield
    finally:
        for task, (directory, stats) in zip(counted, before, strict=True):
            task._cache_dir, task._stats = directory, stats


def numpy_examples(dataset: Any) -> Iterator[Example]:
    """Yields a tf.data.Dataset's elements as numpy, fetched many at a time: one by one costs three times as much."""
    import tensorflow as tf

    batchable = all(
        isinstance(spec, tf.TensorSpec) and (spec.shape.rank in (0, 1) or spec.shape.is_fully_defined())
        for spec in dataset.element_spec.values()
    )
    if not batchable:
        yield from dataset.as_numpy_iterator()
        return
    for batch in dataset.ragged_batch(_READ_AT_ONCE):
        columns = []
        for value in batch.values():
            if isinstance(value, tf.RaggedTensor):
                flat, splits = value.values.numpy(), value.row_splits.numpy().tolist()
                columns.append([flat[start:stop] for start, stop in zip(splits, splits[1:], strict=False)])
            else:
                columns.append(list(value.numpy()))
        for row in zip(*columns, strict=True):
            yield dict(zip(batch, row, strict=True))


Column = tuple[Any, Any, Any]  # a feature of many examples: elements of all, where each one's end, its shape


def columns_of(examples: Sequence[Example], features: Mapping[str, FeatureInfo]) -> dict[str, Column]:
    """Returns features of numpy examples, concatenated, for `dataset_of`."""
    columns = {}
    for name, info in features.items():
        dtype = object if info.dtype == BYTES else np.dtype(info.dtype)
        arrays = [np.asarray(example[name], dtype) for example in examples]
        shapes = np.array([array.shape for array in arrays], np.int32).reshape(len(arrays), len(info.shape))
        flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.zeros(0, dtype)
        columns[name] = flat, np.cumsum([0, *(array.size for array in arrays)]), shapes
    return columns


def dataset_of(columns: Mapping[str, Column], features: Mapping[str, FeatureInfo], start: Any, stop: Any) -> Any:
    """Returns a dataset of the examples `start` to `stop` (integers or tensors) in columns of `features`, which may be
    arrays or tensors; a generator would be slow.
    """
    import tensorflow as tf

    tensors = {
        name: (tf.convert_to_tensor(flat, tf.string if features[name].dtype == BYTES else None), *more)
        for name, (flat, *more) in columns.items()
    }

    def example(index: Any) -> dict[str, Any]:
        row = {}
        for name, (flat, ends, shapes) in tensors.items():
            ends, shapes = tf.convert_to_tensor(ends), tf.convert_to_tensor(shapes)
            row[name] = tf.reshape(flat[ends[index] : ends[index + 1]], shapes[index])
            row[name].set_shape(features[name].shape)
        return row

    return tf.data.Dataset.range(start, stop).map(example)


def _import_module(name: str) -> None:
    """Imports a module that registers tasks; UserError when it is not there or fails."""
    try:
        with seqio_lock, contextlib.nullcontext() if name in sys.modules else terminal.stage(f"importing {name}"):
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"module {name!r}, which should register the tasks, is not found: no {error.name!r} in "
                "PYTHONPATH or the installed packages"
            ) from error
        raise UserError(f"module {name!r}, which should register the tasks, fails to import: {error}") from error
    except Exception as error:
        raise UserError(
            f"module {name!r}, which should register the tasks, fails to import: "
            f"{type(error).__name__}: {error}{_where(error)}"
        ) from error


@contextlib.contextmanager
def task_errors(name: str, what: str) -> Iterator[None]:
    """Turns any exception of a task's own code, seqio or TensorFlow into a UserError that names the task."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if lines[:1] == ["in user code:"]:  # autograph's own traceback, then the message
            said = next((at for at, line in enumerate(lines) if re.match(r"\w+: ", line)), len(lines) - 1)
            files = [re.match(r'File "(.*)", line (\d+)', line) for line in lines[:said]]
            at = [file for file in files if file and not _FOREIGN.search(file.group(1))]
            lines = [f"{lines[said]} (at {at[-1].group(1)}:{at[-1].group(2)})" if at else lines[said]]
        message = " ".join(lines[:3])[:600].removeprefix(f"{type(error).__name__}: ")
        raise UserError(f"task {name!r}, {what}: {type(error).__name__}: {message}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """Returns ' (at file:line)' of the innermost frame outside seqio, TensorFlow and this file, or ''."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _FOREIGN.search(frame.filename):
            ours = Path(frame.filename).parent == Path(__file__).parent
            return "" if ours else f" (at {frame.filename}:{frame.lineno})"
    return ""


def in_order(dataset: Any) -> Any:
    """Returns a dataset whose elements and their order are the same each time it is read."""
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = True  # a task may have turned it off
    if maps_randomly(dataset):  # an op with state must be called in order
        options.threading.private_threadpool_size = 1
    return dataset.with_options(options)
