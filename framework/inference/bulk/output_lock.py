"""One process at a time works on an output: a lock that dies with its holder."""

import contextlib
import os
from pathlib import Path

from meshway.framework.errors import UserError
from meshway.framework.files import holder_of, io_errors, sync, try_lock


class OutputLock:
    """A locked file in a folder that is made for it where it is missing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def acquire(self) -> None:
        """Makes the folder and locks.

        Raises:
          UserError: another process holds the lock, or the folder cannot be made.
        """
        with io_errors(self._path.parent):
            while self._descriptor is None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self._path.parent)
                    sync(self._path.parent.parent)
                # A holder that ends removes file and folder: between any two steps here they may be gone.
                with contextlib.suppress(FileNotFoundError):
                    self._descriptor = try_lock(self._path)
                    if self._descriptor is None:
                        holder = holder_of(self._path) or "another process"
                        raise UserError(f"{holder} is at work on this output ({self._path} is locked): wait for it")

    def discard(self) -> None:
        """Gives the lock back, if it is held, and removes it, and its folder if nothing else is in it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
                os.rmdir(self._path.parent)
            os.close(self._descriptor)
            self._descriptor = None
