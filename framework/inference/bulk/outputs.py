"""Where each file of an output lies while it is made and in the end, and who works on it."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import holder_of, io_errors, replace_file, sync, try_lock


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


FILE_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}  # of one merged file
SHARD_FORMATS = ("jsonl", "parquet")
_NOT_WRITTEN = (".csv", ".tsv", ".ndjson", ".text", ".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".pq")
_OURS = re.compile(r"chunk-\d{6,}\.(jsonl|parquet|txt|json)|temporary")


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """The names of one output. In a folder, what is no shard begins with `_`: readers of datasets pass over it.

    Attributes:
      output: the merged file, or the folder of shards.
      format: 'jsonl', 'parquet' or 'txt'.
      sharded: whether it is a folder, each chunk a shard.
    """

    output: Path
    format: str
    sharded: bool

    @property
    def parts(self) -> Path:
        """The folder of chunks, there until the output is finished: on the output's own file system."""
        return self.output / "_parts" if self.sharded else self._beside("parts")

    @property
    def summary(self) -> Path:
        return self.output / "_summary.json" if self.sharded else self._beside("summary.json")

    @property
    def lock(self) -> Path:
        return self.parts / "lock"

    @property
    def job(self) -> Path:
        return self.parts / "job.json"

    @property
    def claim(self) -> Path:
        """Says that what lies under the names of the result was put there by us."""
        return self.parts / "finishing.json"

    @property
    def temporary(self) -> Path:
        """Where each file is written first."""
        return self.parts / "temporary"

    def chunk(self, number: int) -> Path:
        return self.parts / f"chunk-{number:06d}.{self.format}"

    def side(self, number: int) -> Path:
        """What is known of a chunk: it is committed once this is there."""
        return self.parts / f"chunk-{number:06d}.json"

    def sides(self) -> list[tuple[int, Path]]:
        """Returns (number, path) of each chunk's side file, in order."""
        found = {int(path.name[6:-5]): path for path in self.parts.glob("chunk-*.json") if _OURS.fullmatch(path.name)}
        return sorted(found.items())

    def shard(self, number: int, num_shards: int) -> Path:
        return self.output / f"part-{number:05d}-of-{num_shards:05d}.{self.format}"

    def results(self, num_chunks: int) -> list[Path]:
        """Returns the files of the finished output."""
        if self.sharded:
            return [self.shard(number, num_chunks) for number in range(num_chunks)]
        return [self.output]

    def strangers(self) -> list[Path]:
        """Returns files that bear a result's name."""
        if self.sharded:
            found = (path for suffix in SHARD_FORMATS for path in self.output.glob(f"part-*-of-*.{suffix}"))
            return sorted(found)
        return [self.output] if self.output.exists() else []

    def leftovers(self) -> list[Path]:
        """Returns what we have put into the folder of chunks, but for what says whose it is."""
        return sorted(path for path in self.parts.glob("*") if _OURS.fullmatch(path.name))

    def _beside(self, what: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{what}")


def output_paths(output: Path, format: str | None) -> OutputPaths:
    """Returns the names of an output: one file where it ends in a known suffix, else a folder of shards.

    Raises:
      UserError: the format does not fit the name, or is none.
    """
    known = FILE_FORMATS.get(output.suffix)
    if known is not None:
        if format not in (None, known):
            raise UserError(f"output {output} ends in {output.suffix}, its format is {known}, not {format}")
        if output.is_dir():
            raise UserError(f"output {output} is a folder; as a file it would hold {known}")
        return OutputPaths(output, known, False)
    if output.suffix in _NOT_WRITTEN:
        raise UserError(
            f"output {output}: {output.suffix} is not written; end it in {', '.join(FILE_FORMATS)}, or name a folder"
        )
    if format is not None and format not in SHARD_FORMATS:
        raise UserError(
            f"no format {format!r} of shards{did_you_mean(format, SHARD_FORMATS)}; there are {', '.join(SHARD_FORMATS)}"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; a folder of shards is to lie there")
    return OutputPaths(output, format or "jsonl", True)


def write_durably(path: Path, temporary: Path, write: Callable[[BinaryIO], object]) -> None:
    """Puts what `write` writes at `path`; see `files.replace_file`. Raises UserError, or EnvironmentFailure."""
    with io_errors(path):
        replace_file(path, write, temporary)


def move_durably(source: Path, target: Path) -> None:
    """Renames a file that is on disk already, within one file system. Raises UserError."""
    with io_errors(target):
        os.replace(source, target)
        sync(target.parent)


def remove(path: Path) -> None:
    """Removes a file if it is there. Raises UserError."""
    with io_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)
