"""Detects the end of any process of a run, prints why, and ends this one, so that no process waits for a dead one.

jax's coordination ends a program with `abort()` as soon as process 0's socket closes, with a message about the failed
call only. A handler of SIGABRT blocks the aborting thread until the watch has printed which process is gone.
"""

import ctypes
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NoReturn, TextIO

from meshway.framework.distributed.barrier import Store, named
from meshway.framework.distributed.cluster import split_address

LOST_A_PEER = 75  # EX_TEMPFAIL: the same command, started again, resumes from the last checkpoint
_FOR_ALL = (2, 130)  # a user's mistake, or an interruption: all processes end with that exit code
_CLOSING_SECONDS = 10.0
_STORE_SECONDS = 3.0  # limit of a call, which may hang once process 0 is gone
_BLOCKED_SECONDS = 8.0
begun = threading.Event()  # set when a thread is in abort()
explained = threading.Event()  # set when that thread may continue


class Watch:
    """Three small threads: one writes this process's heartbeat and reads the others', one waits for an alarm, and one
    checks deadlines, also while the network hangs.

    Process 0 watches all and raises the alarm; the others watch process 0, which holds it.
    """

    def __init__(
        self,
        store: Store,
        process_id: int,
        num_processes: int,
        coordinator: str | None,
        deadline: float,
        leave: Callable[[int], None] = os._exit,
        log: TextIO | None = None,
    ) -> None:
        """`deadline`: seconds without a heartbeat until a process is missing. `coordinator`: host:port, if known."""
        self._store, self._process_id, self._num_processes = store, process_id, num_processes
        self._coordinator, self._deadline = coordinator, deadline
        self._leave, self._log = leave, log
        self._period = min(deadline / 10, 3.0)
        self.alarms = Alarms(store, process_id, num_processes)
        peers = range(1, num_processes) if process_id == 0 else [0]
        self._heartbeats = Heartbeats(peers, deadline, time.monotonic())
        self._lock, self._ending = threading.Lock(), threading.Lock()
        self._stopped, self._step, self._trouble = threading.Event(), 0, ""
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads."""
        for work in (self._beat, self._listen, self._check):
            self._threads.append(threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends the watch: no process counts as missing from now on."""
        self._stopped.set()

    def close(self) -> None:
        """Ends the watch of a run without an error, once all processes have reached its end, and joins the threads:
        native code that is interrupted at Python's exit aborts the program."""
        self.stop()
        if self._process_id == 0:
            self.alarms.silence()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def at_step(self, step: int) -> None:
        """Notes the last step that this process has finished, to be sent with the heartbeat."""
        self._step = step

    def steps(self) -> dict[int, int]:
        """Returns the last finished step of each process, from its heartbeat."""
        beats = self._store.list("beat")
        return {int(process): int(beat.partition(" ")[2]) for process, beat in sorted(beats.items())}

    def silent(self) -> set[int]:
        """Waits for a new heartbeat of each process; returns those that send none in one and a half deadlines.

        If one is missing, the watch usually ends this process before that.
        """
        before: dict[str, str] = {}
        quiet, end = {self._process_id}, time.monotonic() + 1.5 * self._deadline
        while quiet and time.monotonic() < end:
            try:
                beats = self._store.list("beat")
            except Exception:  # process 0 is gone: the thread that checks deadlines will report it
                beats = {}
            before = before or beats
            quiet = {int(each) for each, beat in before.items() if beats.get(each, beat) == beat} if before else {0}
            time.sleep(self._period / 2)
        return quiet

    def end(self, code: int, message: str, stacks: bool) -> NoReturn:
        """Prints why this process ends, with `stacks` also those of all threads, and ends it at once."""
        self._ending.acquire()  # never released: only the first reason is printed
        self._explain(message, stacks)
        self._leave(code)
        raise SystemExit(code)

    def _beat(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            try:
                self._store.set(f"beat/{self._process_id}", f"{count} {self._step}")
                beats = self._store.list("beat") if self._process_id == 0 else {"0": self._store.get("beat/0") or ""}
            except Exception as error:
                self._trouble = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            else:
                with self._lock:
                    self._heartbeats.hear({int(each): beat for each, beat in beats.items()}, time.monotonic())
            self._stopped.wait(self._period)

    def _listen(self) -> None:
        while not self._stopped.is_set():
            try:
                alarm = self.alarms.hear(60.0)
            except Exception:  # process 0 is gone: the thread that checks deadlines will report it
                self._stopped.wait(self._period)
                continue
            if alarm is None:
                continue
            if self._stopped.is_set() or alarm.code == 0:
                return
            if alarm.process_id == self._process_id:
                return  # the thread that raised it ends this process
            self.alarms.acknowledge(absent=self._missing())
            wanted = alarm.code in _FOR_ALL
            message = f"process {alarm.process_id}: {alarm.message}"
            self.end(alarm.code if wanted else LOST_A_PEER, message, stacks=not wanted)

    def _check(self) -> None:
        while not self._stopped.is_set():
            if begun.wait(min(self._period, 0.5)):
                self._explain_abort()
                return
            missing = self._missing()
            if not missing or self._stopped.is_set():
                continue
            silent = f"not heard of for {min(missing.values()):.0f} s"
            if self._process_id:
                trouble = f" ({self._trouble})" if self._trouble else ""
                self._end_all(f"process 0, at {self._coordinator}, {silent}{trouble}; it or the network to it is down")
            self._end_all(f"{named(missing, self._num_processes)} {silent}: killed, stopped or cut off", missing)

    def _missing(self) -> dict[int, float]:
        with self._lock:
            return self._heartbeats.missing(time.monotonic())

    def _end_all(self, message: str, missing: dict[int, float] | None = None) -> NoReturn:
        if self._process_id == 0:
            self.alarms.sound(LOST_A_PEER, message, absent=missing or {})
        self.end(LOST_A_PEER, message, stacks=True)

    def _explain_abort(self) -> None:
        """Called when native code aborts this process: jax's, if process 0's socket has closed, or other code."""
        if self._process_id and self._coordinator and (why := _unreachable(self._coordinator)):
            self._end_all(f"process 0, at {self._coordinator}, is gone ({why}); it ended, or this process is cut off")
        message = "aborted in native code; its own message is above"
        self.alarms.sound(1, message)
        self._explain(message, stacks=True)
        explained.set()

    def _explain(self, message: str, stacks: bool) -> None:
        line = f"meshway: process {self._process_id} of {self._num_processes} stops: {message}"
        print(line, file=self._log or sys.stderr, flush=True)
        if stacks:
            dump_stacks(self._log)


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Why the run ends, from the process that noticed first; `code` is its exit code, 0 for a run without an error."""

    process_id: int
    code: int
    message: str


class Alarms:
    """The one alarm of a run, and which processes have received it."""

    def __init__(self, store: Store, process_id: int, num_processes: int) -> None:
        self._store, self._process_id, self._num_processes = store, process_id, num_processes

    def sound(self, code: int, message: str, absent: Collection[int] = ()) -> None:
        """Tells all processes; they receive only the first alarm of a run.

        Process 0 holds the store, so it waits a few seconds for all but the `absent` to receive it.
        """
        alarm = Alarm(self._process_id, code, message)
        _within_limit(lambda: self._store.claim("alarm", json.dumps(dataclasses.asdict(alarm))))
        self.acknowledge(absent)

    def silence(self) -> None:
        """Ends all processes' waiting for an alarm: the run has ended without an error."""
        self._store.claim("alarm", json.dumps(dataclasses.asdict(Alarm(self._process_id, 0, ""))))

    def hear(self, seconds: float) -> Alarm | None:
        """Waits for the alarm; returns None if there is none in time."""
        text = self._store.wait("alarm", seconds)
        return None if text is None else Alarm(**json.loads(text))

    def acknowledge(self, absent: Collection[int] = ()) -> None:
        """Notes for process 0 that this process has received the alarm; process 0 itself waits for the others."""
        _within_limit(lambda: self._store.set(f"heard/{self._process_id}", ""))
        if self._process_id == 0:
            _within_limit(lambda: self._await_others(absent))

    def _await_others(self, absent: Collection[int]) -> None:
        end = time.monotonic() + _STORE_SECONDS
        while time.monotonic() < end:
            gone = self._store.list("heard").keys() | {str(each) for each in absent}
            if len(gone) >= self._num_processes:
                return
            time.sleep(0.05)


class Heartbeats:
    """When each peer's heartbeat last changed, by this process's own clock: clocks of two machines are never
    compared."""

    def __init__(self, peers: Iterable[int], deadline: float, now: float) -> None:
        """`deadline` is in seconds without a heartbeat; `now` is this process's clock, as everywhere below."""
        self._deadline = deadline
        self._heard = {peer: (now, "") for peer in peers}
        self._checked = now

    def hear(self, beats: Mapping[int, str], now: float) -> None:
        """Takes the peers' latest heartbeats; only one that has changed counts."""
        for peer, (_, before) in self._heard.items():
            beat = beats.get(peer, before)
            if beat != before:
                self._heard[peer] = (now, beat)

    def missing(self, now: float) -> dict[int, float]:
        """Returns the peers without a heartbeat within the deadline, and for how many seconds; call it often.

        Time in which this process itself was stopped (a laptop asleep, a job suspended) does not count.
        """
        away = now - self._checked
        if away > self._deadline / 2:
            self._heard = {peer: (heard + away, beat) for peer, (heard, beat) in self._heard.items()}
        self._checked = now
        return {peer: now - heard for peer, (heard, _) in self._heard.items() if now - heard > self._deadline}


def dump_stacks(log: TextIO | None = None) -> None:
    """Writes the Python stacks of all threads to `log`, by default standard error.

    If MESHWAY_STACKS names a file, as where standard error is a terminal, they are appended to it instead.
    """
    path = os.environ.get("MESHWAY_STACKS")
    if log is None and path:
        with open(path, "a") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        print(f"the stacks of all threads are in {path}", file=sys.stderr, flush=True)
        return
    log = sys.stderr if log is None else log
    log.flush()
    faulthandler.dump_traceback(file=log, all_threads=True)


def install() -> None:
    """Blocks aborting threads from now on. Python's own handlers cannot: they run only once abort() has returned."""
    if os.name == "posix":
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


def uninstall() -> None:
    """Restores the default handler: at Python's exit no thread can run ours."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(number: int) -> None:
    begun.set()
    explained.wait(_BLOCKED_SECONDS)


def _within_limit(work: Callable[[], object]) -> None:
    """Calls `work`, which may fail or hang once process 0 is gone: ignores errors, and waits `_STORE_SECONDS` at
    most."""

    def attempt() -> None:
        try:
            work()
        except Exception:
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)


def _unreachable(address: str) -> str:
    """Returns why the coordination service, which sends a greeting at once, does not answer there; "" if it does."""
    try:
        with socket.create_connection(split_address(address), timeout=2.0) as connection:
            return "" if connection.recv(1) else "the connection is closed at once"
    except OSError as error:
        return error.strerror or str(error)
