"""One process at a time works on an output: a lock that dies with its holder."""

import contextlib
import fcntl
import os
from pathlib import Path

from meshway.framework.errors import UserError
from meshway.framework.inference.bulk.durable import sync_folder
from meshway.framework.training.writers import io_errors


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
                    sync_folder(self._path.parent.parent)
                # A holder that ends removes file and folder: between any two steps here they may be gone.
                with contextlib.suppress(FileNotFoundError):
                    self._descriptor = self._try()
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, str(os.getpid()).encode())

    def discard(self) -> None:
        """Gives the lock back, if it is held, and removes it, and its folder if nothing else is in it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
                os.rmdir(self._path.parent)
            os.close(self._descriptor)
            self._descriptor = None

    def _try(self) -> int | None:
        """Returns the locked file, or None if it was not the one that others find under the name."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                return descriptor
        except BlockingIOError as error:
            holder = os.read(descriptor, 32).decode(errors="replace")
            os.close(descriptor)
            process = f"process {holder}" if holder else "another process"
            raise UserError(f"{process} is at work on this output ({self._path} is locked): wait for it") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None
