"""What every thread of this process is at, for whoever reads its log."""

import faulthandler
import os
import sys
from typing import TextIO


def dump_stacks(log: TextIO | None = None) -> None:
    """Writes the Python stacks of all threads to `log`, by default standard error.

    MESHWAY_STACKS names a file for them instead, where standard error is a person's terminal.
    """
    path = os.environ.get("MESHWAY_STACKS")
    if log is None and path:
        with open(path, "a") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        print(f"meshway: the stacks of all threads are in {path}", file=sys.stderr, flush=True)
        return
    log = sys.stderr if log is None else log
    log.flush()
    faulthandler.dump_traceback(file=log, all_threads=True)
