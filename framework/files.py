"""The door to files: which paths are ones, writing that a crash cannot halve, and locks that die with their holder."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from meshway.framework.errors import EnvironmentFailure, UserError


def local_path(path: str | Path) -> Path:
    """Returns a path of this machine, `~` resolved. Every setting that is a path goes through here.

    Raises:
      UserError: it is the address of a bucket or of a server (`gs://...`), where nothing is read or written yet.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):  # Path has made one slash of two
        raise UserError(
            f"{path} is no path of this machine: buckets and servers are not read or written yet; mount or copy it, "
            "and give that folder or file"
        )
    return Path(path).expanduser()


_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def is_disk_trouble(error: OSError) -> bool:
    """Whether a disk refused because it is full or broken, which is nobody's mistake."""
    return error.errno in _DISK_TROUBLE


@contextlib.contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turns a disk's refusal inside into an error that names `path`: an EnvironmentFailure where the disk is full or
    broken, so that a supervisor may try again, else a UserError."""
    try:
        yield
    except OSError as error:
        if is_disk_trouble(error):
            raise EnvironmentFailure(f"cannot write {path}: {error.strerror}") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes | Callable[[BinaryIO], object], temporary: Path | None = None) -> None:
    """Writes a whole file so that a reader, or a crash at any moment, finds the old content or the new. It returns once
    the new one would survive a power cut.

    Args:
      path: the file.
      content: its bytes, or what writes them to a file open in binary mode.
      temporary: where it is written first, on the same file system; None for a name of its own beside `path`. A killed
        process leaves it there.

    Raises:
      OSError: the file system refuses.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # a full disk needs its room
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Puts on disk what a file holds, or which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LOOK_SECONDS = 0.001


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock: process `pid` of `host`, `since` so many seconds since 1970."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {began}"


def try_lock(path: Path) -> int | None:
    """Returns the descriptor of a locked file, made where it is missing; None where another process holds the lock.

    Closing the descriptor, or the end of the process however it comes, gives the lock back. Who removes the file must
    hold the lock: another process that has opened it meanwhile sees, once it has the lock, that the file is gone.

    Raises:
      OSError: the file system refuses.
    """
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                os.ftruncate(lock, 0)
                os.write(lock, json.dumps(dataclasses.asdict(_this_process())).encode())
                return lock
        except BlockingIOError:
            if not _lets_others_read(lock):
                os.close(lock)
                return None
            time.sleep(_LOOK_SECONDS)  # nobody holds it: `holder_of` has a look
        except FileNotFoundError:  # its last holder has removed it
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _lets_others_read(lock: int) -> bool:
    """Says whether a file is locked by those alone who share it, or by nobody any more."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder_of(path: Path) -> Holder | None:
    """Returns who holds the lock on a file; None where nobody does, or the file does not tell.

    Raises:
      OSError: the file cannot be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 closed below
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            pass
        with contextlib.suppress(ValueError, TypeError):
            return Holder(**json.loads(file.read()))
    return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock on a file for the time of a `with` block, which is told whether it is held; removes it after.

    Raises:
      OSError: the file system refuses.
    """
    lock = try_lock(path)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), round(time.time(), 3))
