"""Stopping all processes of a run at the same step."""

import os
import signal
import sys
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

_python_handler: list[object] = []  # of SIGTERM, when jax's own was installed


def note_handler() -> None:
    """Remembers Python's handler of SIGTERM; call when jax's preemption service takes the signal over."""
    _python_handler[:] = [signal.getsignal(signal.SIGTERM)]


class StopSignal:
    """SIGTERM (and Ctrl-C) as a question asked after every step: `requested(step)`.

    In one process the first signal is remembered and a second one ends the program at once. With several, jax's
    preemption service agrees on one step for all of them; a Python handler would silently disable it.

    Attributes:
      number: the signal that came, if one did, and was heard here.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        elif _python_handler and signal.getsignal(signal.SIGTERM) is not _python_handler[0]:
            sys.stderr.write("meshway: a SIGTERM handler was set after the processes joined: no save at SIGTERM\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; the same answer on every process."""
        if jax.process_count() == 1:
            return self.number is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: saving after this step, then stopping; once more stops at once\n")
        sys.stderr.flush()
