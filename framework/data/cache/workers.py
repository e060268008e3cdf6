"""The processes that build a cache, and what a person sees of it."""

import collections
import contextlib
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
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from meshway.framework.data import seqio_adapter, seqio_steps
from meshway.framework.data.cache.shards import write_shard
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.terminal import format_duration, through


class CacheProgress:
    """Shows how many examples are written, how fast, and when it ends; use as a context manager.

    Args:
      shards: how many are to be written.
      expected: how many examples they will hold, as far as the sources say; None where they do not.
      stream: where to write, standard output if None.
      terminal: whether that is a terminal; found out if None.
      period: seconds between the lines of a log.
    """

    def __init__(
        self,
        shards: int,
        expected: int | None,
        *,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        period: float = 10.0,
    ) -> None:
        self._shards, self._expected, self._period = shards, expected, period
        self._stream = sys.stdout if stream is None else stream
        self._printed = time.monotonic()
        self._begin: float | None = None  # of the first shard; what comes before is TensorFlow's import
        self._examples: dict[int, int] = {}
        self._done = 0
        self._live: Live | None = None
        self._terminal = contextlib.ExitStack()  # held by this display
        if terminal is None:
            terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        if terminal:
            console = Console(file=self._stream, force_terminal=True, highlight=False)
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=True)
            self._terminal.enter_context(through(self.note))
            self._live.start()

    def update(self, job: int, examples: int) -> None:
        """Takes how many examples shard number `job` has by now."""
        self._examples[job] = examples
        now = time.monotonic()
        self._begin = self._begin or now
        if self._live is None and now - self._printed >= self._period:
            self._printed = now
            self._print("  ".join([self._count(), *self._numbers()]))

    def finish(self, job: int, examples: int) -> None:
        """Takes that a shard is done."""
        self._done += 1
        self.update(job, examples)

    def note(self, text: str) -> None:
        """Prints a line."""
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> "CacheProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        self._terminal.close()

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _count(self) -> str:
        return f"shard {self._done}/{self._shards}"

    def _numbers(self) -> list[str]:
        now = time.monotonic()
        examples, seconds = sum(self._examples.values()), now - (self._begin or now)
        fraction = self._fraction()
        left = format_duration(seconds * (1 - fraction) / fraction) if fraction else "-"
        return [f"{examples:,} examples", f"{examples / max(seconds, 1e-9):,.0f} examples/s", f"eta {left}"]

    def _fraction(self) -> float:
        """Returns how much of the work is done: by examples where their number is known, else by shards."""
        if self._expected:
            return min(sum(self._examples.values()) / self._expected, 1.0)
        return self._done / max(self._shards, 1)

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(self._count(), ProgressBar(total=1.0, completed=self._fraction()), "  ".join(self._numbers()))
        return bar


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
