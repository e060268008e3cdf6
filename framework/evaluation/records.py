"""What evaluations found, on disk; which checkpoint is evaluated next, and by which program."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.errors import UserError, nearest_steps
from meshway.framework.files import in_bucket, io_errors, locked, locked_in_turn, replace_file
from meshway.framework.telemetry.writers import json_line


class Claims:
    """Claims on pieces of work by name, each held by one process, which loses it when it ends, however it ends.

    Args:
      folder: of lock files, made when it is needed; a claim's file is gone once it is released.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextlib.contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Holds the claim on `name` for the time of a `with` block, which is told whether it is held; else another
        process holds it.

        Raises:
          UserError: the disk refuses.
        """
        with contextlib.ExitStack() as stack:
            with io_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(locked(self._folder / name))
            yield held


Record = dict[str, Any]  # `step`, and what was found there


def record_name(task: str, split: str | None) -> str:
    """Returns the name under which a task's records are kept: its own, with the split where that is another than the
    recipe's validation split."""
    return f"{task}.{split.replace('/', '_')}" if split else task


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
                known = {at: _without_media(each, at < step) for at, each in self._read(self._path(name)).items()}
                if fingerprint is not None:
                    record = {**record, "fingerprint": fingerprint}
                elif "fingerprint" in known.get(step, {}):
                    continue
                self._write(name, known | {step: self._without_kept(name, step, record)})

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
                for gone in known.keys() - kept.keys():
                    (self._folder / f"{path.stem}.predictions" / f"{gone}.jsonl").unlink(missing_ok=True)

    def _without_kept(self, name: str, step: int, record: Record) -> Record:
        """Returns a record without its `kept` predictions, which go into a file of their own."""
        if "kept" not in record:
            return record
        path = self._folder / f"{name}.predictions" / f"{step}.jsonl"
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in record["kept"]]
        with io_errors(path):
            path.parent.mkdir(exist_ok=True)
            replace_file(path, "".join(lines).encode("utf-8", "backslashreplace"))
        return {key: value for key, value in record.items() if key != "kept"}

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
        with io_errors(self._folder), locked_in_turn(self._folder / ".lock"):
            yield


def _without_media(record: Record, is_earlier: bool) -> Record:
    """Returns a record without its images, sounds and tensors where a later step has come: TensorBoard has them all."""
    if not is_earlier or "values" not in record:
        return record
    small = {name: value for name, value in record["values"].items() if value["kind"] in ("text", "histogram")}
    rest = {key: value for key, value in record.items() if key != "values"}
    return rest | ({"values": small} if small else {})


def _without_step(record: Mapping[str, Any]) -> Record:
    """Returns a record as it was given to `add`."""
    return {key: value for key, value in record.items() if key != "step"}


LATEST, ALL = "latest", "all"
COMMITTED = "commit_success.txt"  # of Orbax: the last file of a checkpoint in a bucket


def complete_steps(folder: Path) -> list[int]:
    """Returns the steps of complete checkpoints, ascending: those alone have a bare number for a name, and in a bucket,
    where nothing is renamed, a file that says so."""
    with contextlib.suppress(FileNotFoundError):
        found = (path for path in folder.iterdir() if path.name.isdecimal())
        return sorted(int(path.name) for path in found if not in_bucket(path) or (path / COMMITTED).is_file())
    return []


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which steps are asked for.

    Attributes:
      steps: those, or None.
      latest: whether the latest alone: with `steps` None whichever it is by then, else the one it was.
    """

    steps: tuple[int, ...] | None = None
    latest: bool = False

    @classmethod
    def parse(cls, text: str | int | Sequence[int]) -> "Wanted":
        """Reads 'latest', 'all', '100' or '100,200', or numbers.

        Raises:
          UserError: it is something else.
        """
        if text in (LATEST, ALL):
            return cls(latest=text == LATEST)
        if isinstance(text, int):
            return cls((text,))
        words = [word.strip() for word in text.split(",")] if isinstance(text, str) else [str(each) for each in text]
        if not words or not all(word.isdecimal() for word in words):
            raise UserError(f"--steps={text} is none of latest, all, a step (100) or several (100,200)")
        return cls(tuple(sorted({int(word) for word in words})))

    def among(self, steps: Sequence[int]) -> list[int]:
        """Returns those of `steps`, ascending, that are asked for."""
        if self.steps is not None:
            return [step for step in steps if step in self.steps]
        return list(steps[-1:] if self.latest else steps)

    def fixed(self, folder: Path) -> "Wanted":
        """Returns the steps themselves, each of a checkpoint that is there.

        Raises:
          UserError: there is no checkpoint, or none of a step that is asked for.
        """
        steps = complete_steps(folder)
        if not steps:
            raise UserError(f"there is no complete checkpoint in {folder}; --watch waits for the first")
        for step in self.steps or ():
            if step not in steps:
                raise UserError(f"{folder} has no checkpoint of step {step}; {nearest_steps(step, steps)}")
        return Wanted(tuple(self.among(steps)), self.latest)


@dataclasses.dataclass
class StepQueue:
    """The steps to evaluate, one after the other, each claimed.

    Attributes:
      folder: of the checkpoints.
      wanted: which of them; without `watch` as `Wanted.fixed` gives them.
      is_done: says whether a step has been evaluated, by anyone.
      claims: where a step is claimed, so that no other program evaluates it at the same time.
      say: prints a line.
      watch: whether to wait for checkpoints to come.
      total: the step at which the run ends, where it is known.
      idle_timeout: seconds without a new checkpoint after which watching ends.
      poll: seconds between looks at the folder.
      clock, sleep: for tests.
    """

    folder: Path
    wanted: Wanted
    is_done: Callable[[int], bool]
    claims: Claims
    say: Callable[[str], None]
    watch: bool = False
    total: int | None = None
    idle_timeout: float | None = None
    poll: float = 1.0
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._handled: set[int] = set()  # given out or found done, among those that are there
        self._ever: set[int] = set()  # and all that ever were
        self._seen: set[int] = set()
        self._skipped = 0
        self._said = ""

    @property
    def skipped(self) -> int:
        """How many of the steps asked for had been evaluated by others or before."""
        return self._skipped

    @property
    def removed(self) -> list[int]:
        """The steps asked for by number whose checkpoints were gone before their turn came."""
        return [step for step in self.wanted.steps or () if step not in self._ever and not self.watch]

    @contextlib.contextmanager
    def next(self) -> Iterator[int | None]:
        """Waits for a step to evaluate and holds the claim on it for the time of a `with` block; None at the end."""
        last_new = self.clock()
        while True:
            steps = complete_steps(self.folder)
            self._handled.intersection_update(steps)  # one that comes back is another
            if set(steps) - self._seen:
                self._seen.update(steps)
                last_new = self.clock()
            busy = False
            for step in self._open(steps):
                with self.claims.take(str(step)) as held:
                    if held and not self._is_done(step):
                        self._note(step)
                        self._said = ""
                        yield step
                        return
                    busy |= not held
            if not busy and self._ends(self.clock() - last_new):
                yield None
                return
            self._say_once("steps that another program evaluates" if busy else "a checkpoint")
            self.sleep(self.poll)

    def before(self, step: int) -> int | None:
        """Turns to the checkpoint before one that cannot be read, where the latest was asked for; None for none."""
        earlier = [other for other in complete_steps(self.folder) if other < step]
        if not self.wanted.latest or not earlier:
            return None
        self.wanted = Wanted((earlier[-1],), latest=True)
        return earlier[-1]

    def _open(self, steps: Sequence[int]) -> list[int]:
        """Returns the steps that are asked for and neither done nor given out."""
        return [step for step in self.wanted.among(steps) if step not in self._handled and not self._is_done(step)]

    def _is_done(self, step: int) -> bool:
        if done := self.is_done(step):
            self._skipped += 1
            self._note(step)
        return done

    def _note(self, step: int) -> None:
        self._handled.add(step)
        self._ever.add(step)

    def _ends(self, idle: float) -> bool:
        if not self.watch:
            return True
        if self.wanted.steps is not None and self._ever.issuperset(self.wanted.steps):
            return True
        if self.total is not None and max(self._seen, default=-1) >= self.total:
            return True
        if self.idle_timeout is not None and idle > self.idle_timeout:
            self.say(f"no new checkpoint for {self.idle_timeout:g} s: done watching {self.folder}")
            return True
        return False

    def _say_once(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self.say(f"waiting for {what} in {self.folder}")
