"""The door to seqio's own pipelines: any registered task or mixture, streamed uncached, for a first look.

What it is not: batches depend on how many processes read, and a resumed run reads and drops all it has had. For
anything longer `grain_loader.CachedData` reads the same tasks from a cache.
"""

import copy
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from meshway.framework.data import seqio_door, seqio_steps
from meshway.framework.data.eval_task import EVAL_SEED, TaskEvaluation
from meshway.framework.data.objective import Converter, Objective, Spec, TaskInfo
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.order import key_of
from meshway.framework.data.rows.packing import Arrays, Example
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.task_data import check_arguments, framing_of, vocabularies_of, with_split
from meshway.framework.data.vocabulary import Framing, Vocabulary
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch, SplitRead

_BUFFER = 1024  # examples packed together
_SLOW = 1000  # skipping this many batches is worth a line of progress
_FRUITLESS = 100  # buffers in a row that may give no row


class SeqioData:
    """A task or mixture of seqio's registry, streamed for training and read into memory for evaluation.

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
      shuffle: whether seqio shuffles, by files and a buffer.
      use_cached: read the tasks from seqio's own offline cache (made by seqio_cache_tasks).
      vocabularies: the vocabulary expected of each feature; any other is an error.
      start: ids that a decoder reads before a text; None goes by the vocabulary of `targets` (its BOS, T5's 0).
      stop_ids: ids that end a prediction; None: the EOS of that vocabulary.
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
        vocabularies: Mapping[str, Any] | None = None,
        start: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        check_arguments("SeqioData", batch_size, seed, eval_examples)
        self.name = mixture_or_task_name
        self.lengths = dict(lengths)
        self.batch_size = batch_size
        self.converter = converter
        self._modules = [module] if isinstance(module, str) else list(module or ())
        self._seed = seed
        self._train_split = train_split
        self.eval_split = eval_split
        self._eval_examples = eval_examples
        self._shuffle = shuffle
        self._use_cached = use_cached
        self._named = dict(vocabularies or {})
        self._start, self._stop_ids = start, stop_ids
        self._is_dry = False

    def for_dry_run(self) -> "SeqioData":
        """Returns the same source, which says nothing as it is opened. It reads nothing before a batch is asked for."""
        source = copy.copy(self)
        source._is_dry = True
        return source

    def reads(self, evaluate: bool) -> list[SplitRead]:
        """Returns what `train` reads, and with `evaluate` what `eval_tasks` do."""
        wanted = [("training", self._train_split)] + ([("evaluation", self.eval_split)] if evaluate else [])
        return [
            SplitRead(task.name, split, purpose, seqio_steps.source_count(task, split), None)
            for purpose, split in wanted
            for task in self._with_split(split, purpose)
        ]

    def train(self, rows: slice) -> "SeqioStream":
        """Opens the endless training stream; `rows` are this process's rows of each global batch.

        Raises:
          UserError: unknown task, module or split; lengths that do not fit; a task that fails to be read
            (then when the first batch is asked for).
        """
        seqio_door.mixing_rates(self._provider)  # complains about a mixture that cannot be read
        tasks = self._with_split(self._train_split, "training")
        share = len(range(self.batch_size)[rows])
        if not self._is_dry:
            print(
                f"data: {self.name} streams uncached through seqio: a resumed run replays what it has read, and "
                "batches depend on the number of processes; `meshway cache` makes them exact",
                file=sys.stderr,
            )
        return SeqioStream(
            self.name,
            functools.partial(self._stream, (rows.start or 0) // share, self.batch_size // share),
            self._objective(tasks[0]),
            self.converter.pack,
            self.converter.spec(self.lengths, self.batch_size),
            share,
            self._seed,
        )

    def eval_tasks(self, split: str | None = None) -> list[TaskEvaluation]:
        """Opens a split, by default `eval_split`, of each sub-task that has it; raises UserError when none has."""
        split = split or self.eval_split
        vocabularies = self.vocabularies()
        return [
            TaskEvaluation(
                task.name,
                _Late(functools.partial(self._read, task, split)),
                self._objective(task),
                self.converter,
                self.lengths,
                self.batch_size,
                vocabularies,
                task,
                self._framing.stop if self._framing else (),
            )
            for task in self._with_split(split, "evaluation")
        ]

    def framing(self) -> Framing | None:
        """Returns what decoders read before a text, and what ends a prediction; None where no `targets` hold text."""
        return framing_of(self.vocabularies(), self._start, self._stop_ids)

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Returns the vocabulary of each feature that the converter reads."""
        return vocabularies_of(self.name, self._tasks, self.converter, self._named)

    @functools.cached_property
    def _framing(self) -> Framing | None:
        return self.framing()

    @functools.cached_property
    def _provider(self) -> Any:
        return seqio_door.find_provider(self.name, self._modules)

    @functools.cached_property
    def _tasks(self) -> list[Any]:
        """The task, or a mixture's tasks."""
        tasks = seqio_door.subtasks(self._provider)
        for task in tasks:
            if self._use_cached and not task.supports_caching:
                raise UserError(
                    f"task {task.name!r} cannot be read with use_cached=True: it has no CacheDatasetPlaceholder"
                )
        return tasks

    def _with_split(self, split: str, purpose: str) -> list[Any]:
        splits: dict[str, list[str]] = {}
        for task in self._tasks:
            with seqio_door.task_errors(task.name, f"split {split!r}"):
                splits[task.name] = list(task.splits)
        # A slice such as 'train[:90%]' is a matter of its source.
        having = with_split(splits, re.sub(r"\[.*\]$", "", split), purpose, self.name)
        return [task for task in self._tasks if task.name in having]

    def _objective(self, task: Any) -> Objective:
        start = self._framing.start if self._framing else ()
        return self.converter.bind(TaskInfo(task.name, seqio_steps.declared(task), start), self.lengths)

    def _stream(self, shard: int, num_shards: int) -> Iterator[Example]:
        """Yields this process's examples, without end."""
        seqio = seqio_door.import_seqio()
        what = f"split {self._train_split!r}"
        with seqio_door.task_errors(self.name, what):
            with seqio_door.seqio_lock:
                dataset = self._provider.get_dataset(
                    self.lengths,
                    self._train_split,
                    use_cached=self._use_cached,
                    shuffle=self._shuffle,
                    # seqio gives all shards the same random numbers.
                    seed=key_of(self._seed, self.name, shard) % 2**31,
                    shard_info=seqio.ShardInfo(shard, num_shards),
                    num_epochs=None,
                )
            yield from seqio_door.numpy_examples(dataset)

    def _read(self, task: Any, split: str) -> list[Example]:
        """Returns the evaluation examples of a task, in its order."""
        with seqio_door.task_errors(task.name, f"split {split!r}"):
            with seqio_door.seqio_lock:
                dataset = task.get_dataset(
                    self.lengths,
                    split,
                    use_cached=self._use_cached,
                    shuffle=False,
                    seed=EVAL_SEED,
                    num_epochs=1,
                    try_in_mem_cache=False,
                )
            if self._eval_examples is not None:
                dataset = dataset.take(self._eval_examples)
            return list(seqio_door.numpy_examples(seqio_steps.in_order(dataset)))


class SeqioStream:
    """The `Dataset` of `SeqioData.train`: this process's examples, packed a buffer at a time.

    Args:
      name: what is read, for messages.
      open_examples: () -> the endless examples of this process, from the start.
      objective: what becomes of them.
      pack: whether rows hold several items.
      spec: the global batch features.
      share: this process's rows of a batch.
      seed: of the objective's randomness.
    """

    def __init__(
        self,
        name: str,
        open_examples: Callable[[], Iterator[Example]],
        objective: Objective,
        pack: bool,
        spec: Spec,
        share: int,
        seed: int,
    ) -> None:
        self._name = name
        self._open = open_examples
        self._objective = objective
        self._pack = pack
        self._spec = spec
        self._share = share
        self._seed = seed
        self._source: RowSource | None = None
        self._batches = self._buffers = self._row = 0
        self._examples = open_examples()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        parts: list[Arrays] = []
        missing = self._share
        while missing:
            if self._source is None or self._row >= self._source.rows_in_round(0):
                self._source, self._row = self._next_source(), 0
            stop = min(self._row + missing, self._source.rows_in_round(0))
            arrays, _ = self._source.take(np.arange(self._row, stop))
            parts.append(arrays)
            missing -= stop - self._row
            self._row = stop
        self._batches += 1
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def state(self) -> dict[str, int]:
        """Returns how many batches were read."""
        return {"batches": self._batches}

    def restore(self, state: Mapping[str, int]) -> None:
        """Reads from the start again and drops what was read before; raises UserError for another kind of state."""
        if set(state) != {"batches"}:
            raise UserError(
                f"the saved data position {dict(state)} is not one of an uncached stream: resume with the DATA of "
                "the run that saved it"
            )
        self._source, self._batches, self._buffers, self._examples = None, 0, 0, self._open()
        for _ in range(int(state["batches"])):
            next(self)
            if self._batches % _SLOW == 0:
                print(f"data: replayed {self._batches:,} of {state['batches']:,} batches", file=sys.stderr)

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature."""
        return dict(self._spec)

    def _next_source(self) -> RowSource:
        """Returns the rows of the next buffer of examples."""
        for _ in range(_FRUITLESS):
            examples = InMemory(list(itertools.islice(self._examples, _BUFFER)))
            if not len(examples):
                raise UserError(f"the stream of {self._name!r} has ended; a training stream must not")
            self._buffers += 1
            if not self._objective.row_lengths or self._objective.parts(examples.sizes).any():
                seed = key_of(self._seed, self._buffers)
                return RowSource(self._name, examples, self._objective, self._pack, True, seed)
        raise UserError(
            f"{self._name!r}: {_FRUITLESS * _BUFFER:,} examples in a row were all left out by the objective"
        )


class _Late:
    """Examples that are read into memory when they are first needed."""

    def __init__(self, read: Callable[[], list[Example]]) -> None:
        self._read = read

    def __len__(self) -> int:
        return len(self._loaded)

    @property
    def sizes(self) -> Mapping[str, np.ndarray]:
        return self._loaded.sizes

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        return self._loaded.read(indices)

    @functools.cached_property
    def _loaded(self) -> InMemory:
        return InMemory(self._read())
