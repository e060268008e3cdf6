"""Notices the end of any process of a run, says why, and ends this one: nobody waits for the dead."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TextIO

from meshway.framework.distributed import abort
from meshway.framework.distributed.alarms import Alarms
from meshway.framework.distributed.barrier import named
from meshway.framework.distributed.cluster import split_address
from meshway.framework.distributed.heartbeats import Heartbeats
from meshway.framework.distributed.stacks import dump_stacks
from meshway.framework.distributed.store import Store

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
            if abort.begun.wait(min(self._period, 0.5)):
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
        abort.explained.set()

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
