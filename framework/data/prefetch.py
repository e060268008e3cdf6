"""Batches prepared ahead of the step, by one background thread or by several processes."""

import dataclasses
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
from absl import flags

from meshway.framework.data.objective import Spec
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import Dataset
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Batch
from meshway.framework.terminal import listed

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


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """How many examples a batch has, by its number, which counts from 1 as steps do.

    Attributes:
      last: examples of a batch once `schedule` is over.
      schedule: (last step, examples of a batch up to it), in order: [(1000, 16), (5000, 32)] has 16 in steps 1 to 1000.

    Raises:
      UserError: steps that do not rise, or a number that is not positive.
    """

    last: int
    schedule: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        before = 0
        for entry in self.schedule:
            if not (isinstance(entry, Sequence) and len(entry) == 2 and all(type(each) is int for each in entry)):
                raise UserError(f"BATCH_SIZE_SCHEDULE has {entry!r}, not (last step, examples of a batch up to it)")
            step, size = entry
            if step <= before or size < 1:
                raise UserError(
                    f"BATCH_SIZE_SCHEDULE = {list(self.schedule)}: steps must rise, and sizes be at least 1"
                )
            before = step

    def at(self, number: int) -> int:
        """Returns the examples of batch `number`."""
        return next((size for step, size in self.schedule if number <= step), self.last)

    def after(self, number: int) -> list[int]:
        """Returns the sizes of batches after batch `number`, in order, each once."""
        return list(dict.fromkeys([size for step, size in self.schedule if step > number] + [self.last]))


def check_skipped(skipped: Sequence[tuple[int, int]]) -> None:
    """Raises UserError for what is no range of batches to leave out."""
    for entry in skipped:
        numbers = isinstance(entry, Sequence) and len(entry) == 2 and all(type(each) is int for each in entry)
        if not (numbers and 1 <= entry[0] <= entry[1]):
            raise UserError(f"SKIP_BATCHES has {entry!r}, not (first, last) numbers of batches, counted from 1")


_LEFT_OUT = "skipped."  # in a position, before the number of a batch: the last one of those left out from there on


def number_of(position: Mapping[str, int]) -> int | None:
    """Returns how many batches came before a position of a training stream; None where it does not tell."""
    return position.get("batch", position.get("batches"))


def left_out(position: Mapping[str, int]) -> dict[int, int]:
    """Returns the batches that a run left out up to a position of its data: first -> last, both included."""
    return {int(key.removeprefix(_LEFT_OUT)): last for key, last in position.items() if _is_left_out(key)}


def _is_left_out(key: str) -> bool:
    return key.startswith(_LEFT_OUT) and key.removeprefix(_LEFT_OUT).isdigit()  # not 'skipped.rows', of a task


def check_not_trained(
    skipped: Sequence[tuple[int, int]], position: Mapping[str, int], step: int, first_step: int, kept: Sequence[int]
) -> None:
    """Raises UserError where batches that are to be left out were trained already.

    Args:
      skipped: (first, last) numbers of batches.
      position: of the data, in the checkpoint of `step`, from which the run goes on.
      first_step: the step that the run began with.
      kept: the steps of the checkpoints that there are.
    """
    number = number_of(position)
    if number is None:
        return
    gone = {batch for first, last in left_out(position).items() for batch in range(first, last + 1)}
    asked = {batch for first, last in skipped for batch in range(first, min(last, number) + 1)}
    trained = sorted(asked - gone)
    # The second: a checkpoint of a version that did not keep which were left out, and all that it left out are these.
    if not trained or len(trained) == number - (step - first_step) - len(gone):
        return

    def step_of(batch: int) -> int:
        return step - (number - batch) + sum(batch < each <= number for each in gone)

    first, last = step_of(trained[0]), step_of(trained[-1])
    parts = [[batch for batch in trained if start <= batch <= end] for start, end in sorted(skipped)]
    said = listed(f"{part[0]} to {part[-1]}" for part in parts if part)
    before = [each for each in kept if each < first]
    back = f"go back to checkpoint {max(before)}, by removing those after it," if before else "begin anew, elsewhere,"
    raise UserError(
        f"SKIP_BATCHES: batches {said} were trained already, in steps {first} to {last}, "
        f"and the run goes on from checkpoint {step}: {back} or take these out of SKIP_BATCHES to go on without"
    )


class TrainingStream:
    """A training stream whose batches change their size, or some of whose batches are left out.

    Each size is a stream of its own that continues where the one before stopped, so that every example is still seen
    once a pass. A position leads to the same batches as an uninterrupted run; it is the same integers as without, and
    beside them those of `left_out`.

    Args:
      open_stream: size of a batch -> the data's stream, from the start.
      sizes: of batches. Where some are left out, they too are counted.
      skipped: (first, last) numbers of batches that are left out, both included.

    Raises:
      UserError: the data cannot change its batches' size.
    """

    def __init__(
        self, open_stream: Callable[[int], Dataset], sizes: BatchSizes, skipped: Sequence[tuple[int, int]] = ()
    ) -> None:
        check_skipped(skipped)
        self._open, self._sizes, self._skipped = open_stream, sizes, sorted(tuple(entry) for entry in skipped)
        self._size, self._stream = sizes.at(1), open_stream(sizes.at(1))
        if sizes.schedule and "rows" not in self._stream.state():
            raise UserError(
                "BATCH_SIZE_SCHEDULE: this data counts batches, not examples, so their size cannot change; use cached "
                "data (grain_loader.CachedData)"
            )
        if skipped and number_of(self._stream.state()) is None:
            raise UserError("SKIP_BATCHES: this data does not number its batches, so that none can be left out")
        self._left_out: dict[int, int] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        for first, last in self._skipped:
            if first <= self._number + 1 <= last:
                self._left_out[self._number + 1] = last
                self._advance(last)
        if self._sizes.schedule:
            self._resize()
        return next(self._stream)

    def state(self) -> dict[str, int]:
        """Returns the position after the last batch returned."""
        return self._stream.state() | {f"{_LEFT_OUT}{first}": last for first, last in self._left_out.items()}

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a position, which counts rows: a stream of any size continues from it."""
        self._left_out = left_out(state)
        self._stream.restore({key: value for key, value in state.items() if not _is_left_out(key)})

    def spec(self) -> Spec:
        """Returns (global shape, dtype) of each feature of the next batch."""
        return self._stream.spec()

    @property
    def _number(self) -> int:
        """How many batches came before."""
        number = number_of(self._stream.state())
        assert number is not None
        return number

    def _advance(self, number: int) -> None:
        """Leaves out the batches up to `number`, reading none where the stream can do without."""
        while (before := self._number) < number:
            self._resize()
            ends = [step for step, _ in self._sizes.schedule if before < step < number]
            seek = getattr(self._stream, "seek", None)
            if seek is not None:
                seek(min([*ends, number]))
            else:
                next(self._stream)

    def _resize(self) -> None:
        size = self._sizes.at(self._number + 1)
        if size != self._size:
            state = self._stream.state()
            self._size, self._stream = size, self._open(size)
            self._stream.restore(state)


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
