"""The door to seqio: any registered task or mixture as the framework's `DataSource`.

The only file of the framework that imports seqio and TensorFlow, and only inside functions: a run that
reads no seqio task never pays for them. Tasks are read whole into memory, an epoch at a time.
"""

import contextlib
import functools
import importlib
import os
import re
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from meshway.framework.data.eval_task import SeqioEvalTask
from meshway.framework.data.features import Converter
from meshway.framework.data.packing import Example
from meshway.framework.data.stream import Mixer, RowStream, Source, epoch_seed
from meshway.framework.errors import UserError, did_you_mean

EVAL_SEED = 42  # the same for every run, so that runs of different seeds are measured on the same examples

_READ_AT_ONCE = 256  # examples handed from TensorFlow to numpy at a time

# seqio hands out preprocessing seeds from one counter of the process, while a dataset is put together; a
# training thread and an evaluation must not take from it at the same time.
_seqio_lock = threading.RLock()


class SeqioData:
    """A task or mixture of seqio's registry, read for training and evaluation.

    Args:
      mixture_or_task_name: the registered name.
      lengths: TASK_FEATURE_LENGTHS, in tokens by task feature.
      batch_size: rows of a global batch.
      converter: turns a task's examples into the model's arrays.
      module: name(s) of the Python module(s) whose import registers the tasks.
      seed: of order and of the tasks' own randomness, at least 0; both are fresh each epoch.
      train_split: what `train` reads.
      eval_split: what `eval_tasks` read.
      eval_examples: evaluate on the first so many examples of each task (None: all).
      shuffle: whether each epoch is permuted, whole; if not, examples come in the task's order.
      use_cached: read the tasks from seqio's offline cache.
    """

    def __init__(
        self,
        mixture_or_task_name: str,
        lengths: Mapping[str, int],
        batch_size: int,
        converter: Converter,
        module: str | Sequence[str] | None = None,
        seed: int = 0,
        train_split: str = "train",
        eval_split: str = "validation",
        eval_examples: int | None = None,
        shuffle: bool = True,
        use_cached: bool = False,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"SeqioData.{name} must be a whole number of at least {least}, not {value!r}")
        if eval_examples is not None and eval_examples < 1:
            raise UserError(f"SeqioData.eval_examples must be at least 1 or None (all), not {eval_examples!r}")
        self.name = mixture_or_task_name
        self.lengths = dict(lengths)
        self.batch_size = batch_size
        self.converter = converter
        self._modules = [module] if isinstance(module, str) else list(module or ())
        self._seed = seed
        self._train_split = train_split
        self._eval_split = eval_split
        self._eval_examples = eval_examples
        self._shuffle = shuffle
        self._use_cached = use_cached

    def train(self, rows: slice) -> RowStream:
        """Opens the endless training stream; `rows` are this process's rows of each global batch.

        Raises:
          UserError: unknown task, module or split; lengths that do not fit; a task that fails to be read
            (then when the first batch is asked for).
        """
        rates = self._rates()
        tasks = self._with_split(self._tasks, self._train_split, "training")
        sources = [
            Source(task.name, rates[task.name], functools.partial(self._read_epoch, task))
            for task in tasks
            if rates[task.name] > 0
        ]
        if not sources:
            raise UserError(f"mixture {self.name!r}: every task with split {self._train_split!r} has rate 0")
        mixer = Mixer(sources, self._seed, self._shuffle)
        return RowStream(self.name, mixer, self.converter, self.lengths, self.batch_size, rows)

    def eval_tasks(self) -> list[SeqioEvalTask]:
        """Opens the evaluation split of each sub-task that has it; raises UserError when none has."""
        return [
            SeqioEvalTask(
                task,
                functools.partial(self._read, task, self._eval_split, EVAL_SEED, self._eval_examples),
                self.converter,
                self.lengths,
                self.batch_size,
            )
            for task in self._with_split(self._tasks, self._eval_split, "evaluation")
        ]

    def vocabularies(self) -> dict[str, int]:
        """Returns the vocabulary size, extra ids included, of each feature that the converter reads."""
        features = self._tasks[0].output_features
        with _task_errors(self.name, "vocabulary"):
            return {name: int(features[name].vocabulary.vocab_size) for name in self.converter.task_features}

    @functools.cached_property
    def _provider(self) -> Any:
        """The registered task or mixture, after importing what registers it."""
        seqio = import_seqio()
        for module in self._modules:
            _import_module(module)
        tasks, mixtures = set(seqio.TaskRegistry.names()), set(seqio.MixtureRegistry.names())
        if self.name not in tasks | mixtures:
            modules = ", ".join(self._modules) or "no module; MIXTURE_OR_TASK_MODULE names one to import"
            raise UserError(
                f"no task or mixture is registered as {self.name!r} (registered by: {modules})"
                f"{did_you_mean(self.name, sorted(tasks | mixtures))}"
            )
        return seqio.get_mixture_or_task(self.name)

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        """The task, or a mixture's tasks, checked against the converter and the lengths."""
        seqio = import_seqio()
        tasks = list(seqio.get_subtasks(self._provider))
        if isinstance(self._provider, seqio.Mixture):
            with _task_errors(self.name, "features"):
                self._provider._check_compatible_features()
        for task in tasks:
            self.converter.check(task.name, list(task.output_features), self.lengths)
            for name in self.converter.task_features:
                feature = task.output_features[name]
                if feature.rank != 1 or not feature.dtype.is_integer:
                    raise UserError(
                        f"task {task.name!r}: feature {name!r} has rank {feature.rank} and dtype "
                        f"{feature.dtype.name}; a converter reads token ids, rank 1"
                    )
            if self._use_cached and not task.supports_caching:
                raise UserError(
                    f"task {task.name!r} cannot be read with use_cached=True: it has no CacheDatasetPlaceholder"
                )
        return tasks

    def _rates(self) -> dict[str, float]:
        """Returns each task's mixing rate; 1 for a task alone."""
        provider = self._provider
        if not isinstance(provider, import_seqio().Mixture):
            return {provider.name: 1.0}
        import tensorflow as tf

        sample_fn = getattr(provider._sample_fn, "func", provider._sample_fn)
        if sample_fn is not tf.data.Dataset.sample_from_datasets:
            raise UserError(f"mixture {self.name!r} has a sample_fn of its own; examples are mixed by rate only")
        with _task_errors(self.name, "mixing rates"):
            return {task.name: float(provider.get_rate(task)) for task in self._tasks}

    def _with_split(self, tasks: Sequence[Any], split: str, purpose: str) -> list[Any]:
        """Returns the tasks that have `split`, saying which have not; UserError when none has."""
        having: list[tuple[Any, list[str]]] = []
        lacking: list[tuple[Any, list[str]]] = []
        for task in tasks:
            with _task_errors(task.name, f"split {split!r}"):
                splits = list(task.splits)
            # A slice such as 'train[:90%]' is a matter of its source.
            (having if re.sub(r"\[.*\]$", "", split) in splits else lacking).append((task, splits))
        if not having:
            known = sorted({name for _, splits in lacking for name in splits})
            raise UserError(
                f"{self.name!r} has no split {split!r} for {purpose}; it has {known}{did_you_mean(split, known)}"
            )
        if lacking:
            names = ", ".join(task.name for task, _ in lacking)
            print(f"data: {purpose} leaves out {names}: no split {split!r}", file=sys.stderr)
        return [task for task, _ in having]

    def _read_epoch(self, task: Any, epoch: int) -> list[Example]:
        return self._read(task, self._train_split, epoch_seed(self._seed, task.name, epoch), None)

    def _read(self, task: Any, split: str, seed: int, limit: int | None) -> list[Example]:
        """Returns one epoch of a task's split as numpy, in the task's order, seeded by `seed`."""
        import tensorflow as tf

        with _task_errors(task.name, f"split {split!r}"):
            with _seqio_lock:
                dataset = task.get_dataset(
                    self.lengths,
                    split,
                    use_cached=self._use_cached,
                    shuffle=False,
                    seed=seed,
                    num_epochs=1,
                    try_in_mem_cache=False,
                )
            options = tf.data.Options()
            options.deterministic = True  # a task may have turned it off
            dataset = dataset.with_options(options)
            return list(_examples(dataset if limit is None else dataset.take(limit)))


@functools.cache
def import_seqio() -> ModuleType:
    """Imports seqio with TensorFlow's start-up notes kept quiet and accelerators left to JAX.

    Raises:
      UserError: seqio or TensorFlow cannot be imported.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors stay; information and warnings go
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # of no use to data, and it complains about integers
    try:
        with _without_start_up_notes():
            import seqio
            import tensorflow as tf

            for kind in ("GPU", "TPU"):
                tf.config.set_visible_devices([], kind)
    except ImportError as error:
        raise UserError(f"seqio tasks need seqio and TensorFlow, which cannot be imported: {error}") from error
    except RuntimeError as error:
        raise UserError(f"TensorFlow already holds this machine's accelerators, which JAX needs: {error}") from error
    return seqio


@contextlib.contextmanager
def _without_start_up_notes() -> Iterator[None]:
    """Drops the information lines TensorFlow's C++ writes to stderr as it loads, and passes on all others.

    They come before any log level is read, so the stream itself is caught. Nothing is dropped when the
    block fails.
    """
    try:
        saved = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    # That CUDA cannot start is no error either: TensorFlow gets no accelerator here.
    note = re.compile(rb"[IW]\d{4} |WARNING: All log messages before absl|To enable the following|E\d{4} .*cuInit")
    failed = True
    with tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        os.dup2(caught.fileno(), 2)
        try:
            yield
            failed = False
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught:
                if failed or not note.match(line):
                    os.write(2, line)


def _examples(dataset: Any) -> Iterator[Example]:
    """Yields a tf.data.Dataset's elements as numpy, many at a time: one by one costs three times as much."""
    import tensorflow as tf

    specs = dataset.element_spec
    batchable = all(
        isinstance(spec, tf.TensorSpec) and (spec.shape.rank in (0, 1) or spec.shape.is_fully_defined())
        for spec in specs.values()
    )
    if not batchable:
        yield from dataset.as_numpy_iterator()
        return
    for batch in dataset.ragged_batch(_READ_AT_ONCE):
        columns = []
        for value in batch.values():
            if isinstance(value, tf.RaggedTensor):
                columns.append(np.split(value.values.numpy(), value.row_splits.numpy()[1:-1]))
            else:
                columns.append(list(value.numpy()))
        for row in zip(*columns, strict=True):
            yield dict(zip(batch, row, strict=True))


def _import_module(name: str) -> None:
    """Imports a module that registers tasks; UserError when it is not there or fails."""
    try:
        with _seqio_lock:
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
def _task_errors(name: str, what: str) -> Iterator[None]:
    """Turns whatever a task's own code, seqio or TensorFlow raises into a UserError that names the task."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = " ".join(lines[:3])[:600]
        raise UserError(f"task {name!r}, {what}: {type(error).__name__}: {message}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """Returns ' (at file:line)' of the innermost frame outside seqio, TensorFlow and this file, or ''."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not re.search(r"[/\\](seqio|tensorflow|importlib)[/\\]|<frozen|autograph", frame.filename):
            return "" if frame.filename == __file__ else f" (at {frame.filename}:{frame.lineno})"
    return ""
