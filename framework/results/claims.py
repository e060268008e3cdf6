"""Who evaluates what: programs beside each other divide the steps of a run among themselves."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from meshway.framework.training.writers import io_errors


class Claims:
    """Claims on pieces of work by name, each held by one process, which loses it when it ends, however it ends.

    Args:
      folder: of lock files, made when it is needed; a claim's file is gone once it is released.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Holds the claim on `name` for the time of a `with` block, which is told whether it is held; else another
        process holds it.

        Raises:
          UserError: the disk refuses.
        """
        path = self._folder / name
        with io_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
        if lock is None:
            yield False
            return
        try:
            yield True
        finally:
            # Removed while it is locked: who has opened it meanwhile sees, once it has the lock, that it is gone.
            path.unlink(missing_ok=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Returns the lock on a file, held; None where another process holds it."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        os.close(lock)  # of a file that its last holder has removed
