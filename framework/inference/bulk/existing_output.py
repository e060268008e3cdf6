"""Handles what already exists at an output path: this job's chunks or result, another job's, or other files."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.files import io_errors
from meshway.framework.inference.bulk.outputs import OutputPaths, remove, write_durably
from meshway.framework.terminal import count_of

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


def settle(paths: OutputPaths, job: Mapping[str, str], overwrite: bool) -> bool:
    """Prepares the output path for this job; returns whether the job has already finished there.

    With `overwrite`, files of another job and this job's finished result are removed. This job's unfinished chunks are
    kept: a job that is killed and started by the same command continues. Files that we have not written are never
    changed. Call it while holding the lock.

    Raises:
      UserError: the output is another job's (names the differences), or files there were not written by us.
    """
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
    """Removes this job's files if it has committed no chunk. Call it while holding the lock."""
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
    shown = [
        f"{name}: {theirs.get(name, _NOT_GIVEN)} there, {ours.get(name, _NOT_GIVEN)} now" for name in names[:_SHOWN]
    ]
    return ", ".join([*shown, *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])])
