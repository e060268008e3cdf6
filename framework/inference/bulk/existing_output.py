"""What lies at an output from before: this job's work, another's, or somebody's file."""

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
class Past:
    """What a summary says of a finished output.

    Attributes:
      job: whose it is.
      files: the bytes of each file of the result.
    """

    job: Mapping[str, str]
    files: Mapping[Path, int]


def settle(paths: OutputPaths, job: Mapping[str, str], overwrite: bool) -> bool:
    """Makes the place this job's own, and returns whether the job has finished there already.

    Another job's files are removed if `overwrite` allows it; so is this job's finished result, while its unfinished
    chunks stay: a job that is killed and started by the same command goes on. Files that we have not written are
    never touched. To be called under the lock.

    Raises:
      UserError: the place is another job's (what differs is named), or files there are not ours.
    """
    past = _read_past(paths)
    if past is not None:
        there = [path for path in past.files if path.exists()]
        for path in there:
            if path.stat().st_size != past.files[path]:
                raise UserError(f"{path} was changed after {WRITTEN_BY} wrote it: move it away")
        if not overwrite and len(there) == len(past.files) and past.job == job:
            clear(paths)
            return True
        if not overwrite and there and past.job != job:
            raise UserError(f"{paths.output} is the result of another job ({_differences(past.job, job)}): {_CHOICES}")
        # In this order, so that at any moment the summary says of all that is there that it is ours.
        clear(paths)
        for path in there:
            remove(path)
        remove(paths.summary)
    _settle_parts(paths, job, overwrite)
    return False


def claimed(paths: OutputPaths) -> int | None:
    """Returns how many chunks the output that is being finished has, None before that began."""
    record = _read(paths.claim)
    with _ours(paths.claim):
        return None if record is None else int(record["num_chunks"])


def refuse_strangers(paths: OutputPaths) -> None:
    """Raises UserError if files that are not ours bear the names of results."""
    strangers = paths.strangers()
    if strangers:
        raise UserError(f"{strangers[0]} exists already and was not written by {WRITTEN_BY}: move it away")


def clear(paths: OutputPaths) -> None:
    """Removes our chunks, and what says whose they are last."""
    for path in (*paths.leftovers(), paths.claim, paths.job):
        remove(path)


def abandon(paths: OutputPaths, job: Mapping[str, str]) -> None:
    """Removes what this job has put there before its first chunk. To be called under the lock."""
    if _read(paths.job) == job and not paths.sides() and claimed(paths) is None:
        clear(paths)


def _settle_parts(paths: OutputPaths, job: Mapping[str, str], overwrite: bool) -> None:
    owner, chunks = _read(paths.job), paths.sides()
    if owner is not None and owner != job:
        # Nothing is lost with a job that has not finished a chunk, such as one whose recipe was wrong.
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
        raise UserError(f"{paths.parts} holds chunks of a job that is not known ({paths.job.name} is missing)")
    if claimed(paths) is None:
        refuse_strangers(paths)
    if owner is None:
        write_durably(paths.job, paths.temporary, lambda file: file.write(json.dumps(dict(job), indent=2).encode()))


def _read_past(paths: OutputPaths) -> Past | None:
    record = _read(paths.summary)
    if record is None:
        return None
    if record.get("written_by") != WRITTEN_BY:
        raise UserError(f"{paths.summary} exists already and was not written by {WRITTEN_BY}: move it away")
    folder = paths.output if paths.sharded else paths.output.parent
    with _ours(paths.summary):
        return Past(record["job"], {folder / file["name"]: file["bytes"] for file in record["files"]})


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object of a file, None if there is no file."""
    if not path.exists():
        return None
    with _ours(path), io_errors(path):
        return dict(json.loads(path.read_text("utf-8")).items())


@contextlib.contextmanager
def _ours(path: Path) -> Iterator[None]:
    """Turns what fails inside because a file was edited into a UserError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not what {WRITTEN_BY} wrote there ({error}): move it away") from error


def _differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    told = [
        f"{name}: {theirs.get(name, _NOT_GIVEN)} there, {ours.get(name, _NOT_GIVEN)} now" for name in names[:_SHOWN]
    ]
    return ", ".join([*told, *([f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])])
