"""Batches made by several processes, where one thread is not quick enough."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
from absl import flags

from meshway.framework.data.objective import Spec
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.interfaces import Batch

_SLOW_BATCH = 0.05  # seconds a batch may take to make before worker processes are worth their start
_MOST_WORKERS = 4
_FOR_EVER = 2**40  # batches


class WorkerStream:
    """A row stream whose batches are made by processes, through grain.

    Args:
      stream: what to read.
      num_workers: how many processes. None: as many as it takes, by how long the first batches take to make.
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
        """Goes to before batch number `batch`, reading nothing."""
        self.stream.seek(batch)
        self._iterator = None

    def spec(self) -> Spec:
        return self.stream.spec()

    def _choose(self) -> int:
        """Returns the number of workers for batches that take as long as those made so far, the first one apart."""
        seconds = sorted(self._seconds[1:])[len(self._seconds) // 2 - 1]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if seconds < _SLOW_BATCH else min(_MOST_WORKERS, cores // 4)
        if workers:
            print(f"data: a batch takes {seconds * 1e3:.0f} ms to make; {workers} processes do it", file=sys.stderr)
        return workers

    def _start(self) -> Any:
        if not flags.FLAGS.is_parsed():  # grain asks absl, whose flags only absl programs parse
            flags.FLAGS.mark_as_parsed()
        numbers = grain.MapDataset.range(self.stream.position, _FOR_EVER)
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        options = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=2)
        return iter(numbers.map(self.stream.batch).to_iter_dataset(reading).mp_prefetch(options))
