"""Batches prepared ahead of the step, by one background thread."""

import queue
import threading
from collections.abc import Iterator

from meshway.framework.interfaces import Batch, Dataset

_END = object()


class Prefetcher:
    """Iterates over (batch, the dataset's state after it); use `prefetch` to make one.

    The dataset belongs to the thread from here on. What it raises, the consumer sees, after the batches that
    came before; then the iterator is exhausted.
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
        """Stops the thread once the batch it is making is made, drops what is queued, and waits for it."""
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
        except BaseException as error:  # whatever it is, it must reach the consumer, who else waits for ever
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def prefetch(dataset: Dataset, depth: int = 2) -> Prefetcher:
    """Starts preparing up to `depth` batches ahead (one more may be in the making).

    Args:
      dataset: what to read; nobody else may read it until `close()`.
      depth: number of finished batches kept waiting.

    Returns:
      An iterator of (batch, state after that batch); `close()` stops its thread.
    """
    return Prefetcher(dataset, depth)
