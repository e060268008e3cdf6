"""Files that are there whole or not at all, whatever moment the process or the machine dies."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from meshway.framework.training.writers import io_errors


def write_durably(path: Path, temporary: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes at `path`, in place of what is there, and returns once it would survive a power cut.

    Args:
      path: the file.
      temporary: where it is written first, on the same file system. A killed process leaves it there.
      write: writes the content to a file open in binary mode.

    Raises:
      UserError: the file system refuses (full, read-only).
    """
    with io_errors(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # a full disk needs its room
            raise
        sync_folder(path.parent)


def move_durably(source: Path, target: Path) -> None:
    """Renames a file that is on disk already, within one file system. Raises UserError."""
    with io_errors(target):
        os.replace(source, target)
        sync_folder(target.parent)


def remove(path: Path) -> None:
    """Removes a file if it is there. Raises UserError."""
    with io_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Puts on disk which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
