"""Tasks read from their caches: the order is a pure function of (recipe, seed, batch), on any number of processes.

TensorFlow is needed only to build a missing cache (which happens on first use) and for steps after the cache.
"""

import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data import eval_task, seqio_adapter, seqio_caches, seqio_steps, task_data
from meshway.framework.data.cache import builder as cache_builder
from meshway.framework.data.cache.format import CachedSplit, features_from_json, read_json
from meshway.framework.data.cache.shards import cache_directory
from meshway.framework.data.cached_task import CachedTask, Sliced, bare_split, counts
from meshway.framework.data.objective import Converter, Objective, TaskInfo
from meshway.framework.data.prefetch import WorkerStream
from meshway.framework.data.rows.examples import TENSORFLOW, Examples, First, Lazy, Stepped, numpy_steps
from meshway.framework.data.rows.mixing import Rates, periods
from meshway.framework.data.rows.online_source import OnlineSource
from meshway.framework.data.rows.row_counts import RowTable
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream, Source
from meshway.framework.data.seqio_converters import adapted
from meshway.framework.data.source import SplitRead
from meshway.framework.data.task_data import (
    check_arguments,
    framing_of,
    module_names,
    vocabularies_of,
    with_split,
)
from meshway.framework.data.vocabularies import check_named, load
from meshway.framework.data.vocabulary import Framing, Vocabulary, vocabulary_sizes
from meshway.framework.distributed import processes
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import io_errors, local_path, replace_file


class CachedData:
    """A task or mixture read from its offline cache, for training and evaluation.

    Args:
      mixture_or_task_name: the registered name.
      lengths: TASK_FEATURE_LENGTHS, in tokens by task feature.
      batch_size: rows of a global batch.
      converter: turns a task's examples into the model's arrays.
      module: name(s) of the Python module(s) whose import registers the tasks.
      seed: of order and of all randomness, at least 0; both are fresh each epoch.
      train_split: what `train` reads, such as 'train' or a slice of the cached order, 'train[:90%]'.
      eval_split: what `eval_tasks` read.
      eval_examples: evaluate on the first so many examples of each task (None: all).
      eval_lengths: tokens by task feature when evaluating; None, or None for a feature: room for the longest example of
        the split. By default `lengths`.
      shuffle: whether order is random; if not, examples come in the cache's order.
      cache_dir: where tasks are cached; by default as for `meshway cache`.
      seqio_cache_dirs: where seqio's own script cached tasks, beside seqio's global cache directories: what is there is
        imported when it is first read, and its preprocessors up to the CacheDatasetPlaceholder do not run.
      build: whether a missing cache is built now; if not, it is an error.
      rates: other mixing rates from given steps on.
      num_workers: processes that prepare batches; 0: a thread. None: measured, a thread unless batches are slow.
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
        eval_lengths: eval_task.EvalLengths = "training",
        shuffle: bool = True,
        cache_dir: str | None = None,
        seqio_cache_dirs: str | Sequence[str] = (),
        build: bool = True,
        rates: Sequence[Rates] = (),
        num_workers: int | None = None,
        vocabularies: Mapping[str, Any] | None = None,
        start: Sequence[int] | None = None,
        stop_ids: Sequence[int] | None = None,
    ) -> None:
        check_arguments("CachedData", batch_size, seed, eval_examples)
        self.name = mixture_or_task_name
        self.lengths = dict(lengths)
        self.batch_size = batch_size
        self.converter = adapted(converter, self.lengths)
        self.modules = module_names(module)
        self._seed = seed
        self.train_split = train_split
        self.eval_split = eval_split
        self._eval_examples = eval_examples
        self._eval_lengths = eval_lengths
        eval_task.given_lengths("CachedData", eval_lengths, self.lengths)
        self._shuffle = shuffle
        self._directory = local_path(cache_dir) if cache_dir else cache_directory()
        self._seqio_directories = module_names(seqio_cache_dirs)
        self._build = build
        self._changes = list(rates)
        self._num_workers = num_workers
        self._named = dict(vocabularies or {})
        self._start, self._stop_ids = start, stop_ids
        self._is_dry = False

    def for_dry_run(self) -> "CachedData":
        """Returns the same source for a dry run: it makes the same checks and builds no cache.

        For a task that is not cached yet, `train` and `eval_tasks` provide only specs and counts.
        """
        source = self._copy()
        source._is_dry = True
        return source

    def _copy(self) -> "CachedData":
        """Returns the same source, which has not looked at any cache yet."""
        source = copy.copy(self)
        for name in ("tasks", "_framing", "_training"):
            vars(source).pop(name, None)
        return source

    def reads(self, evaluate: bool) -> list[SplitRead]:
        """Returns what `train` reads, and with `evaluate` what `eval_tasks` do."""
        wanted = [("training", self.train_split, self._training)]
        if evaluate:
            wanted.append(("evaluation", self.eval_split, self._with_split(self.eval_split, "evaluation")))
        return [
            SplitRead(task.name, split, purpose, task.num_examples(split), task.is_cached)
            for purpose, split, tasks in wanted
            for task in tasks
        ]

    def train(self, rows: slice) -> "RowStream | WorkerStream | task_data.Unread":
        """Opens the endless training stream; `rows` are this process's rows of each global batch.

        Raises:
          UserError: unknown task, module or split; lengths that do not fit; a cache that is missing, stale or corrupt.
        """
        tasks = self._training
        if not tasks:
            raise UserError(f"mixture {self.name!r}: every task with split {self.train_split!r} has rate 0")
        opened = [self.open_task(task, self.train_split) for task in tasks]
        spec = self.converter.spec(self.lengths, self.batch_size)
        rates = {task.name: task.rate for task in tasks}
        online = any(steps for _, _, steps in opened) or getattr(self.converter, "needs_tensorflow", False)
        if online and self._num_workers:
            raise UserError(
                f"{self.name!r} has steps after the cache that need TensorFlow, or a converter that does, which cannot "
                "run in worker processes: set CachedData.num_workers to 0"
            )
        if not all(task.is_cached for task in tasks):
            periods([task.name for task in tasks], rates, self._changes)
            return task_data.Unread(spec)
        for task, (objective, examples, steps) in zip(tasks, opened, strict=True):
            if not steps and processes.is_primary() and not self._is_dry:
                task_data.say_cut(task.name, examples, objective, list(self.lengths))
        sources = [self._source(task, *each) for task, each in zip(tasks, opened, strict=True)]
        stream = RowStream(self.name, sources, rates, self._changes, spec, self.batch_size, rows, self._seed)
        return stream if online or self._num_workers == 0 else WorkerStream(stream, self._num_workers)

    def count_rows(self) -> dict[str, list[int]]:
        """Counts the rows of training tasks that are packed, and keeps them beside their caches for every run.

        Returns:
          task -> rows of each pass, until they repeat; not of tasks whose rows are known only as they are read.

        Raises:
          UserError: a task is not cached: nothing is built here.
        """
        cached, found = self._copy(), {}
        cached._build = False
        for task in cached._training:
            source = cached._source(task, *cached.open_task(task, cached.train_split))
            if isinstance(source, RowSource):
                found[task.name] = source.count_rounds()
        return found

    def eval_tasks(self, split: str | None = None) -> list[eval_task.TaskEvaluation]:
        """Opens a split, by default `eval_split`, of each sub-task that has it; raises UserError when none has."""
        split = split or self.eval_split
        vocabularies = self.vocabularies()
        tasks = self._with_split(split, "evaluation")
        given = eval_task.given_lengths("CachedData", self._eval_lengths, self.lengths)
        lengths = self.lengths | given
        opened = [self._open_evaluation(task, split, lengths, given) for task in tasks]
        unseen = self._is_dry and any(task.is_cached and task.info["online"] == TENSORFLOW for task in tasks)
        if given.keys() != lengths.keys() and all(task.is_cached for task in tasks) and not unseen:
            read = [(objective, self._first(examples)) for objective, examples in opened]
            lengths = eval_task.measured_lengths(read, given, lengths)
            kept = [each if isinstance(each, Lazy) else None for _, each in opened]
            arguments = zip(tasks, kept, strict=True)
            opened = [self._open_evaluation(task, split, lengths, given, each) for task, each in arguments]
        rest = (self.converter, lengths, self.batch_size, vocabularies)
        stop = self._framing.stop if self._framing else ()
        return [
            eval_task.TaskEvaluation(task.name, self._first(examples), objective, *rest, task.task, stop)
            for task, (objective, examples) in zip(tasks, opened, strict=True)
        ]

    def _first(self, examples: Examples) -> Examples:
        return examples if self._eval_examples is None else First(examples, self._eval_examples)

    def _open_evaluation(
        self,
        task: CachedTask,
        split: str,
        lengths: Mapping[str, int],
        given: Mapping[str, int],
        stepped: Lazy | None = None,
    ) -> tuple[Objective, Examples]:
        """Returns a task's objective under `lengths`, and its examples; `stepped`: those after steps in TensorFlow."""
        objective, examples, online = self.open_task(task, split, lengths)
        if stepped is not None or not online or not task.is_cached:
            return objective, examples if stepped is None else stepped
        steps = task.task.preprocessors[task.info["cut"]["online_from"] :]
        if given.keys() != lengths.keys():
            task_data.check_measurable(task.name, steps, given)
        if self._is_dry:
            return objective, examples

        def read(lengths: Mapping[str, int]) -> list[Any]:
            return self._steps(task, lengths)(examples.read(range(len(examples))), eval_task.EVAL_SEED)

        whole = functools.partial(read, {}) if given and task_data.trims(steps) else None
        stepped = Lazy(functools.partial(read, given), whole)
        len(stepped)  # now: a step that fails does so before anything is compiled
        return objective, stepped

    def import_first(self, modules: Sequence[str]) -> None:
        """Adds modules that register tasks, as a recipe imports them; processes that write caches import them too."""
        self.modules = list(dict.fromkeys([*modules, *self.modules]))

    def framing(self) -> Framing | None:
        """Returns the ids that start a decoder's text and end a prediction; None if `targets` hold no text."""
        return framing_of(self.vocabularies(), self._start, self._stop_ids)

    def vocabularies(self) -> dict[str, Vocabulary]:
        """Returns the vocabulary of each feature that the converter reads and that holds text."""
        if "tasks" in vars(self):
            registered = [task.task for task in self.tasks]
        else:  # no cache is needed for them
            registered = seqio_adapter.registered(self.name, self.modules) if seqio_adapter.installed() else [None]
        if all(task is not None for task in registered):
            return vocabularies_of(self.name, registered, self.converter, self._named)
        found: dict[str, Vocabulary] = {}
        for task in self.tasks:
            features = features_from_json(task.info["features"])
            texts = [name for name in self.converter.task_features if name in features and features[name].vocabulary]
            found |= {name: load(task.directory / "vocabularies", name) for name in texts}
        check_named(self.name, found, self._named)
        return found

    @functools.cached_property
    def _vocabularies(self) -> dict[str, Vocabulary]:
        return self.vocabularies()

    @functools.cached_property
    def _framing(self) -> Framing | None:
        return self.framing()

    @functools.cached_property
    def _training(self) -> list[CachedTask]:
        return [task for task in self._with_split(self.train_split, "training") if self._may_be_drawn(task)]

    @functools.cached_property
    def tasks(self) -> list[CachedTask]:
        """The task, or a mixture's tasks, cached."""
        description = self._directory / f"{self.name}.json"
        if seqio_adapter.installed():
            seqio_caches.add_directories(self._seqio_directories)
            provider = seqio_adapter.find_provider(self.name, self.modules)
            tasks = {task.name: task for task in seqio_adapter.subtasks(provider)}
            missing = self._look_at_caches() if self._is_dry else self._ensure_caches()
            found = {name: counts(self._directory / name) for name in tasks}
            # A rate may need a number of examples, which is known only once the task is cached: any number does here.
            for name in missing:
                found[name] = dict.fromkeys(seqio_caches.splits(tasks[name], self._directory / name), 1)
            rates = seqio_adapter.mixing_rates(provider, found)
            if processes.is_primary() and not self._is_dry:
                _write_if_changed(description, {"rates": rates})
        elif (self._directory / self.name / "info.json").is_file():
            rates, tasks, missing = {self.name: 1.0}, {}, set()
        elif description.is_file():
            rates, tasks, missing = read_json(description)["rates"], {}, set()
        else:
            known = sorted(path.parent.name for path in self._directory.glob("*/info.json"))
            raise UserError(
                f"there is no cache of {self.name!r} in {self._directory}, and without seqio and TensorFlow none can "
                f"be built; it has {known}{did_you_mean(self.name, known)}"
            )
        return [
            CachedTask(name, rate, self._directory / name, tasks.get(name), name not in missing)
            for name, rate in rates.items()
        ]

    def _look_at_caches(self) -> set[str]:
        """Checks what is cached, and returns the tasks of which something is not cached yet."""
        arguments = (self.name, self.modules, self._directory)
        cache_builder.refuse_stale(*arguments)
        splits = cache_builder.missing(*arguments)
        if splits and not self._build:
            modules = "".join(f" --module={module}" for module in self.modules)
            raise UserError(
                f"not cached in {self._directory}: {', '.join(splits)}; run `meshway cache --task={self.name}{modules} "
                f"--directory={self._directory}`, or set CachedData.build to True"
            )
        return {split.rpartition("/")[0] for split in splits}

    def _ensure_caches(self) -> set[str]:
        """Builds what is missing in process 0 while the others wait; returns the tasks still missing: none."""
        arguments = (self.name, self.modules, self._directory)
        primary = processes.is_primary()
        if primary and self._look_at_caches():
            cache_builder.ensure(*arguments)
        processes.barrier(f"the cache of {self.name}", None, waiting=self._report_missing)
        if not primary and (splits := cache_builder.missing(*arguments)):
            raise UserError(
                f"process 0 has {self.name!r} in its {self._directory}, and this process does not see {splits} there; "
                "give all hosts one shared --gin.CACHE_DIR, or run `meshway cache` on each"
            )
        cache_builder.ensure(*arguments)
        return set()

    def _report_missing(self) -> None:
        splits = cache_builder.missing(self.name, self.modules, self._directory)
        if splits:
            print(f"data: process 0 is still to cache {', '.join(splits)}", file=sys.stderr, flush=True)

    def open_task(
        self, task: CachedTask, split: str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Objective, Examples, bool]:
        """Returns (the task's objective, its examples, whether steps in TensorFlow must run on them first)."""
        lengths = lengths or self.lengths
        start, bos = (self._framing.start, self._framing.bos) if self._framing else ((), ())
        if not task.is_cached:
            imported = seqio_caches.origin(task.task, task.directory)
            return task_data.open_task(task.task, split, self.converter, lengths, start, bos, imported)
        cached, read = task.read(split)
        steps = numpy_steps(task.info["online"], cached.features)
        if steps is None and task.task is None:
            raise UserError(
                f"task {task.name!r} has preprocessors after its cache, which need seqio and TensorFlow: not installed"
            )
        promised = features_from_json(task.info["declared"])
        if steps is not None:
            # A text task in T5's style declares `inputs` that are empty in every example.
            empty = cached.empty
            promised = {name: cached.features[name] for name in promised if name in cached.features.keys() - empty}
        else:
            empty = frozenset()
        info = TaskInfo(task.name, promised, start, empty, bos)
        objective = self.converter.bind(info, lengths)
        return objective, Stepped(read, steps, objective.trims) if steps else read, steps is None

    def _source(self, task: CachedTask, objective: Objective, examples: Examples, online: bool) -> Source:
        sizes = vocabulary_sizes(self._vocabularies, self.lengths)
        arguments = (objective, self.converter.pack, self._shuffle, self._seed, sizes)
        if not online:
            read = examples.examples if isinstance(examples, Stepped) else examples
            table = None
            if isinstance(read, CachedSplit | Sliced):  # counts lie beside the examples or, if those may only be read,
                table = RowTable([read.directory, cache_directory().parent / "rows"], read.identity)  # with the user's
            return RowSource(task.name, examples, *arguments, table)
        return OnlineSource(task.name, examples, self._steps(task), *arguments)

    def _steps(
        self, task: CachedTask, lengths: Mapping[str, int] | None = None
    ) -> Callable[[list[Any], int], list[Any]]:
        """Returns (examples, seed) -> those examples after the task's steps that come after the cache."""
        lengths = self.lengths if lengths is None else lengths
        features, start = features_from_json(task.info["features"]), task.info["cut"]["online_from"]

        def run(examples: list[Any], seed: int) -> list[Any]:
            return list(seqio_steps.online(task.task, examples, features, start, lengths, seed))

        return run

    def _with_split(self, split: str, purpose: str) -> list[CachedTask]:
        splits = {task.name: task.splits for task in self.tasks}
        having = with_split(splits, bare_split(split), purpose, self.name)
        return [task for task in self.tasks if task.name in having]

    def _may_be_drawn(self, task: CachedTask) -> bool:
        return task.rate > 0 or any(change.rates.get(task.name, 0) > 0 for change in self._changes)


def _write_if_changed(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a small JSON file atomically, unless it has this content already."""
    text = json.dumps(content, indent=1) + "\n"
    with io_errors(path):
        if not path.is_file() or path.read_text("utf-8") != text:
            replace_file(path, text.encode())
