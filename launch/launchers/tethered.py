"""A command that ends when its starter does, however that ends: standard input is a pipe which the starter holds."""

import os
import signal
import sys
import threading
from collections.abc import Sequence

from meshway.launch import cli


def command(words: Sequence[str]) -> list[str]:
    """Returns the program that runs `meshway WORDS`; start it with a pipe as its standard input."""
    return [sys.executable, "-m", "meshway.launch.launchers.tethered", *words]


def _end_with_starter() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    sys.exit(cli.main())
