"""The paths of an output, unfinished and finished, its locks, durable writes to it, and what already exists there."""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import Holder, holder_of, io_errors, replace_file, sync, try_lock
from meshway.framework.inference.bulk.inputs import Share
from meshway.framework.terminal import count_of, listed

FILE_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}  # of one merged file
SHARD_FORMATS = ("jsonl", "parquet")
_NOT_WRITTEN = (".csv", ".tsv", ".ndjson", ".text", ".gz", ".bz2", ".xz", ".zst", ".zip", ".arrow", ".pq")
_OURS = re.compile(r"chunk-\d{6,}\.\w+|temporary(-\d+-of-\d+)?")
_POLL_SECONDS = 0.05
_TRIES = 20  # of a lock that another process may hold for a moment, to see whether it is stale


@dataclasses.dataclass(frozen=True)
class OutputPaths:
    """The paths of one output. In a folder of shards, other files begin with `_`: readers of datasets ignore them.

    Attributes:
      output: the merged file, or the folder of shards.
      format: 'jsonl', 'parquet', 'txt', or that of a writer of one's own: its suffix.
      sharded: whether it is a folder, each chunk a shard.
      share: the part of the job that this process computes.
    """

    output: Path
    format: str
    sharded: bool
    share: Share = Share()

    @property
    def parts(self) -> Path:
        """The folder of chunks until the output is finished, on the output's own file system."""
        return self.output / "_parts" if self.sharded else self._beside("parts")

    @property
    def summary(self) -> Path:
        return self.output / "_summary.json" if self.sharded else self._beside("summary.json")

    @property
    def lock(self) -> Path:
        """The lock that a whole job holds all the time, and a share in its turn."""
        return self.parts / "lock"

    @property
    def own_lock(self) -> Path:
        """The lock that this process holds all the time."""
        return self.lock if self.share.is_whole else self.parts / f"{self.share.name}.lock"

    def other_locks(self) -> list[Path]:
        """Returns the locks of shares but this one, held or left behind."""
        return [path for path in sorted(self.parts.glob("*-of-*.lock")) if path != self.own_lock]

    @property
    def job(self) -> Path:
        return self.parts / "job.json"

    @property
    def claim(self) -> Path:
        """The file that shows that files with the names of results were written by us."""
        return self.parts / "finishing.json"

    @property
    def temporary(self) -> Path:
        """The path to which each file is written first."""
        return self.parts / ("temporary" if self.share.is_whole else f"temporary-{self.share.name}")

    def chunk(self, number: int) -> Path:
        return self.parts / f"chunk-{number:06d}.{self.format}"

    def side(self, number: int) -> Path:
        """The side file of a chunk, with its size and digests: a chunk is committed once it exists."""
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

    def existing_results(self) -> list[Path]:
        """Returns existing files with the name of a result, for any number of shards."""
        if self.sharded:
            found = (
                path for suffix in {*SHARD_FORMATS, self.format} for path in self.output.glob(f"part-*-of-*.{suffix}")
            )
            return sorted(found)
        return [self.output] if self.output.exists() else []

    def leftovers(self) -> list[Path]:
        """Returns our files in the folder of chunks, without those that identify the job."""
        return sorted(path for path in self.parts.glob("*") if _OURS.fullmatch(path.name))

    def _beside(self, what: str) -> Path:
        return self.output.with_name(f"{self.output.name}.{what}")


def output_paths(output: Path, format: str | None, share: Share = Share(), own: str | None = None) -> OutputPaths:
    """Returns the paths of an output: one file if it ends in a known suffix, else a folder of shards.

    Args:
      output, share: see `OutputPaths`.
      format: 'jsonl' or 'parquet', of shards; None for what the name says.
      own: the suffix of a writer of one's own, instead of all others.

    Raises:
      UserError: the format contradicts the name, or there is no such format.
    """
    if own is not None:
        if format is not None:
            raise UserError(f"no format of shards is chosen where a writer has its own ({own}): leave out {format!r}")
        if output.suffix not in ("", own) and output.suffix in (*FILE_FORMATS, *_NOT_WRITTEN):
            raise UserError(f"output {output}: the writer writes {own}: end it in that, or name a folder")
        if output.is_dir() and output.suffix == own or output.is_file() and output.suffix != own:
            raise UserError(f"output {output}: a {'file' if output.is_dir() else 'folder'} is written there")
        return OutputPaths(output, own[1:], output.suffix != own, share)
    known = FILE_FORMATS.get(output.suffix)
    if known is not None:
        if format not in (None, known):
            raise UserError(f"output {output} ends in {output.suffix}, its format is {known}, not {format}")
        if output.is_dir():
            raise UserError(f"output {output} is a folder; as a file it would hold {known}")
        return OutputPaths(output, known, False, share)
    if output.suffix in _NOT_WRITTEN:
        raise UserError(
            f"output {output}: {output.suffix} is not written; end it in {', '.join(FILE_FORMATS)}, or name a folder"
        )
    if format is not None and format not in SHARD_FORMATS:
        raise UserError(
            f"no format {format!r} of shards{did_you_mean(format, SHARD_FORMATS)}; there are {', '.join(SHARD_FORMATS)}"
        )
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file; a folder of shards is written there")
    return OutputPaths(output, format or "jsonl", True, share)


class OutputLock:
    """The locks on an output's folder of chunks, which is created if it does not exist. A whole job excludes everyone
    else; shares work side by side, and take turns at the start and the end, where one changes what is of all."""

    def __init__(self, paths: OutputPaths) -> None:
        self._paths = paths
        self._own: int | None = None
        self._turn: int | None = None

    @property
    def held(self) -> bool:
        return self._own is not None

    def acquire(self) -> None:
        """Creates the folder and takes the lock of this process.

        Raises:
          UserError: another process holds it, or that of a share of this whole job; the folder cannot be created.
        """
        paths, tries = self._paths, 1 if self._paths.share.is_whole else _TRIES
        with io_errors(paths.parts):
            while self._own is None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(paths.parts)
                    sync(paths.parts.parent)
                # A holder that ends removes file and folder, which may happen between any two steps here.
                with contextlib.suppress(FileNotFoundError):
                    self._own = try_lock(paths.own_lock)
                    if self._own is None:
                        tries -= 1
                        if not tries:
                            raise UserError(_working(holder_of(paths.own_lock), paths.own_lock))
                        time.sleep(_POLL_SECONDS)
        if paths.share.is_whole and (others := self.others()):
            raise UserError(_working(*others[0]))

    def take_turn(self, wait: bool = True) -> bool:
        """Returns whether this process alone may look at what is of all, waiting for other shares if asked to.

        Raises:
          UserError: what it would wait for is a whole job.
        """
        if self._turn is None and not self._paths.share.is_whole:
            tries = _TRIES
            while (found := try_lock(self._paths.lock)) is None and wait:
                holder, shares = holder_of(self._paths.lock), self.others()
                if holder is not None and not any(holder.is_process_of(each) for each, _ in shares):
                    tries -= 1
                if not tries:
                    raise UserError(_working(holder, self._paths.lock))
                time.sleep(_POLL_SECONDS)
            self._turn = found
            return found is not None
        return True

    def end_turn(self) -> None:
        """Lets other shares have their turn."""
        if self._turn is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._paths.lock)
            os.close(self._turn)
            self._turn = None

    def others(self) -> list[tuple[Holder, Path]]:
        """Returns which other shares are being computed now: who does, and the lock."""
        with io_errors(self._paths.parts):
            found = [(holder_of(path), path) for path in self._paths.other_locks()]
        return [(holder, path) for holder, path in found if holder is not None]

    def discard(self) -> None:
        """Releases all that is held; removes its files, those of killed shares, and the folder if it is empty."""
        self.end_turn()
        if self._own is not None:
            with contextlib.suppress(OSError):
                for path in self._paths.other_locks():
                    if (left := try_lock(path)) is not None:
                        os.unlink(path)
                        os.close(left)
                os.unlink(self._paths.own_lock)
                os.rmdir(self._paths.parts)
            os.close(self._own)
            self._own = None


def _working(holder: Holder | None, lock: Path) -> str:
    return f"{holder or 'another process'} is working on this output ({lock} is locked): wait for it"


def write_durably(path: Path, temporary: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically by `write`; see `files.replace_file`. Raises UserError, or EnvironmentFailure."""
    with io_errors(path):
        replace_file(path, write, temporary)


def move_durably(source: Path, target: Path) -> None:
    """Renames a file that is already on disk, within one file system. Raises UserError."""
    with io_errors(target):
        os.replace(source, target)
        sync(target.parent)


def remove(path: Path) -> None:
    """Removes a file if it exists. Raises UserError."""
    with io_errors(path), contextlib.suppress(FileNotFoundError):
        os.unlink(path)


WRITTEN_BY = "meshway infer"
_NOT_GIVEN = "not given"
_SHOWN = 5  # differences in one message
_CHOICES = "give another output, or overwrite (--overwrite)"


@dataclasses.dataclass(frozen=True)
class FinishedOutput:
    """The summary of a finished output.

    Attributes:
      job: the job that wrote it (see `ChunkStore`).
      files: the size in bytes of each file of the result.
    """

    job: Mapping[str, str]
    files: Mapping[Path, int]


def settle(
    paths: OutputPaths, job: Mapping[str, str], overwrite: bool, others: Sequence[tuple[Holder, Path]] = ()
) -> bool:
    """Prepares the output path for this job; returns whether the job has already finished there.

    With `overwrite`, files of another job and this job's finished result are removed. This job's unfinished chunks are
    kept: a job that is killed and started by the same command continues. Files that we have not written are never
    changed. Call it while holding the lock, as a share in its turn. `others` are the shares that are being computed.

    Raises:
      UserError: the output is another job's (names the differences), or files there were not written by us.
    """
    if others and (owner := _read(paths.job)) not in (None, dict(job)):
        raise UserError(f"{_working(*others[0])}, as its job is another one ({_differences(owner or {}, job)})")
    finished = _read_finished(paths)
    if finished is not None:
        existing = [path for path in finished.files if path.exists()]
        for path in existing:
            if path.stat().st_size != finished.files[path]:
                raise UserError(f"{path} was changed after {WRITTEN_BY} wrote it: move it away")
        if not overwrite and len(existing) == len(finished.files) and finished.job == job:
            clear(paths)
            return True
        if not overwrite and existing and finished.job != job:
            raise UserError(
                f"{paths.output} is the result of another job ({_differences(finished.job, job)}): {_CHOICES}"
            )
        # The summary last: until then it shows that the other files are ours.
        clear(paths)
        for path in existing:
            remove(path)
        remove(paths.summary)
    _settle_parts(paths, job, overwrite)
    return False


def claimed(paths: OutputPaths) -> int | None:
    """Returns the number of chunks of an output that is being finished, None if finishing has not begun."""
    record = _read(paths.claim)
    with _written_by_us(paths.claim):
        return None if record is None else int(record["num_chunks"])


def refuse_foreign_files(paths: OutputPaths) -> None:
    """Raises UserError if files with the names of results exist, which we have not written."""
    files = paths.existing_results()
    if files:
        raise UserError(f"{files[0]} exists already and was not written by {WRITTEN_BY}: move it away")


def clear(paths: OutputPaths) -> None:
    """Removes our chunks, and last the files that identify them as ours."""
    for path in (*paths.leftovers(), paths.claim, paths.job):
        remove(path)


def abandon(paths: OutputPaths, job: Mapping[str, str]) -> None:
    """Removes this job's files if it has committed no chunk. Call it while holding the lock, as a share in its turn."""
    if _read(paths.job) == job and not paths.sides() and claimed(paths) is None:
        clear(paths)


def _settle_parts(paths: OutputPaths, job: Mapping[str, str], overwrite: bool) -> None:
    owner, chunks = _read(paths.job), paths.sides()
    if owner is not None and owner != job:
        # A job without a finished chunk, such as one with a wrong recipe, may be replaced.
        if chunks and not overwrite:
            raise UserError(
                f"{paths.parts} holds {count_of(len(chunks), 'chunk')} of another job ({_differences(owner, job)}): "
                f"{_CHOICES}"
            )
        num_chunks = claimed(paths)
        for path in paths.results(num_chunks) if num_chunks is not None else ():
            remove(path)
        clear(paths)
        owner, chunks = None, []
    if owner is None and chunks:
        raise UserError(f"{paths.parts} holds chunks of an unknown job ({paths.job.name} is missing)")
    if claimed(paths) is None:
        refuse_foreign_files(paths)
    if owner is None:
        write_durably(paths.job, paths.temporary, lambda file: file.write(json.dumps(dict(job), indent=2).encode()))


def _read_finished(paths: OutputPaths) -> FinishedOutput | None:
    record = _read(paths.summary)
    if record is None:
        return None
    if record.get("written_by") != WRITTEN_BY:
        raise UserError(f"{paths.summary} exists already and was not written by {WRITTEN_BY}: move it away")
    folder = paths.output if paths.sharded else paths.output.parent
    with _written_by_us(paths.summary):
        return FinishedOutput(record["job"], {folder / file["name"]: file["bytes"] for file in record["files"]})


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object of a file, None if there is no file."""
    if not path.exists():
        return None
    with _written_by_us(path), io_errors(path):
        return dict(json.loads(path.read_text("utf-8")).items())


@contextlib.contextmanager
def _written_by_us(path: Path) -> Iterator[None]:
    """Turns errors from content that we would not write into a UserError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what {WRITTEN_BY} wrote there ({error}): move it away") from error


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    said = (f"{name}: {theirs.get(name, _NOT_GIVEN)} there, {ours.get(name, _NOT_GIVEN)} now" for name in names)
    return listed(said, _SHOWN)
