"""What batches keep on disk: uploaded and finished files, and a journal of answers. A kill at any moment loses nothing
that was counted and leaves nothing half written."""

import dataclasses
import json
import os
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from meshway.framework.errors import UserError
from meshway.framework.files import replace_file, sync

_LEFT_BEHIND = re.compile(r"\..+\.\d+\.tmp")  # by a killed `replace_file`

Record = TypeVar("Record")


def new_id() -> str:
    """Returns a new part of a name: ids made later sort later, and cannot be guessed."""
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def make_folder(folder: Path) -> None:
    """Makes a folder durably where there is none, and removes from it what a killed process was about to write."""
    folder.mkdir(exist_ok=True)
    sync(folder.parent)
    for path in folder.iterdir():
        if _LEFT_BEHIND.fullmatch(path.name):
            os.unlink(path)


def read_records(folder: Path, make: Callable[..., Record]) -> dict[str, Record]:
    """Returns what `make` makes of the fields that `write_record` has written in a folder, by id, in the order of their
    making.

    Raises:
      UserError: one is not what was written.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = make(**json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is not what meshway wrote there ({error}): put it back, or remove it") from error
    return found


def write_record(folder: Path, id: str, record: Mapping[str, Any]) -> None:
    """Writes a record of a folder durably and atomically."""
    replace_file(folder / f"{id}.json", json.dumps(record).encode())


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file: its size in bytes, when it was made, in seconds since 1970, and the name that its owner gave it, which
    is never a path here."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def to_json(self) -> dict[str, Any]:
        """Returns it as OpenAI's API tells it."""
        return {"object": "file", "status": "processed", "expires_at": None, **dataclasses.asdict(self)}


class FileStore:
    """Files of one folder by generated ids: `ID.content` and, written after it, `ID.json`, with which it exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, StoredFile] = {}

    def open(self) -> None:
        """Reads which files there are, and removes content that never became one."""
        make_folder(self._folder)
        self._files = read_records(self._folder, StoredFile)
        for path in self._folder.glob("*.content"):
            if path.stem not in self._files:
                os.unlink(path)

    def all(self) -> list[StoredFile]:
        """Returns all files, the oldest first."""
        return [self._files[id] for id in sorted(self._files)]

    def get(self, id: str) -> StoredFile | None:
        """Returns a file, None if there is none with this id."""
        return self._files.get(id)

    def path(self, file: StoredFile) -> Path:
        """Returns where the content of a file is."""
        return self._folder / f"{file.id}.content"

    def add(self, write: Callable[[BinaryIO], object], filename: str, purpose: str, id: str = "") -> StoredFile:
        """Makes a file durably.

        Args:
          write: writes its content.
          filename: what its owner calls it.
          purpose: 'batch' or 'batch_output'.
          id: by which it is known; a new one where it is empty. An old file of this id is replaced.

        Raises:
          OSError: it cannot be written.
        """
        id = id or f"file-{new_id()}"
        content = self._folder / f"{id}.content"
        replace_file(content, write)
        file = StoredFile(id, content.stat().st_size, int(time.time()), filename, purpose)
        write_record(self._folder, id, dataclasses.asdict(file))
        self._files[id] = file
        return file

    def delete(self, file: StoredFile) -> None:
        """Removes a file: first its record, so that it is never there without its content."""
        if self._files.pop(file.id, None) is None:
            return  # by another call
        try:
            os.unlink(self._folder / f"{file.id}.json")
        except OSError:
            self._files[file.id] = file
            raise
        os.unlink(self.path(file))
        sync(self._folder)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A line of a batch's result: for the line `number` of its input, counted from 1; `failed` ones go to the file of
    errors. `record` is JSON without a line break."""

    number: int
    failed: bool
    record: bytes


class Journal:
    """Answers in the order in which they came, each in a line with a checksum: `CRC32 NUMBER ok|failed RECORD`.

    An answer counts once it is on disk, and the first for a number is the one that stays. Lines whose checksum is wrong
    are those that were being written when the process or the machine went down: they do not count.

    Attributes:
      is_broken: whether writing failed: it must be opened again.
    """

    def __init__(self, path: Path) -> None:
        """Opens a journal, made if there is none, and drops what is torn at its end.

        Raises:
          OSError: it cannot be read or written.
        """
        self._places: dict[int, tuple[int, int, bool]] = {}  # offset and size of a record, and whether it failed
        self._failed, self.is_broken = 0, False
        self._descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            self._end = self._recover(path)
            os.ftruncate(self._descriptor, self._end)
            os.fsync(self._descriptor)  # what was found may not be on disk yet
            sync(path.parent)
        except BaseException:
            self.close()
            raise

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def counts(self) -> dict[str, int]:
        """Returns how many lines are completed, and how many failed."""
        return {"completed": len(self._places) - self._failed, "failed": self._failed}

    def append(self, answers: Sequence[Answer]) -> None:
        """Writes answers; they are on disk when this returns. Those for numbers that are there already are left out."""
        places, text, end = dict[int, tuple[int, int, bool]](), bytearray(), self._end
        for answer in answers:
            if answer.number in self._places or answer.number in places:
                continue
            head = b"%d %s " % (answer.number, b"failed" if answer.failed else b"ok")
            line = b"%08x %s%s\n" % (zlib.crc32(head + answer.record), head, answer.record)
            places[answer.number] = (end + 9 + len(head), len(answer.record), answer.failed)
            end += len(line)
            text += line
        try:
            left = memoryview(text)
            while left:
                left = left[os.pwrite(self._descriptor, left, end - len(left)) :]
            os.fsync(self._descriptor)
        except BaseException:
            self.is_broken = True
            raise
        self._places |= places
        self._failed += sum(failed for _, _, failed in places.values())
        self._end = end

    def records(self, failed: bool) -> Iterator[bytes]:
        """Yields the records that failed or those that did not, by number."""
        for _, (offset, size, is_failed) in sorted(self._places.items()):
            if is_failed == failed:
                yield os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _recover(self, path: Path) -> int:
        """Reads where the records are; returns the end of the last one."""
        offset = end = 0
        with open(path, "rb") as file:
            for line in file:
                checksum, _, rest = line[:-1].partition(b" ")
                if line.endswith(b"\n") and checksum == b"%08x" % zlib.crc32(rest):
                    number, kind, record = rest.split(b" ", 2)
                    place = (offset + len(line) - 1 - len(record), len(record), kind == b"failed")
                    self._places.setdefault(int(number), place)
                    end = offset + len(line)
                offset += len(line)
        self._failed = sum(failed for _, _, failed in self._places.values())
        return end
