"""Where caches of tasks are kept, and the folder in which a builder keeps unfinished files."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from meshway.framework.data.cache.shards import failures_of
from meshway.framework.files import local_path


def cache_directory() -> Path:
    """Returns $MESHWAY_CACHE_DIR/tasks, else $XDG_CACHE_HOME/meshway/tasks, else ~/.cache/meshway/tasks."""
    if own := os.environ.get("MESHWAY_CACHE_DIR"):
        return local_path(own) / "tasks"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meshway" / "tasks"


_PREFIX = ".building-"
_LOCK = "lock"


@contextlib.contextmanager
def working(directory: Path) -> Iterator[Path]:
    """Yields a new folder inside `directory` for this process alone, removed after the block.

    It is locked in the block; folders that no living process has locked are removed first.

    Raises:
      EnvironmentFailure: the directory cannot be written.
    """
    with failures_of(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_PREFIX}*"):
            _remove_if_dead(left)
        work, lock = _new_folder(directory)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _new_folder(directory: Path) -> tuple[Path, int]:
    """Returns a fresh folder and its lock, held."""
    while True:  # until it is locked before another builder removes it as abandoned
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _remove_if_dead(folder: Path) -> None:
    """Removes a builder's folder unless it is locked; without a lock file its builder died or just starts."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if empty
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
