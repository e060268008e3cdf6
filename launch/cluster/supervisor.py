"""The processes of one attempt at a run, starting a run again after a failure (it goes on from its last complete
checkpoint), and several processes of one run on this machine."""

import contextlib
import dataclasses
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from meshway.framework.distributed.barrier import Deadlines
from meshway.framework.distributed.watch import LOST_A_PEER
from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.terminal import count_of
from meshway.launch.cluster import job

_FINAL = (0, 2, 130)  # done; a user's mistake, which another try repeats; an interruption
_PAUSE_SECONDS = 1.0  # before another try


_POLL_SECONDS = 0.05
_LAST_WORDS_SECONDS = 10.0  # for the others once one has said that a peer is lost: the alarm reached them all
_TERM_SECONDS = 3.0  # between SIGTERM and SIGKILL: joined processes take SIGTERM for a notice, and may never look
_TAIL_BYTES = 16384


@dataclasses.dataclass
class Child:
    """One process: its words, its log (None: this process's own streams), and how it ended."""

    index: int
    words: Sequence[str]
    log: Path | None = None
    aloud: bool = False  # what it prints is shown here too
    process: subprocess.Popen | None = None
    code: int | None = None
    ended_by_us: bool = False

    def outcome(self) -> str:
        """Returns how it ended, in words."""
        if self.ended_by_us:
            return f"process {self.index} did not end with the others and was killed"
        if self.code is not None and self.code < 0:
            return f"process {self.index} was killed by {signal.Signals(-self.code).name}"
        said = self.last_words()
        return f"process {self.index} exited with {self.code}" + (f" ({said})" if said else "")

    def last_words(self) -> str:
        """Returns the last line of its log that is meshway's own."""
        if self.log is None:
            return ""
        with open(self.log, "rb") as file:
            file.seek(max(os.path.getsize(self.log) - _TAIL_BYTES, 0))
            lines = file.read().decode("utf-8", "replace").split("\n")
        return next((line.removeprefix("meshway: ") for line in reversed(lines) if line.startswith("meshway: ")), "")


class Children:
    """The processes of one attempt."""

    def __init__(self, children: Sequence[Child], environment: Mapping[str, str], grace: float) -> None:
        """`grace`: seconds that the others get to end by themselves, and report why, after the first has ended."""
        self.children, self._environment, self._grace = list(children), dict(environment), grace
        self._echoes: list[threading.Thread] = []
        self.ended: list[Child] = []  # in the order in which they were found to have ended

    def start(self, title: str) -> None:
        """Starts all; `title` heads each log."""
        for child in self.children:
            streams: dict[str, Any] = {}
            environment = self._environment
            if child.log is not None:
                if child.aloud:  # a terminal does not get stacks
                    environment = environment | {"MESHWAY_STACKS": str(child.log)}
                file = open(child.log, "ab", buffering=0)  # noqa: SIM115 the child's, or its echo's, until it ends
                streams = {"stdout": subprocess.PIPE if child.aloud else file, "stderr": subprocess.STDOUT}
            child.process = subprocess.Popen(
                job.command(child.words), stdin=subprocess.PIPE, env=environment, process_group=0, **streams
            )
            if child.log is not None:
                file.write(f"--- {title}, process {child.index}: pid {child.process.pid}\n".encode())
            if child.aloud and child.log is not None:
                echo = threading.Thread(target=_echo, args=(child.process, file), daemon=True)
                echo.start()
                self._echoes.append(echo)

    def send(self, number: int) -> None:
        """Sends a signal to those that run."""
        for child in self.children:
            if child.process is not None and child.code is None:
                child.process.send_signal(number)

    def wait(self, notice: "Notice") -> None:
        """Returns once all have ended: by themselves, or ended here some time after the first."""
        deadline = None
        told = 0
        while running := self._running():
            if notice.count > told:
                told = notice.count
                self.send(signal.SIGTERM if told == 1 else signal.SIGKILL)
            if self.ended:
                lost = any(child.code == LOST_A_PEER for child in self.ended)
                end = time.monotonic() + (min(self._grace, _LAST_WORDS_SECONDS) if lost else self._grace)
                deadline = end if deadline is None else min(deadline, end)
                if time.monotonic() >= deadline:
                    self._end(running)
            time.sleep(_POLL_SECONDS)
        for echo in self._echoes:  # what was said last is in the log then
            while echo.is_alive() and notice.count < 2:
                echo.join(_POLL_SECONDS)

    def _running(self) -> list[Child]:
        """Returns those that have not ended, and notes those that have."""
        for child in self.children:
            if child.code is None and child.process is not None:
                child.code = child.process.poll()
                if child.code is not None:
                    self.ended.append(child)
        return [child for child in self.children if child.code is None]

    def _end(self, running: Sequence[Child]) -> None:
        for child in running:
            child.ended_by_us = True
        self.send(signal.SIGTERM)
        end = time.monotonic() + _TERM_SECONDS
        while self._running() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        self.send(signal.SIGKILL)


class Notice:
    """Counts SIGTERM and Ctrl-C instead of ending at them: the first lets the run save and stop, a second ends it."""

    def __init__(self) -> None:
        self.count = 0
        self.interrupted = False  # the first was Ctrl-C
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def code(self, stopped: int) -> int:
        """Returns the exit code of a run that ended well: 0; `stopped` once SIGTERM has come, 130 once Ctrl-C has."""
        if self.interrupted:
            return 128 + signal.SIGINT
        return stopped if self.count else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.interrupted |= not self.count and number == signal.SIGINT
        self.count += 1


def _echo(process: subprocess.Popen, log: IO[bytes]) -> None:
    """Copies what a process prints to its log and to standard output, as it comes, until it has ended and all is read:
    its own children may hold its output longer."""
    assert process.stdout is not None
    out = getattr(sys.stdout, "buffer", None)
    while True:
        has_ended = process.poll() is not None  # asked first: what it wrote before can be read then
        if not select.select([process.stdout], [], [], 0 if has_ended else _POLL_SECONDS)[0]:
            if has_ended:
                break
            continue
        if not (chunk := os.read(process.stdout.fileno(), 65536)):
            break
        log.write(chunk)
        with contextlib.suppress(OSError, ValueError):  # nobody listens; the run goes on, and its log is whole
            if out is not None:
                out.write(chunk)
                sys.stdout.flush()
    log.close()


def supervise(words: Sequence[str], restarts: int) -> int:
    """Runs `meshway WORDS` in one process, as one of a cluster's, and again up to `restarts` times when it fails.

    The others' supervisors do the same: a lost process ends them all, and their next attempts meet at process 0.
    SIGTERM and Ctrl-C are handed on, for the run to save and stop; a second one ends it.

    Returns:
      the exit code of the last attempt; 128 and the number for one that was killed by a signal. A run that was told to
      stop exits with 143 (130 by Ctrl-C) even if it saved: a cluster that preempts a host must not take it for done.
    """

    def attempt(number: int) -> Children:
        return Children([Child(0, words)], os.environ, grace=0.0)

    return run_attempts(attempt, restarts, model_directory(words), stopped_code=128 + signal.SIGTERM)


def run_attempts(
    attempt: Callable[[int], Children], restarts: int, model_dir: Path | None, stopped_code: int = 0
) -> int:
    """Runs attempts until one ends well, ends by a user's mistake or a signal, or none is left.

    Args:
      attempt: makes the processes of attempt 0, 1, ...
      restarts: how many may follow the first.
      model_dir: where checkpoints are, for messages; None if unknown.
      stopped_code: returned where SIGTERM made the run stop, and it did so well; 130 where Ctrl-C did.
    """
    with Notice() as notice:
        for number in range(restarts + 1):
            children = attempt(number)
            begin = time.monotonic()
            children.start(f"attempt {number + 1} of {restarts + 1}")
            children.wait(notice)
            code, cause = verdict(children)
            if code in _FINAL or notice.count:
                if code:
                    say(cause)
                return code or notice.code(stopped_code)
            say(f"attempt {number + 1} of {restarts + 1} ended after {time.monotonic() - begin:.0f} s: {cause}")
            if number < restarts:
                say(f"starting again, from {_last_checkpoint(model_dir)}; restarts left: {restarts - number - 1}")
                time.sleep(_PAUSE_SECONDS)
    return code


def verdict(children: Children) -> tuple[int, str]:
    """Returns the exit code of an attempt that has ended, and why: the first end that was not another's doing."""
    ended = children.ended
    final = [child for child in ended if child.code in _FINAL and child.code]
    own = [child for child in ended if child.code not in (0, LOST_A_PEER) and not child.ended_by_us]
    survivors = [child for child in ended if child.code == LOST_A_PEER]
    hung = [child for child in ended if child.ended_by_us]
    for first in [*final, *own, *hung, *survivors][:1]:
        causes = [first, *survivors[:1]] if first.code != LOST_A_PEER or first.ended_by_us else [first]
        code = LOST_A_PEER if first.ended_by_us else first.code or 0
        return (code if code >= 0 else 128 - code), "; ".join(cause.outcome() for cause in causes)
    return 0, ""


def model_directory(words: Sequence[str]) -> Path | None:
    """Returns the run directory that a command names; None where only its recipe does."""
    flags = ("--gin.MODEL_DIR=", "--model_dir=")
    values = [word.partition("=")[2] for word in words if word.startswith(flags)]
    return local_path(values[-1].strip("'\"")) if values else None


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(f"meshway: {text}", file=sys.stderr, flush=True)


def grace() -> float:
    """Returns the seconds within which survivors of a lost process end by themselves."""
    return Deadlines.of().survivors


def _last_checkpoint(model_dir: Path | None) -> str:
    """Says where a run goes on: only complete checkpoints have a bare number for a name."""
    if model_dir is None:
        return "the last complete checkpoint"
    steps = [int(path.name) for path in (model_dir / "checkpoints").glob("*") if path.name.isdecimal()]
    return f"step {max(steps)}" if steps else "the beginning"


_OF_CLUSTERS = ("MESHWAY_COORDINATOR_ADDRESS", "MESHWAY_NUM_PROCESSES", "MESHWAY_PROCESS_ID")


def run_local(
    words: Sequence[str],
    processes: int,
    devices: int,
    restarts: int = 0,
    elastic: bool = False,
    log_dir: str | None = None,
) -> int:
    """Runs `meshway WORDS` in several processes, which meet on a free port of 127.0.0.1.

    When one ends, the others get `Deadlines.survivors` to end by themselves and report why; then SIGTERM, then SIGKILL.
    The next attempt goes on from the last complete checkpoint. SIGTERM and Ctrl-C are handed on, for the run to save
    and stop; a second one ends it.

    Args:
      words: a verb and its flags.
      processes: how many.
      devices: CPU devices that each simulates.
      restarts: how often all may be started again. A user's mistake (exit code 2) is never tried again.
      elastic: whether each restart has fewer processes: the next number that divides `processes`, so that what divided
        by them, such as the batch, still does.
      log_dir: where each process has its log, `process_I.log`; by default `logs` in the run directory if the words name
        it, else a new folder. What process 0 prints also goes to standard output.

    Returns:
      the exit code of the last attempt: 75 if a process hung, 128 and the number of the signal that killed one.
    """
    for name, value, least in (("processes", processes, 1), ("devices", devices, 1), ("restarts", restarts, 0)):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    if elastic and not restarts:
        raise UserError("--elastic has no effect without --restarts=N: it is about those: leave it out, or give both")
    model_dir = model_directory(words)
    logs = local_path(log_dir or (model_dir / "logs" if model_dir else tempfile.mkdtemp(prefix="meshway-logs-")))
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder for logs, {logs}, cannot be made: {error.strerror or error}") from error
    say(f"{count_of(processes, 'process', plural='processes')} of {count_of(devices, 'device')}; logs in {logs}")
    own = {key: value for key, value in os.environ.items() if key not in _OF_CLUSTERS}
    environment = own | {"JAX_PLATFORMS": "cpu", "MESHWAY_CLUSTER": "none"}
    counts = process_counts(processes) if elastic else [processes]

    def attempt(number: int) -> Children:
        count = counts[min(number, len(counts) - 1)]
        if number and elastic:
            say(f"this attempt has {count} of {processes} processes")
        address = f"127.0.0.1:{_free_port()}"
        place = [f"--coordinator_address={address}", f"--num_processes={count}"] if count > 1 else []
        children = [
            Child(
                index,
                [*words, f"--simulated_devices={devices}", *place, *([f"--process_id={index}"] if place else [])],
                logs / f"process_{index}.log",
                aloud=index == 0,
            )
            for index in range(count)
        ]
        return Children(children, environment, grace())

    return run_attempts(attempt, restarts, model_dir)


def process_counts(processes: int) -> list[int]:
    """Returns what elastic attempts have: the numbers that divide `processes`, from it down to 1."""
    return [count for count in range(processes, 0, -1) if processes % count == 0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
