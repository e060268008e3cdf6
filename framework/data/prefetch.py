"""Batches prepared ahead of the step, by one background thread or by several processes."""

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
from absl import flags

from meshway.framework.data.objective import Spec
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import Dataset
from meshway.framework.interfaces import Batch

_END = object()


class Prefetcher:
    """Iterates over (batch, the dataset's state after it); use `prefetch` to make one.

    Only the thread may use the dataset from now on. An exception of the dataset is raised to the consumer after the
    batches before it; then the iterator is exhausted.
    """

    def __init__(self, dataset: Dataset, depth: int) -> None:
        if depth < 1:
            raise ValueError(f"prefetch: depth must be at least 1, not {depth}")
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._run, args=(dataset,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, int]]]:
        return self

    def __next__(self) -> tuple[Batch, dict[str, int]]:
        if self._done:
            raise StopIteration
        item = self._queue.get()
        self._done = item is _END or isinstance(item, BaseException)
        if item is _END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the thread after the batch it is making, drops queued batches, and waits for the thread."""
        self._stop.set()
        self._done = True
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self, dataset: Dataset) -> None:
        try:
            while not self._stop.is_set():
                batch = next(dataset)
                self._put((batch, dataset.state()))
        except StopIteration:
            self._put(_END)
        except BaseException as error:  # every kind must reach the consumer, which would otherwise wait for ever
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def prefetch(dataset: Dataset, depth: int = 2) -> Prefetcher:
    """Starts preparing up to `depth` batches ahead (one more may be under way).

    Args:
      dataset: the dataset to read; nothing else may read it until `close()`.
      depth: number of finished batches kept waiting.

    Returns:
      An iterator of (batch, state after that batch); `close()` stops its thread.
    """
    return Prefetcher(dataset, depth)


_SLOW_BATCH = 0.05  # seconds a batch may take to make before worker processes are worth their start
_MOST_WORKERS = 4
_FOR_EVER = 2**40  # batches


class WorkerStream:
    """A row stream whose batches are made by worker processes, through grain.

    Args:
      stream: the stream to read.
      num_workers: how many processes. None: chosen from the time that the first batches take to make.
    """

    def __init__(self, stream: RowStream, num_workers: int | None) -> None:
        self.stream = stream
        self._num_workers = num_workers
        self._seconds: list[float] = []
        self._iterator: Any = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._num_workers is None and len(self._seconds) == 5:
            self._num_workers = self._choose()
        if not self._num_workers:
            began = time.perf_counter()
            batch = next(self.stream)
            if self._num_workers is None:
                self._seconds.append(time.perf_counter() - began)
            return batch
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self.stream.seek(self.stream.position + 1)
        return batch

    def state(self) -> dict[str, int]:
        return self.stream.state()

    def restore(self, state: Mapping[str, int]) -> None:
        self.stream.restore(state)
        self._iterator = None

    def seek(self, batch: int) -> None:
        """Makes `batch` the number of the next batch, reading nothing."""
        self.stream.seek(batch)
        self._iterator = None

    def spec(self) -> Spec:
        return self.stream.spec()

    def _choose(self) -> int:
        """Returns the number of workers, from the time of the batches made so far except the first."""
        seconds = sorted(self._seconds[1:])[len(self._seconds) // 2 - 1]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if seconds < _SLOW_BATCH else min(_MOST_WORKERS, cores // 4)
        if workers:
            print(f"data: a batch takes {seconds * 1e3:.0f} ms to make; {workers} processes do it", file=sys.stderr)
        return workers

    def _start(self) -> Any:
        if not flags.FLAGS.is_parsed():  # grain asks absl, whose flags only absl programs parse
            flags.FLAGS.mark_as_parsed()
        self.stream.prepare()  # once, instead of in each of them
        numbers = grain.MapDataset.range(self.stream.position, _FOR_EVER)
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
        return iter(numbers.map(self.stream.batch).to_iter_dataset(reading).mp_prefetch(options))
