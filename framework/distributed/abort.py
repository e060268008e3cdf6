"""A moment for last words before native code aborts this process.

jax's coordination ends a program with `abort()` as soon as process 0's socket closes, saying which call failed. A
handler of SIGABRT parks the thread that aborts until the watch has said who is gone, and then lets it go on.
"""

import ctypes
import os
import signal
import threading

begun = threading.Event()  # some thread is in abort()
explained = threading.Event()  # it may go on
_PARKED_SECONDS = 8.0


def install() -> None:
    """Parks aborting threads from now on. Python's own handlers cannot: they run only once abort() has returned."""
    if os.name == "posix":
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


def uninstall() -> None:
    """Lets aborts be as they are: at Python's end no thread can run the handler."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(number: int) -> None:
    begun.set()
    explained.wait(_PARKED_SECONDS)
