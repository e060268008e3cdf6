"""How many rows each pool of a task makes: counted by several processes, and kept beside the task's cache.

Where row n of a pass is follows from the rows of the pools visited before it, and those from packing them. The counts
are a pure function of the examples' sizes, the lengths, the objective and the seed, so they are counted once:

    SPLIT/rows.KEY.0.json       rows of each pool in each pass; where an objective's sizes repeat only after some
                                passes, .1, .2, ... are of those in between

KEY is a digest of all they depend on, which the file holds too. A file that is damaged, or of anything else, is not
used: the rows are counted again. So these files may be removed at any time.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from meshway.framework.files import replace_file, try_lock
from meshway.framework.progress import Bar, Display, seconds_left

FORMAT = 1
PARALLEL = 64  # pools of a task from which on they are counted ahead, with a display where someone waits
FEWEST = 16  # pools that are worth the start of a process
_RETRY_SECONDS = 0.5
_CHILD = "from meshway.framework.data.rows import row_counts; row_counts.work()"


class Pools(Protocol):
    """What is counted: a `RowSource`; it is sent to the processes that count.

    Attributes:
      name: the task.
    """

    name: str

    def count(self, phase: int, pool: int) -> int: ...


@dataclasses.dataclass(frozen=True)
class RowTable:
    """Where the counts of one task are kept.

    Attributes:
      folders: where to look, and to write to the first that can be written.
      examples: a text that changes whenever the task's examples may.
    """

    folders: Sequence[Path]
    examples: str

    def load(self, key: Mapping[str, Any], phase: int, items: np.ndarray) -> np.ndarray | None:
        """Returns the rows of each pool, int64 [pools]; None where they are not kept, or, with a word, are damaged.

        Args:
          key: all that the counts depend on, beside the examples.
          phase: which of the passes after which plans repeat.
          items: how many items each pool has [pools]: it has as many rows at most.
        """
        for folder in self.folders:
            path = folder / self._name(key, phase)
            try:
                content = path.read_bytes()
            except OSError:
                continue
            rows = self._rows_in(content, key, phase)
            if rows is not None and len(rows) == len(items) and (rows <= items).all() and (rows >= (items > 0)).all():
                return rows
            say(f"{path} is damaged or of other data: rows are counted again")
        return None

    def save(self, key: Mapping[str, Any], phase: int, rows: np.ndarray) -> Path | None:
        """Keeps the rows of each pool [pools]; returns where, None if no folder can be written."""
        counts = rows.tolist()
        content = self._identity(key, phase) | {"crc32": _crc32(counts), "rows": counts}
        for folder in self.folders:
            path = folder / self._name(key, phase)
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                replace_file(path, (json.dumps(content) + "\n").encode())
                return path
        return None

    def claim(self, key: Mapping[str, Any], phase: int) -> int | None:
        """Locks the counting of one phase against other processes; None if another one has it.

        Raises:
          OSError: no folder can be written.
        """
        error: OSError | None = None
        for folder in self.folders:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return try_lock(self._lock(folder, key, phase))
            except OSError as refused:
                error = refused
        raise error or FileNotFoundError("no folder to keep rows in")

    @contextlib.contextmanager
    def claimed(self, key: Mapping[str, Any], phase: int) -> Iterator[None]:
        """Waits until no other process counts a phase, and keeps others waiting during a `with` block."""
        lock = None
        with contextlib.suppress(OSError):  # without a folder to write to, each process counts
            seconds = _RETRY_SECONDS / 32
            while (lock := self.claim(key, phase)) is None:
                time.sleep(seconds)
                seconds = min(2 * seconds, _RETRY_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                self.release(key, phase, lock)

    def release(self, key: Mapping[str, Any], phase: int, lock: int) -> None:
        """Gives up a claim."""
        for folder in self.folders:
            path = self._lock(folder, key, phase)
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(lock), os.stat(path)):
                    path.unlink()
        os.close(lock)

    def _identity(self, key: Mapping[str, Any], phase: int) -> dict[str, Any]:
        return {"format": FORMAT, "examples": self.examples, "phase": phase, "of": dict(key)}

    def _name(self, key: Mapping[str, Any], phase: int) -> str:
        text = json.dumps(self._identity(key, 0), sort_keys=True)
        return f"rows.{hashlib.sha256(text.encode()).hexdigest()[:16]}.{phase}.json"

    def _lock(self, folder: Path, key: Mapping[str, Any], phase: int) -> Path:
        return (folder / self._name(key, phase)).with_suffix(".lock")

    def _rows_in(self, content: bytes, key: Mapping[str, Any], phase: int) -> np.ndarray | None:
        """Returns the rows that a file of this content holds; None unless it is whole and of this key."""
        try:
            found = json.loads(content)
            rows = found.pop("rows")
            whole = found.pop("crc32") == _crc32(rows) and found == json.loads(json.dumps(self._identity(key, phase)))
            return np.array(rows, np.int64) if whole else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def count(source: Pools, phase: int, pools: np.ndarray, processes: int, quiet: bool = False) -> np.ndarray:
    """Returns the rows of some pools, int64 [pools], with a display of how far that is.

    Args:
      source: whose they are.
      phase: which of the passes after which plans repeat.
      pools: their numbers [pools].
      processes: how many count; with 0 this one does.
      quiet: show nothing, let all else go first, and leave at -1 what no other process could count.
    """
    rows = np.full(len(pools), -1, np.int64)
    display = _Counting(f"rows of {source.name}", len(pools), silent=quiet or len(pools) < PARALLEL)
    with display:
        sent = _sent(source) if processes else None
        if sent is not None:
            parts = [np.arange(at, len(pools), processes) for at in range(min(processes, len(pools)))]
            jobs = [(sent, phase, part, pools[part], quiet, rows, display.more) for part in parts]
            threads = [threading.Thread(target=_listen, args=job, daemon=True) for job in jobs]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        unknown = [] if quiet else np.flatnonzero(rows < 0).tolist()
        if unknown and processes:
            display.note(f"data: rows of {source.name} are counted by this process alone")
        for place in unknown:
            rows[place] = source.count(phase, int(pools[place]))
            display.more()
    return rows


_one_at_a_time = threading.Lock()


def ahead(work: Callable[[], None]) -> None:
    """Runs `work` in the background, after what was asked for before, until this process ends."""

    def run() -> None:
        with _one_at_a_time:
            work()

    threading.Thread(target=run, name="row counts", daemon=True).start()


def say(text: str) -> None:
    """Prints a word about the data."""
    print(f"data: {text}", file=sys.stderr, flush=True)


class _Counting(Display):
    """Shows how many pools are counted."""

    def __init__(self, what: str, total: int, silent: bool) -> None:
        self._what, self._done, self._total = what, 0, total
        self._began, self._lock = time.monotonic(), threading.Lock()
        super().__init__(sys.stderr, silent=silent)

    def more(self) -> None:
        with self._lock:
            self._done += 1
        self.changed()

    def bar(self) -> Bar:
        elapsed = time.monotonic() - self._began
        left = seconds_left(elapsed, self._done, self._total)
        return Bar(f"{self._what}: pool {self._done:,}/{self._total:,}", self._done, self._total, left)


def _crc32(rows: list[int]) -> int:
    return zlib.crc32(json.dumps(rows).encode())


def _sent(source: Pools) -> bytes | None:
    """Returns a source as another process gets it; None if it cannot be sent."""
    if not sys.executable:
        return None
    try:
        return pickle.dumps(source)
    except (pickle.PicklingError, AttributeError, TypeError):  # a class inside a function
        return None


def _listen(
    sent: bytes,
    phase: int,
    places: np.ndarray,
    pools: np.ndarray,
    quiet: bool,
    rows: np.ndarray,
    more: Callable[[], None],
) -> None:
    """Has a process count pools and fills in rows[places], as far as it comes.

    Not a process of `multiprocessing`: that would run the main module again, and no worker of a loader may have one.
    """
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CHILD]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as child:
        assert child.stdin and child.stdout
        with contextlib.suppress(OSError, ValueError):
            pickle.dump((sent, phase, pools.tolist(), quiet), child.stdin)
            child.stdin.close()
            for place, line in zip(places.tolist(), child.stdout, strict=False):
                rows[place] = int(line)
                more()


def work() -> None:
    """The whole life of a process that counts: a job on standard input, the rows of a pool a line on standard output.

    It ends with the process that started it, whose end of the pipe is then closed.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    sent, phase, pools, quiet = pickle.load(sys.stdin.buffer)
    if quiet:
        os.nice(10)
    source = pickle.loads(sent)
    for pool in pools:
        print(source.count(phase, pool), file=out, flush=True)
