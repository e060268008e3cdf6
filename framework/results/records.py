"""What evaluations found, on disk: `eval/<name>.jsonl`, written by a training run and by programs beside it."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError
from meshway.framework.files import io_errors, replace_file
from meshway.framework.training.writers import json_line

Record = dict[str, Any]  # `step`, and what was found there


class Records:
    """The files `<name>.jsonl` of a run's folder `eval`: a record a step, in order of steps.

    Any number of processes may write at once: each change is made under a lock, to the whole file, which is replaced
    at once, so that a reader or a crash finds the old content or the new.

    Args:
      folder: made by the first change.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Makes the folder, and tries to write in it; raises UserError where the disk refuses."""
        with self._locked():
            pass

    def read(self, name: str) -> dict[int, Record]:
        """Returns the records of one file by step; none where there is no file.

        Raises:
          UserError: it holds something else.
        """
        return self._read(self._path(name))

    def add(self, step: int, records: Mapping[str, Record], fingerprint: str | None = None) -> None:
        """Writes what was found at `step`, by name of the file, in place of what an earlier evaluation found there.

        Args:
          step: the step.
          records: what was found, without the step.
          fingerprint: tells what was evaluated, and goes into the records. None for the training run's own
            evaluation, which leaves alone what another program found at that step: that one says more.

        Raises:
          UserError: the disk refuses, or a file holds something else.
        """
        with self._locked():
            for name, record in records.items():
                known = self._read(self._path(name))
                if fingerprint is not None:
                    record = {**record, "fingerprint": fingerprint}
                elif "fingerprint" in known.get(step, {}):
                    continue
                self._write(name, known | {step: record})

    def keep_up_to(self, step: int) -> None:
        """Removes the records of later steps, all of them where `step` is 0: what a run that starts there repeats.

        Raises:
          UserError: as `add`.
        """
        with self._locked():
            for path in sorted(self._folder.glob("*.jsonl")):
                known = self._read(path)
                kept = {each: record for each, record in known.items() if step and each <= step}
                if kept != known:
                    self._write(path.stem, kept)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.jsonl"

    def _write(self, name: str, records: Mapping[int, Record]) -> None:
        lines = [json_line(step, _without_step(records[step])) for step in sorted(records)]
        with io_errors(self._path(name)):
            replace_file(self._path(name), b"".join(lines))

    @staticmethod
    def _read(path: Path) -> dict[int, Record]:
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        records: dict[int, Record] = {}
        for number, line in enumerate(lines[:-1], 1):  # after the last newline nothing, or what a crash cut off
            try:
                record = json.loads(line)
                records[int(record["step"])] = record
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}, line {number}: not a record of an evaluation. Only meshway writes this file: mend the "
                    "line, or move the file away to go on without the earlier records"
                ) from error
        return records

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with io_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                os.close(lock)


def _without_step(record: Mapping[str, Any]) -> Record:
    """Returns a record as it was given to `add`."""
    return {key: value for key, value in record.items() if key != "step"}
