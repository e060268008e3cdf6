"""One door to files, local and in buckets: paths, atomic and durable writes, files that grow, and locks.

Local files are those of `pathlib`. What stands for appending, renaming and locking in a bucket is in `buckets/`;
the rest of the framework does not know which of the two it has.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, TypeGuard

from meshway.framework.errors import EnvironmentFailure, UserError

if TYPE_CHECKING:
    from meshway.framework.buckets.objects import BucketPath

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_RETRY_SECONDS, _RETRY_BUCKET_SECONDS = 0.001, 0.5
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes that Linux's file systems take


def no_directory(path: Path) -> str:
    """Returns in words why a path that should be a directory is none."""
    return "it is a file, not a directory" if path.exists() else "there is no such directory"


def local_path(path: str | Path) -> Path:
    """Returns a local path, `~` expanded. Every setting that is a path is passed through here.

    Raises:
      UserError: it is the address of a bucket or of a server (`gs://...`), which is not supported yet; or longer than
        file systems take, or with a null character.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):  # one slash: Path removes the second
        raise UserError(
            f"{path} is not a local path: buckets and servers are not read or written here yet; mount or copy it, and "
            "give that folder or file"
        )
    found = Path(path).expanduser()
    names = [os.fsencode(name) for name in found.parts]
    if longest := max((name for name in names if len(name) > _LONGEST_NAME), key=len, default=b""):
        shown = os.fsdecode(longest[:40])
        raise UserError(
            f"{shown}... is a name of {len(longest)} bytes, and a file or folder may have {_LONGEST_NAME}: give a "
            "shorter path"
        )
    if len(os.fsencode(found)) > _LONGEST_PATH:
        raise UserError(f"{str(found)[:40]}... is a path of more than {_LONGEST_PATH} bytes: give a shorter one")
    if "\0" in str(found):
        raise UserError(f"{str(found)!r} is not a path: it has a null character")
    return found


def user_cache(name: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Returns $MESHWAY_CACHE_DIR/name, else $XDG_CACHE_HOME/meshway/name, else ~/.cache/meshway/name."""
    if own := environment.get("MESHWAY_CACHE_DIR"):
        return local_path(own) / name
    base = environment.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meshway" / name


def open_path(path: str | Path) -> Path:
    """Returns a local path, `~` expanded, or that of an address `gs://bucket/key`, which has the same methods.

    For what may be in a bucket; `local_path` is for what may not.

    Raises:
      UserError: it is the address of something else, or no address; or the extra that reads buckets is not installed.
    """
    if in_bucket(path):
        return path
    if not re.match(r"gs:/", str(path)):
        return local_path(path)
    from meshway.framework.buckets.objects import bucket_path  # lazy: most runs have no bucket

    found: Any = bucket_path(str(path))
    return found


def in_bucket(path: object) -> "TypeGuard[BucketPath]":
    """Returns whether a path is one of `open_path` that is in a bucket."""
    return isinstance(path, PurePath) and not isinstance(path, Path)


def is_disk_trouble(error: OSError) -> bool:
    """Whether a disk refused because it is full or broken, which is nobody's mistake."""
    return error.errno in _DISK_ERRORS


@contextlib.contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turns an OSError inside into an error that names `path`: an EnvironmentFailure if the disk is full or broken, so
    that a supervisor may retry, else a UserError."""
    try:
        yield
    except OSError as error:
        if is_disk_trouble(error):
            raise EnvironmentFailure(f"cannot write {path}: {error.strerror}") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(path: Path, content: bytes | Callable[[BinaryIO], object], temporary: Path | None = None) -> None:
    """Writes a file atomically and durably: a reader, or a crash at any moment, finds the old content or the new, and
    the new one is on disk when this returns.

    Args:
      path: the file.
      content: its bytes, or a function that writes them to a file open in binary mode.
      temporary: the file that is written first, on the same file system; None for a new name beside `path`. A killed
        process leaves it behind.

    Raises:
      OSError: the file cannot be written.
    """
    if in_bucket(path):
        from meshway.framework.buckets.objects import content_of, put

        put(path, content_of(content))
        return
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
            os.unlink(temporary)  # the disk may be full
        raise
    sync(path.parent)


def open_to_append(path: Path) -> "AppendedFile":
    """Opens a file, made if it does not exist, of which lines are added at the end, each in one write.

    Raises:
      OSError: it cannot be opened.
    """
    if in_bucket(path):
        from meshway.framework.buckets.objects import Log

        return Log(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab", buffering=0)


class AppendedFile(Protocol):
    """A file opened to append: `write` returns how many bytes it took; in a bucket they are there after `flush`."""

    def write(self, data: bytes | memoryview, /) -> int | None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def num_repeated(path: Path) -> int:
    """Returns how many requests for files this process has had to repeat; 0 where `path` is local."""
    if not in_bucket(path):
        return 0
    from meshway.framework.buckets import client

    return client.num_repeated()


def check_claimed(path: Path) -> None:
    """Raises EnvironmentFailure where another process has taken over this one's lock on the folder of `path`."""
    if in_bucket(path):
        from meshway.framework.buckets.objects import check_claimed

        check_claimed(path)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The holder of a lock: process `pid` on `host`, `since` a time in seconds since 1970."""

    host: str
    pid: int
    since: float

    def is_process_of(self, other: "Holder") -> bool:
        """Returns whether it is the same process, with another lock."""
        return (self.host, self.pid) == (other.host, other.pid)

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {began}"


def try_lock(path: Path) -> int | None:
    """Locks a file, created if it does not exist; returns its descriptor, or None if another process holds the lock.

    Closing the descriptor, or any end of the process, releases the lock. Only the holder may remove the file: a process
    that has opened it meanwhile detects, once it has the lock, that the file is gone.

    Raises:
      OSError: the file cannot be opened or locked.
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
            time.sleep(_RETRY_SECONDS)  # only a `holder_of` has it, for a moment
        except FileNotFoundError:  # removed by its last holder
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def holder_of(path: Path) -> Holder | None:
    """Returns the holder of the lock on a file; None if there is none, or it is not written in the file.

    Raises:
      OSError: the file cannot be read.
    """
    if in_bucket(path):
        from meshway.framework.buckets.claims import claimed_by

        return _as_holder(claimed_by(path))
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
        with contextlib.suppress(ValueError):
            return _as_holder(json.loads(file.read()))
    return None


def _as_holder(said: Any) -> Holder | None:
    """Returns the holder of a lock by what is written in it; None where it does not tell."""
    try:
        return Holder(**{field.name: said[field.name] for field in dataclasses.fields(Holder)})
    except (TypeError, KeyError):
        return None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock on a file during a `with` block, and removes the file after; yields whether the lock was taken.

    In a bucket it is a claim: one that a killed process left is taken over after at most a minute, which this waits.

    Raises:
      OSError: the file cannot be opened or locked.
    """
    if in_bucket(path):
        from meshway.framework.buckets.claims import Claim

        claim = Claim.take(path, dataclasses.asdict(_this_process()))
        with contextlib.closing(claim) if claim else contextlib.nullcontext():
            yield claim is not None
        return
    lock = try_lock(path)
    if lock is None:
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


@contextlib.contextmanager
def locked_in_turn(path: Path) -> Iterator[None]:
    """Holds the lock on a file during a `with` block, once all others have given it up; the file stays.

    Raises:
      OSError: the file cannot be opened or locked.
    """
    if in_bucket(path):
        with contextlib.ExitStack() as stack:
            while not stack.enter_context(locked(path)):
                time.sleep(_RETRY_BUCKET_SECONDS)
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _lets_others_read(lock: int) -> bool:
    """Whether a file has no exclusive lock, only shared ones or none."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), round(time.time(), 3))
