"""When steps finish on the devices, noted without anyone waiting for them."""

import contextlib
import queue
import threading
import time

import jax


class StepClock:
    """Follows the steps of this process's devices in a thread of its own.

    Waiting for data costs nothing while a step still runs: a loop whose batches take 1.1 times a step waits nearly all
    the time, and its devices are idle for a tenth of it. Only who knows when a step finished can tell the two apart.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        self._started, self._finished, self._time = 0, 0, time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="step clock", daemon=True)
        self._thread.start()

    def started(self, output: jax.Array) -> None:
        """Takes an output of a step that has just been given to the devices, on one of them, never to be donated."""
        self._started += 1
        self._queue.put(output)

    def idle_since(self) -> float | None:
        """Returns when the last step finished, by `time.perf_counter`; None while there is one that has not."""
        return self._time if self._finished == self._started else None

    def close(self) -> None:
        """Ends the thread once the steps that were given to it are done, without waiting for that."""
        self._queue.put(None)

    def _run(self) -> None:
        while (output := self._queue.get()) is not None:
            with contextlib.suppress(Exception):  # of a step that failed: whoever reads its metrics is told
                output.block_until_ready()
            self._time = time.perf_counter()
            self._finished += 1
