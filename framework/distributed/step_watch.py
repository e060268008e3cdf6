"""Detects a step that takes far longer than those before it."""

import collections
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from meshway.framework.distributed import processes
from meshway.framework.distributed.barrier import Deadlines
from meshway.framework.distributed.watch import LOST_A_PEER, dump_stacks

_WARM_UP_STEPS = 2
_MIN_STEPS = 5  # measured before any can be late
_CHECK_SECONDS = 1.0


class StepWatch:
    """A context manager that prints a warning when a step takes `times` the median of those before it, the first time
    with the stacks of all threads.

    Evaluations, checkpoints and the first steps do not count. In a run of several processes, a step that takes longer
    than `Deadlines.hang` ends all of them: a process that hangs still sends heartbeats.
    """

    def __init__(
        self,
        times: float = 10.0,
        least: float = 10.0,
        hang: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`least` and `hang` in seconds: shorter steps are never late; None means `Deadlines.hang`."""
        self._times, self._least, self._clock = times, least, clock
        self._hang = Deadlines.of().hang if hang is None else hang
        self._durations: collections.deque[float] = collections.deque(maxlen=100)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._began: float | None = None  # of the current step, later by its pauses; None while there is none
        self._step, self._seen, self._warned_of = 0, 0, -1
        self._showed_stacks = False

    def __enter__(self) -> "StepWatch":
        threading.Thread(target=self._run, name="step watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def finished(self, step: int) -> None:
        """Call after every step, and after its evaluation and saving."""
        now = self._clock()
        with self._lock:
            if self._began is not None and self._seen >= _WARM_UP_STEPS:
                self._durations.append(now - self._began)
            self._began, self._step, self._seen = now, step, self._seen + 1
        if watch := processes.watch():
            watch.at_step(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside for the current step."""
        with self._lock:
            spent = None if self._began is None else self._clock() - self._began
            self._began = None
        try:
            yield
        finally:
            with self._lock:
                self._began = None if spent is None else self._clock() - spent

    def late(self) -> tuple[float, float] | None:
        """Returns (seconds of the current step, the median) if it is late, once for each step."""
        with self._lock:
            if self._began is None or len(self._durations) < _MIN_STEPS or self._warned_of == self._step:
                return None
            seconds, median = self._clock() - self._began, statistics.median(self._durations)
            if seconds < max(self._times * median, self._least):
                return None
            self._warned_of = self._step
            return seconds, median

    def hangs(self) -> float | None:
        """Returns the seconds of the current step if they exceed the limit, else None."""
        with self._lock:
            seconds = 0.0 if self._began is None else self._clock() - self._began
        return seconds if seconds > self._hang else None

    def _run(self) -> None:
        while not self._ended.wait(_CHECK_SECONDS):
            if found := self.late():
                self._print("step {} has taken {:.0f} s so far, the median is {:.2g} s".format(self._step + 1, *found))
                if not self._showed_stacks:
                    self._showed_stacks = True
                    dump_stacks()
            watch = processes.watch()
            if watch and (seconds := self.hangs()):
                message = f"step {self._step + 1} has not ended in {seconds:.0f} s{_steps()}"
                watch.alarms.sound(LOST_A_PEER, message)
                watch.end(LOST_A_PEER, message, stacks=True)

    def _print(self, text: str) -> None:
        print(f"meshway: {text}{_steps()}", file=sys.stderr, flush=True)


def _steps() -> str:
    """Returns the last step of each process: one that hangs is behind."""
    watch = processes.watch()
    if watch is None:
        return ""
    try:
        return "; last steps by process: " + ", ".join(f"{each}: {step}" for each, step in watch.steps().items())
    except Exception:  # the store is gone: the watch reports it
        return ""
