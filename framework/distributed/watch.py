"""Notices the end of any process of a run, says why, and ends this one: nobody waits for the dead.

jax's coordination ends a program with `abort()` as soon as process 0's socket closes, saying which call failed. A
handler of SIGABRT parks the thread that aborts until the watch has said who is gone, and then lets it go on.
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

from meshway.framework.distributed.barrier import named
from meshway.framework.distributed.cluster import split_address
from meshway.framework.distributed.store import Store


def dump_stacks(log: TextIO | None = None) -> None:
    """Writes the Python stacks of all threads to `log`, by default standard error.

    MESHWAY_STACKS names a file for them instead, where standard error is a person's terminal.
    """
    path = os.environ.get("MESHWAY_STACKS")
    if log is None and path:
        with open(path, "a") as file:
            faulthandler.dump_traceback(file=file, all_threads=True)
        print(f"meshway: the stacks of all threads are in {path}", file=sys.stderr, flush=True)
        return
    log = sys.stderr if log is None else log
    log.flush()
    faulthandler.dump_traceback(file=log, all_threads=True)


begun = threading.Event()  # some thread is in abort()
explained = threading.Event()  # it may go on
_PARKED_SECONDS = 8.0


def install() -> None:
    """Parks aborting threads from now on. Python's own handlers cannot: they run only once abort() has returned."""
    if os.name == "posix":
        ctypes.CDLL(None).signal(int(signal.SIGABRT), _handler)


def uninstall() -> None:
    """Lets aborts be as they are: at Python's end no thread can run the handler."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(number: int) -> None:
    begun.set()
    explained.wait(_PARKED_SECONDS)


class Heartbeats:
    """When each peer was last heard of, by this process's own clock: clocks of two machines are never compared."""

    def __init__(self, peers: Iterable[int], deadline: float, now: float) -> None:
        """`deadline` in seconds of silence; `now` is this process's clock, as everywhere below."""
        self._deadline = deadline
        self._heard = {peer: (now, "") for peer in peers}
        self._looked = now

    def hear(self, beats: Mapping[int, str], now: float) -> None:
        """Takes what the peers last wrote; only what has changed is a sign of life."""
        for peer, (_, before) in self._heard.items():
            beat = beats.get(peer, before)
            if beat != before:
                self._heard[peer] = (now, beat)

    def missing(self, now: float) -> dict[int, float]:
        """Returns the silent ones and for how many seconds; call it often.

        Where this process itself was stopped meanwhile (a laptop asleep, a job suspended), nobody is blamed for it.
        """
        away = now - self._looked
        if away > self._deadline / 2:
            self._heard = {peer: (heard + away, beat) for peer, (heard, beat) in self._heard.items()}
        self._looked = now
        return {peer: now - heard for peer, (heard, _) in self._heard.items() if now - heard > self._deadline}


_TELLING_SECONDS = 3.0  # a store that is gone may hang a call


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Why the run ends, as the first that noticed put it; `code` is that process's exit code, 0 of a run that
    ends well."""

    process_id: int
    code: int
    message: str


class Alarms:
    """The one alarm of a run, and who has heard it."""

    def __init__(self, store: Store, process_id: int, num_processes: int) -> None:
        self._store, self._process_id, self._num_processes = store, process_id, num_processes

    def sound(self, code: int, message: str, absent: Collection[int] = ()) -> None:
        """Tells all processes; the first alarm of a run is the one they hear.

        Process 0 holds the store, so it stays until all but the `absent` have heard, or a few seconds.
        """
        alarm = Alarm(self._process_id, code, message)
        _briefly(lambda: self._store.claim("alarm", json.dumps(dataclasses.asdict(alarm))))
        self.acknowledge(absent)

    def silence(self) -> None:
        """Ends everybody's waiting for an alarm: the run has ended well."""
        self._store.claim("alarm", json.dumps(dataclasses.asdict(Alarm(self._process_id, 0, ""))))

    def hear(self, seconds: float) -> Alarm | None:
        """Waits for the alarm, so many seconds at most."""
        said = self._store.wait("alarm", seconds)
        return None if said is None else Alarm(**json.loads(said))

    def acknowledge(self, absent: Collection[int] = ()) -> None:
        """Lets process 0 know that this one has heard; process 0 itself waits for the others."""
        _briefly(lambda: self._store.set(f"heard/{self._process_id}", ""))
        if self._process_id == 0:
            _briefly(lambda: self._linger(absent))

    def _linger(self, absent: Collection[int]) -> None:
        end = time.monotonic() + _TELLING_SECONDS
        while time.monotonic() < end:
            gone = self._store.list("heard").keys() | {str(each) for each in absent}
            if len(gone) >= self._num_processes:
                return
            time.sleep(0.05)


def _briefly(work: Callable[[], object]) -> None:
    """Runs what may fail or hang once process 0 is gone; then there is nobody to tell."""

    def attempt() -> None:
        try:
            work()
        except Exception:
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_TELLING_SECONDS)


LOST_A_PEER = 75  # EX_TEMPFAIL: the same command, started again, goes on from the last checkpoint
_CLOSING_SECONDS = 10.0
_FOR_ALL = (2, 130)  # a user's mistake, or an interruption: all processes end with that exit code


class Watch:
    """Three small threads: one writes this process's heartbeat and reads the others', one waits for an alarm, and one
    looks at the clock, which goes on where the network hangs.

    Process 0 watches all and raises the alarm; the others watch process 0, where the alarm would be.
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
        """`deadline`: seconds of silence after which a process is missing. `coordinator`: host:port, if known."""
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
        """Begins to watch."""
        for work in (self._beat, self._listen, self._look):
            self._threads.append(threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends the watch: from here on nobody is missed."""
        self._stopped.set()

    def close(self) -> None:
        """Ends the watch of a run that went well, once all processes have come so far, and its threads: native code
        that is cut short at Python's end aborts the program."""
        self.stop()
        if self._process_id == 0:
            self.alarms.silence()
        for thread in self._threads:
            thread.join(_CLOSING_SECONDS)

    def at_step(self, step: int) -> None:
        """Notes the last step that this process has finished; it goes out with the heartbeat."""
        self._step = step

    def steps(self) -> dict[int, int]:
        """Returns the last step that each process has said to have finished."""
        beats = self._store.list("beat")
        return {int(process): int(beat.partition(" ")[2]) for process, beat in sorted(beats.items())}

    def silent(self) -> set[int]:
        """Waits until each process gives a new sign of life; returns those that do not in one and a half deadlines.

        Where one is missing, the watch ends this process before that.
        """
        before: dict[str, str] = {}
        quiet, end = {self._process_id}, time.monotonic() + 1.5 * self._deadline
        while quiet and time.monotonic() < end:
            try:
                beats = self._store.list("beat")
            except Exception:  # process 0 is gone, and the thread that looks at the clock is about to say so
                beats = {}
            before = before or beats
            quiet = {int(each) for each, beat in before.items() if beats.get(each, beat) == beat} if before else {0}
            time.sleep(self._period / 2)
        return quiet

    def end(self, code: int, message: str, stacks: bool) -> NoReturn:
        """Says why this process ends, shows what every thread was at, and ends it without waiting for anything."""
        self._ending.acquire()  # for good: the first reason is the one that is said
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
            except Exception:  # process 0 is gone: the thread that looks at the clock says so
                self._stopped.wait(self._period)
                continue
            if alarm is None:
                continue
            if self._stopped.is_set() or alarm.code == 0:
                return
            if alarm.process_id == self._process_id:
                return  # this process ends in its own time
            self.alarms.acknowledge(absent=self._missing())
            wanted = alarm.code in _FOR_ALL
            said = f"process {alarm.process_id}: {alarm.message}"
            self.end(alarm.code if wanted else LOST_A_PEER, said, stacks=not wanted)

    def _look(self) -> None:
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
                self._lose(f"process 0, at {self._coordinator}, {silent}{trouble}; it or the way to it is down")
            self._lose(f"{named(missing, self._num_processes)} {silent}: killed, stopped or cut off", missing)

    def _missing(self) -> dict[int, float]:
        with self._lock:
            return self._heartbeats.missing(time.monotonic())

    def _lose(self, message: str, missing: dict[int, float] | None = None) -> NoReturn:
        if self._process_id == 0:
            self.alarms.sound(LOST_A_PEER, message, absent=missing or {})
        self.end(LOST_A_PEER, message, stacks=True)

    def _explain_abort(self) -> None:
        """Native code is about to end this process: jax's, if process 0's socket has closed, or some other."""
        if self._process_id and self._coordinator and (why := _unreachable(self._coordinator)):
            self._lose(f"process 0, at {self._coordinator}, is gone ({why}); it ended, or this process is cut off")
        message = "aborted in native code; its own message is above"
        self.alarms.sound(1, message)
        self._explain(message, stacks=True)
        explained.set()

    def _explain(self, message: str, stacks: bool) -> None:
        said = f"meshway: process {self._process_id} of {self._num_processes} stops: {message}"
        print(said, file=self._log or sys.stderr, flush=True)
        if stacks:
            dump_stacks(self._log)


def _unreachable(address: str) -> str:
    """Returns why nothing greets a connection there, as the coordination service does at once; "" when it does."""
    try:
        with socket.create_connection(split_address(address), timeout=2.0) as connection:
            return "" if connection.recv(1) else "the connection is closed at once"
    except OSError as error:
        return error.strerror or str(error)
