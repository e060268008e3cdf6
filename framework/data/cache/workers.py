"""The processes that build a cache, and what a person sees of it."""

import collections
import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Unpack

from meshway.framework.data import seqio_adapter, seqio_caches, seqio_steps
from meshway.framework.data.cache.shards import write_shard
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.seqio_caches import SeqioCache
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.progress import Bar, Display, Screen, seconds_left


class CacheProgress(Display):
    """Shows how many examples are written, how fast, and when it ends."""

    def __init__(self, shards: int, expected: int | None, **screen: Unpack[Screen]) -> None:
        """Args:
        shards: how many are to be written.
        expected: how many examples they will hold, as far as the sources say; None where they do not.
        screen: where to write, standard output unless it says otherwise.
        """
        self._shards, self._expected = shards, expected
        self._begin: float | None = None  # of the first shard; what comes before is TensorFlow's import
        self._examples: dict[int, int] = {}
        self._done = 0
        super().__init__(sys.stdout, **screen)

    def update(self, job: int, examples: int) -> None:
        """Takes how many examples shard number `job` has by now."""
        self._examples[job] = examples
        self._begin = self._begin or time.monotonic()
        self.changed()

    def finish(self, job: int, examples: int) -> None:
        """Takes that a shard is done."""
        self._done += 1
        self.update(job, examples)

    def bar(self) -> Bar:
        now = time.monotonic()
        examples, elapsed = sum(list(self._examples.values())), now - (self._begin or now)
        # By examples where their number is known, else by shards.
        share = min(examples / self._expected, 1.0) if self._expected else self._done / max(self._shards, 1)
        numbers = [f"{examples:,} examples", f"{examples / max(elapsed, 1e-9):,.0f} examples/s"]
        return Bar(f"shard {self._done}/{self._shards}", share, 1.0, seconds_left(elapsed, share, 1.0), numbers)


_SEED = 0  # of preprocessors that draw random numbers before a CacheDatasetPlaceholder


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard to write.

    Attributes:
      number: of the job, from 0.
      provider: the registered task or mixture that `task` is of.
      modules: whose import registers it.
      task: its name.
      split: of the task.
      shard: which, from 0.
      num_shards: how many the split has.
      max_bad: examples that may fail.
      features: of the task, as cached.
      fingerprint: of the task.
      directory: CACHE_DIR/TASK.
      work: a folder inside it for files under way, of this builder alone.
      imported: the cache of seqio's that its examples are taken from; None where the task's preprocessors make them.
    """

    number: int
    provider: str
    modules: tuple[str, ...]
    task: str
    split: str
    shard: int
    num_shards: int
    max_bad: int
    features: Mapping[str, FeatureInfo]
    fingerprint: str
    directory: Path
    work: Path
    imported: SeqioCache | None = None

    def __str__(self) -> str:
        return f"shard {self.shard} of {self.num_shards} of task {self.task!r}, split {self.split!r}"


Report = Callable[[Job, int, bool], None]  # (job, examples so far, whether it is done)


def run_jobs(jobs: Sequence[Job], num_workers: int, report: Report) -> None:
    """Writes shards, the first of `jobs` first.

    Args:
      jobs: the shards.
      num_workers: processes to start; with 1 this one does the work.
      report: told how each job goes.

    Raises:
      UserError: a task is at fault; the other shards under way are given up, those finished are kept.
      EnvironmentFailure: a worker died, or the disk is full.
    """
    if num_workers <= 1:
        for job in jobs:
            report(job, _run(job, functools.partial(_unfinished, report, job)), True)
        return
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque(jobs)
    busy: dict[Connection, tuple[Any, Job]] = {}
    processes = []
    try:
        for _ in range(min(num_workers, len(jobs))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, num_workers), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            job = waiting.popleft()
            busy[ours] = (process, job)
            ours.send(job)
        while busy:
            for connection in wait(list(busy)):
                _listen(connection, waiting, busy, report)  # type: ignore[arg-type]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _listen(
    connection: Connection,
    waiting: "collections.deque[Job]",
    busy: dict[Connection, tuple[Any, Job]],
    report: Report,
) -> None:
    """Takes one message of a worker, and gives it its next job when it is done with one."""
    process, job = busy[connection]
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; perhaps memory ran out: try fewer workers" if code == -signal.SIGKILL else ""
        raise EnvironmentFailure(
            f"the worker that wrote {job} died ({how}){hint}. Finished shards are kept: run the same command again"
        ) from error
    if kind == "error":
        raise content
    if kind == "progress":
        report(job, content, False)
        return
    report(job, content, True)
    if waiting:
        following = waiting.popleft()
        busy[connection] = (process, following)
        connection.send(following)
    else:
        del busy[connection]
        connection.close()  # the worker sees the end of its work


def _work(connection: Connection, num_workers: int) -> None:
    """Runs jobs until there are no more; the whole life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    threads = max(1, (os.cpu_count() or 1) // num_workers)
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(threads))
    os.environ.setdefault("TF_NUM_INTEROP_THREADS", str(threads))

    def tell(kind: str, content: Any) -> None:
        try:
            connection.send((kind, content))
        except OSError:  # the parent is gone: nobody wants the rest
            os._exit(1)

    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            tell("done", _run(job, functools.partial(tell, "progress")))
        except (UserError, EnvironmentFailure) as error:
            tell("error", type(error)(str(error)))
        except Exception:
            tell("error", RuntimeError(f"a worker failed at {job}:\n{traceback.format_exc()}"))


def _run(job: Job, report: Callable[[int], None]) -> int:
    """Writes one shard and returns its examples."""
    task = _task(job.provider, job.modules, job.task)
    bad: list[str] = []
    if job.imported:
        examples = seqio_caches.examples(job.imported, task, job.split, job.shard, job.num_shards, job.max_bad, bad)
    else:
        examples = seqio_steps.cacheable(task, job.split, job.shard, job.num_shards, _SEED, job.max_bad, bad)
    split_directory = job.directory / job.split
    done = write_shard(
        examples,
        job.features,
        split_directory,
        job.shard,
        job.num_shards,
        job.fingerprint,
        bad,
        job.work,
        report,
    )
    return done.examples


def _task(provider: str, modules: tuple[str, ...], name: str) -> Any:
    tasks = seqio_adapter.subtasks(seqio_adapter.find_provider(provider, modules))
    return next(task for task in tasks if task.name == name)


def _unfinished(report: Report, job: Job, examples: int) -> None:
    report(job, examples, False)
