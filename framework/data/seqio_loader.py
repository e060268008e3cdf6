"""Any registered task or mixture streamed uncached through seqio's own pipelines, for a first look.

Its limits: batches depend on how many processes read, and a resumed run reads again, and drops, all that came before.
For anything longer, `grain_loader.CachedData` reads the same tasks from a cache.
"""

import contextlib
import copy
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from meshway.framework.data import seqio_adapter, seqio_caches, seqio_sources, seqio_steps, task_data
from meshway.framework.data.eval_task import (
    EVAL_SEED,
    EvalLengths,
    TaskEvaluation,
    given_lengths,
    measured_lengths,
)
from meshway.framework.data.objective import Converter, Objective, Spec, TaskInfo
from meshway.framework.data.rows.examples import Lazy
from meshway.framework.data.rows.mixing import key_of
from meshway.framework.data.rows.online_source import StreamedSource
from meshway.framework.data.rows.packing import Example
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.seqio_converters import adapted
from meshway.framework.data.source import SplitRead
from meshway.framework.data.task_data import check_arguments, framing_of, module_names, vocabularies_of, with_split
from meshway.framework.data.vocabulary import Framing, Vocabulary, vocabulary_sizes
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch

_SLOW = 1000  # batches between progress lines while batches are skipped
_END = "meshway: end of a pass"  # a name that no task's feature has


class SeqioData:
    """A task or mixture of seqio's registry, streamed for training and read into memory for evaluation.

    Each pass over a task visits each of its examples once; a process reads its own share of them. A mixture deals rows,
    each of one task, as `CachedData` does.

    Args:
      mixture_or_task_name: the registered name.
      lengths: TASK_FEATURE_LENGTHS, in tokens by task feature.
      batch_size: rows of a global batch.
      converter: turns a task's examples into the model's arrays.
      module: name(s) of the Python module(s) whose import registers the tasks.
      seed: of order and of the tasks' own randomness, at least 0.
      train_split: what `train` reads.
      eval_split: what `eval_tasks` read.
      eval_examples: evaluate on the first so many examples of each task (None: all).
      eval_lengths: as `CachedData` has it.
      shuffle: whether seqio shuffles each pass, by files and a buffer.
      use_cached: read the tasks from seqio's own offline cache (made by seqio_cache_tasks).
      seqio_cache_dirs: where such caches are, beside seqio's global cache directories; of use with `use_cached` alone.
      vocabularies: the vocabulary expected of each feature; any other is an error.
      start: ids that a decoder reads before a text; None takes those of the vocabulary of `targets` (BOS, or T5's 0).
      stop_ids: ids that end a prediction beside the EOS of that vocabulary.
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
        eval_lengths: EvalLengths = "training",
        shuffle: bool = True,
        use_cached: bool = False,
        seqio_cache_dirs: str | Sequence[str] = (),
        vocabularies: Mapping[str, Any] | None = None,
        start: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        check_arguments("SeqioData", batch_size, seed, eval_examples)
        self.name = mixture_or_task_name
        self.lengths = dict(lengths)
        self.batch_size = batch_size
        self.converter = adapted(converter, self.lengths)
        self._modules = module_names(module)
        self._seed = seed
        self._train_split = train_split
        self.eval_split = eval_split
        self._eval_examples = eval_examples
        self._eval_lengths = eval_lengths
        given_lengths("SeqioData", eval_lengths, self.lengths)
        self._shuffle = shuffle
        if module_names(seqio_cache_dirs) and not use_cached:
            raise UserError(
                f"SeqioData.seqio_cache_dirs (SEQIO_CACHE_DIRS) is {seqio_cache_dirs!r}, and a task streamed with "
                "use_cached=False is read from its source: set SeqioData.use_cached = True, or read it by "
                "'data/cached.gin', which imports what is there; or leave these directories out"
            )
        self._use_cached = use_cached
        self._seqio_directories = module_names(seqio_cache_dirs)
        self._named = dict(vocabularies or {})
        self._start, self._stop_ids = start, stop_ids
        self._is_dry = False

    def for_dry_run(self) -> "SeqioData":
        """Returns the same source, without its note on opening; it reads nothing before the first batch anyway."""
        source = copy.copy(self)
        source._is_dry = True
        return source

    def reads(self, evaluate: bool) -> list[SplitRead]:
        """Returns what `train` reads, and with `evaluate` what `eval_tasks` do."""
        wanted = [("training", self._train_split)] + ([("evaluation", self.eval_split)] if evaluate else [])
        return [
            SplitRead(task.name, split, purpose, seqio_sources.source_count(task, split), None)
            for purpose, split in wanted
            for task in self._with_split(split, purpose)
        ]

    def train(self, rows: slice) -> "SeqioStream":
        """Opens the endless training stream; `rows` are this process's rows of each global batch.

        Raises:
          UserError: unknown task, module or split; lengths that do not fit; a task that fails to be read
            (then when the first batch is asked for).
        """
        rates = seqio_adapter.mixing_rates(self._provider)
        tasks = [task for task in self._with_split(self._train_split, "training") if rates[task.name]]
        if not tasks:
            raise UserError(f"mixture {self.name!r}: every task with split {self._train_split!r} has rate 0")
        objectives = [self._objective(task) for task in tasks]
        share = len(range(self.batch_size)[rows])
        if not self._is_dry:
            print(
                f"data: {self.name} streams uncached through seqio: a resumed run replays what it has read, and "
                "batches depend on the number of processes; `meshway cache` makes them exact",
                file=sys.stderr,
            )
        spec = self.converter.spec(self.lengths, self.batch_size)
        sizes = vocabulary_sizes(self.vocabularies(), self.lengths)
        shard, num_shards = (rows.start or 0) // share, self.batch_size // share
        part = f" in shard {shard + 1} of {num_shards}, one for each process" if num_shards > 1 else ""

        def open_rows() -> RowStream:
            sources = []
            for task, objective in zip(tasks, objectives, strict=True):
                # seqio gives all shards the same random numbers.
                seed = key_of(self._seed, task.name, shard)
                passes = self._passes(task, shard, num_shards, seed)
                bind = functools.partial(self._objective, task)
                arguments = (objective, self.converter.pack, seed, sizes, part, bind)
                sources.append(StreamedSource(task.name, passes, *arguments))
            return RowStream(self.name, sources, rates, [], spec, share, slice(0, share), self._seed)

        return SeqioStream(open_rows, spec)

    def eval_tasks(self, split: str | None = None) -> list[TaskEvaluation]:
        """Opens a split, by default `eval_split`, of each sub-task that has it; raises UserError when none has."""
        split = split or self.eval_split
        vocabularies = self.vocabularies()
        tasks = self._with_split(split, "evaluation")
        given = given_lengths("SeqioData", self._eval_lengths, self.lengths)
        examples = [
            Lazy(
                functools.partial(self._read, task, split, given),
                functools.partial(self._read, task, split, {})
                if given and task_data.trims(task.preprocessors)
                else None,
            )
            for task in tasks
        ]
        lengths = self.lengths | given
        if given.keys() != lengths.keys() and not self._is_dry:
            for task in tasks:
                task_data.check_measurable(task.name, task.preprocessors, given)
            opened = [(self._objective(task), each) for task, each in zip(tasks, examples, strict=True)]
            lengths = measured_lengths(opened, given, lengths)
        return [
            TaskEvaluation(
                task.name,
                each,
                self._objective(task, lengths=lengths),
                self.converter,
                lengths,
                self.batch_size,
                vocabularies,
                task,
                self._framing.stop if self._framing else (),
            )
            for task, each in zip(tasks, examples, strict=True)
        ]

    def framing(self) -> Framing | None:
        """Returns the ids that start a decoder's text and end a prediction; None if `targets` hold no text."""
        return framing_of(self.vocabularies(), self._start, self._stop_ids)

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Returns the vocabulary of each feature that the converter reads."""
        return vocabularies_of(self.name, self._tasks, self.converter, self._named)

    @functools.cached_property
    def _framing(self) -> Framing | None:
        return self.framing()

    @functools.cached_property
    def _provider(self) -> Any:
        seqio_caches.add_directories(self._seqio_directories)
        return seqio_adapter.find_provider(self.name, self._modules)

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        """The task, or a mixture's tasks."""
        tasks = seqio_adapter.subtasks(self._provider)
        for task in tasks:
            if self._use_cached and not task.supports_caching:
                raise UserError(
                    f"task {task.name!r} cannot be read with use_cached=True: it has no CacheDatasetPlaceholder"
                )
            if self._use_cached and not task.cache_dir:
                raise UserError(
                    f"task {task.name!r} is in no cache directory of seqio's ({self._seqio_directories} and those of "
                    "seqio.add_global_cache_dirs), as use_cached=True asks"
                )
        return tasks

    def _with_split(self, split: str, purpose: str) -> list[Any]:
        splits: dict[str, list[str]] = {}
        for task in self._tasks:
            with seqio_adapter.task_errors(task.name, f"split {split!r}"):
                splits[task.name] = list(task.splits)
        # A slice such as 'train[:90%]' is left to the source.
        having = with_split(splits, re.sub(r"\[.*\]$", "", split), purpose, self.name)
        return [task for task in self._tasks if task.name in having]

    def _objective(
        self, task: Any, empty: frozenset[str] = frozenset(), lengths: Mapping[str, int] | None = None
    ) -> Objective:
        """Returns the objective of a task; `empty` names features that hold nothing in any example."""
        framing = self._framing
        start, bos = (framing.start, framing.bos) if framing else ((), ())
        features = {name: info for name, info in seqio_steps.declared(task).items() if name not in empty}
        return self.converter.bind(TaskInfo(task.name, features, start, empty, bos), lengths or self.lengths)

    def _passes(self, task: Any, shard: int, num_shards: int, seed: int) -> Iterator[Example | None]:
        """Yields this process's examples of a task without end, None after each pass."""
        seqio = seqio_adapter.import_seqio()
        with seqio_adapter.task_errors(task.name, f"split {self._train_split!r}"):
            with seqio_adapter.seqio_lock, _fresh_each_pass():
                dataset = task.get_dataset(
                    self.lengths,
                    self._train_split,
                    use_cached=self._use_cached,
                    shuffle=self._shuffle,
                    seed=seed % 2**31,
                    shard_info=seqio.ShardInfo(shard, num_shards),
                    num_epochs=1,
                )
            for example in seqio_adapter.numpy_examples(_with_ends(dataset).repeat()):
                yield None if example[_END] else {name: value for name, value in example.items() if name != _END}

    def _read(self, task: Any, split: str, lengths: Mapping[str, int]) -> list[Example]:
        """Returns the evaluation examples of a task, in its order, and whole: the converter truncates, and counts."""
        with seqio_adapter.task_errors(task.name, f"split {split!r}"):
            with seqio_adapter.seqio_lock:
                dataset = task.get_dataset(
                    dict(lengths) or None,
                    split,
                    trim_output_features=False,
                    use_cached=self._use_cached,
                    shuffle=False,
                    seed=EVAL_SEED,
                    num_epochs=1,
                    try_in_mem_cache=False,
                )
            if self._eval_examples is not None:
                dataset = dataset.take(self._eval_examples)
            return list(seqio_adapter.numpy_examples(seqio_adapter.in_order(dataset)))


class SeqioStream:
    """The `Dataset` of `SeqioData.train`: this process's rows, from the start.

    Args:
      open_rows: () -> the rows, from the start.
      spec: the global batch features.
    """

    def __init__(self, open_rows: Callable[[], RowStream], spec: Spec) -> None:
        self._open, self._spec = open_rows, spec
        self._rows: RowStream | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._rows is None:
            self._rows = self._open()
        return next(self._rows)

    def state(self) -> dict[str, int]:
        """Returns how many batches were read."""
        return {"batches": self._rows.position if self._rows else 0}

    def restore(self, state: Mapping[str, int]) -> None:
        """Reads from the start again and drops what was read before; raises UserError for another kind of state."""
        if set(state) != {"batches"}:
            raise UserError(
                f"the saved data position {dict(state)} is not one of an uncached stream: resume with the DATA of "
                "the run that saved it"
            )
        self._rows = None
        for number in range(1, int(state["batches"]) + 1):
            next(self)
            if number % _SLOW == 0:
                print(f"data: replayed {number:,} of {state['batches']:,} batches", file=sys.stderr)

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._spec)


@contextlib.contextmanager
def _fresh_each_pass() -> Iterator[None]:
    """Makes the random numbers of seqio's preprocessors differ between passes over a dataset built inside the block.

    seqio itself repeats a task before its random steps. We repeat it after them, where the end of a pass is known; the
    numbers would otherwise be the same in each pass.
    """
    import tensorflow as tf

    usual = tf.data.Dataset.random
    tf.data.Dataset.random = staticmethod(functools.partial(usual, rerandomize_each_iteration=True))
    try:
        yield
    finally:
        tf.data.Dataset.random = staticmethod(usual)


def _with_ends(dataset: Any) -> Any:
    """Returns a pass with one element more, the end: the feature `_END` tells it from the examples."""
    import tensorflow as tf

    specs = {name: spec for name, spec in dataset.element_spec.items() if isinstance(spec, tf.TensorSpec)}
    shapes = {name: spec.shape if spec.shape.rank else [] for name, spec in specs.items()}
    nothing = {name: tf.zeros([size or 0 for size in shapes[name]], spec.dtype) for name, spec in specs.items()}
    end = tf.data.Dataset.from_tensors({**nothing, _END: True})
    return dataset.map(lambda example: {name: example[name] for name in specs} | {_END: False}).concatenate(end)
