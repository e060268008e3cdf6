"""The processes of a run: joining them, comparing what must be the same in all, ending together, and noticing a step
that takes far longer than those before it."""

import collections
import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from meshway.framework import terminal
from meshway.framework.distributed import rendezvous
from meshway.framework.distributed import watch as watch_lib
from meshway.framework.distributed.barrier import CoordinationStore, Deadlines, named, place
from meshway.framework.distributed.barrier import barrier as wait_at_barrier
from meshway.framework.distributed.cluster import Cluster, ProcessArguments, recognise, split_address
from meshway.framework.distributed.watch import LOST_A_PEER, Watch, dump_stacks
from meshway.framework.errors import EnvironmentFailure, UserError, report
from meshway.framework.terminal import installed_version

_watch: Watch | None = None
_python_handler: list[object] = []  # of SIGTERM, at the time that jax installed its own


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    simulated_devices: int | None = None,
) -> Iterator[None]:
    """Joins the processes of a run for a `with` block; enter it before anything else uses a device.

    Arguments that are None are taken from the environment (`cluster.recognise`); in a run of one process this does
    nothing. With several, each watches the others inside the block. At its end all wait for each other. If it raises,
    the error is reported here, the others are told, and the program ends with the error's exit code: Python's own exit
    would wait for them.

    Args:
      coordinator_address: host:port of process 0.
      num_processes, process_id: the number of processes, and this process's number.
      simulated_devices: number of CPU devices to simulate in this process.

    Raises:
      UserError: the numbers are incomplete, out of range, or contradict those of the other processes.
      EnvironmentFailure: not all processes connected within `Deadlines.start`.
    """
    if simulated_devices is not None:
        if simulated_devices < 1:
            raise UserError(f"--simulated_devices={simulated_devices} must be at least 1")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    cluster = recognise(os.environ, ProcessArguments(coordinator_address, num_processes, process_id))
    if cluster is not None:
        with terminal.stage("joining the other processes of the run"):
            _join(cluster, Deadlines.of())
        if not is_primary():
            terminal.silence()
    if _watch is None:
        yield
        return
    try:
        yield
        _finish(_watch)
    except BaseException as error:
        _leave(_watch, error)


def is_primary() -> bool:
    """Whether this process writes the files and prints the messages of the run."""
    return jax.process_index() == 0


def watch() -> Watch | None:
    """Returns the watch of the other processes; None in a run of one."""
    return _watch


def barrier(
    name: str, seconds: float | None, value: str = "", waiting: Callable[[], None] = lambda: None
) -> dict[int, str]:
    """Waits until every process has reached `name`; see `barrier.barrier`. A run of one does not wait."""
    if jax.process_count() == 1:
        return {0: value}
    return wait_at_barrier(CoordinationStore(), jax.process_index(), jax.process_count(), name, seconds, value, waiting)


def agree(facts: Mapping[str, str]) -> None:
    """Compares `facts` (name -> text) with those of the other processes.

    Raises:
      UserError: one differs, the same message in every process; names the processes in the minority.
      EnvironmentFailure: a process did not reach this within `Deadlines.agreement`.
    """
    values = barrier("the comparison of recipes", Deadlines.of().agreement, json.dumps(shortened(facts)))
    if found := differences({process: json.loads(text) for process, text in values.items()}):
        raise UserError(f"the processes of this run do not agree: {found}. Start all with the same command and files")


def shortened(facts: Mapping[str, str]) -> dict[str, str]:
    """Returns `facts` with long texts replaced by their hashes."""
    return {
        name: text if len(text) <= 40 else hashlib.sha256(text.encode()).hexdigest()[:12]
        for name, text in facts.items()
    }


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """Returns which facts differ between processes, and in which; "" if none does."""
    found = []
    for name in sorted({name for each in facts.values() for name in each}):
        groups = collections.defaultdict(list)
        for process, each in sorted(facts.items()):
            groups[each.get(name, "none")].append(process)
        if len(groups) == 1:
            continue
        usual = max(groups, key=lambda value: len(groups[value]))  # of equally frequent ones that of process 0
        others = [f"{named(who, len(facts))}: {value!r}" for value, who in groups.items() if value != usual]
        found.append(f"{name}: {'; '.join(others)}; {named(groups[usual], len(facts))}: {usual!r}")
    return ". ".join(found)


def note_handler() -> None:
    """Stores Python's handler of SIGTERM; call when jax's preemption service takes over the signal."""
    _python_handler[:] = [signal.getsignal(signal.SIGTERM)]


class StopSignal:
    """Turns SIGTERM (and Ctrl-C) into a flag to be checked after every step: `requested(step)`.

    In one process the first signal sets the flag and a second one ends the program at once. With several, jax's
    preemption service chooses one step for all of them; a Python handler would silently disable it.

    Attributes:
      number: the signal received by the handler of a run of one process, if any.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        elif _python_handler and signal.getsignal(signal.SIGTERM) is not _python_handler[0]:
            sys.stderr.write("meshway: a SIGTERM handler was set after the processes joined: no save at SIGTERM\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; the same answer on every process."""
        if jax.process_count() == 1:
            return self.number is not None
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.number is not None:
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: saving after this step, then stopping; once more stops at once\n")
        sys.stderr.flush()


def _join(cluster: Cluster, deadlines: Deadlines) -> None:
    global _watch
    if cluster.kind != "flags":
        print(f"meshway: {cluster}", file=sys.stderr, flush=True)
    arguments: dict[str, Any] = {"cluster_detection_method": cluster.detection}
    if cluster.detection is None:
        assert cluster.coordinator and cluster.num_processes is not None and cluster.process_id is not None
        info = rendezvous.ProcessInfo(
            cluster.process_id, cluster.num_processes, socket.gethostname(), installed_version()
        )
        rendezvous.meet(cluster.coordinator, info, deadlines.start)
        host, port = split_address(cluster.coordinator)
        loopback = host in ("localhost", "127.0.0.1")
        arguments = {
            "coordinator_address": cluster.coordinator,
            "coordinator_bind_address": f"127.0.0.1:{port}" if loopback else None,
            "num_processes": cluster.num_processes,
            "process_id": cluster.process_id,
            "local_device_ids": cluster.local_device,
            "cluster_detection_method": "deactivate",
        }
    _limit_collectives(deadlines.hang)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=round(deadlines.start) + 1,
            heartbeat_timeout_seconds=round(3 * deadlines.heartbeat) + 1,  # later than the watch
            shutdown_timeout_seconds=round(deadlines.heartbeat) + 1,
        )
    except Exception as error:
        raise EnvironmentFailure(f"{cluster}: the processes could not be joined: {error}") from error
    process_id, num_processes = place()
    if num_processes == 1:
        return
    note_handler()
    faulthandler.enable()
    watch_lib.install()
    _watch = Watch(CoordinationStore(), process_id, num_processes, cluster.coordinator, deadlines.heartbeat)
    _watch.start()


def _limit_collectives(seconds: float) -> None:
    """Sets a timeout for collectives between CPUs, which otherwise wait forever for a process that hangs."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_collective_timeout_seconds" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_collective_timeout_seconds={round(seconds)}".strip()


def _finish(watch: Watch) -> None:
    """Ends a run without an error: waits for all processes, then disconnects."""
    global _watch
    barrier("the end of the run", None)
    watch.close()
    _watch = None
    watch_lib.uninstall()
    jax.distributed.shutdown()


def _leave(watch: Watch, error: BaseException) -> NoReturn:
    """Ends this process and tells the others why."""
    if isinstance(error, SystemExit):
        code, message = error.code if isinstance(error.code, int) else int(error.code is not None), "it exited"
    elif _is_own(error):
        code, message = report(error), str(error) or "interrupted"
    else:
        # The end of another process causes errors of all kinds; if one is missing, the watch ends this process.
        message = f"{type(error).__name__}: {str(error).strip()}"
        silent = watch.silent()
        code = report(error)
        if silent:
            code, message = LOST_A_PEER, f"no heartbeat of {named(silent, jax.process_count())}; {message}"
    if code:
        watch.alarms.sound(code, message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_own(error: BaseException) -> bool:
    """Whether an error certainly comes from this process alone: errors after failed collectives and saves have a
    cause."""
    if isinstance(error, KeyboardInterrupt):
        return True
    return isinstance(error, (UserError, EnvironmentFailure)) and not (error.__cause__ or error.__context__)


_WARM_UP_STEPS = 2
_MIN_STEPS = 5  # measured before any can be late
_CHECK_SECONDS = 1.0


class StepWatch:
    """A context manager that prints a warning when a step takes `times` the median of those before it, the first time
    with the stacks of all threads.

    Evaluations, checkpoints and the first steps do not count. In a run of several processes, a step that takes longer
    than `Deadlines.hang` ends all of them: a process that hangs still sends heartbeats.
    """

    def __init__(
        self,
        times: float = 10.0,
        least: float = 10.0,
        hang: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`least` and `hang` in seconds: shorter steps are never late; None means `Deadlines.hang`."""
        self._times, self._least, self._clock = times, least, clock
        self._hang = Deadlines.of().hang if hang is None else hang
        self._durations: collections.deque[float] = collections.deque(maxlen=100)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._began: float | None = None  # of the current step, later by its pauses; None while there is none
        self._step, self._seen, self._warned_of = 0, 0, -1
        self._showed_stacks = False

    def __enter__(self) -> "StepWatch":
        threading.Thread(target=self._run, name="step watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def finished(self, step: int) -> None:
        """Call after every step, and after its evaluation and saving."""
        now = self._clock()
        with self._lock:
            if self._began is not None and self._seen >= _WARM_UP_STEPS:
                self._durations.append(now - self._began)
            self._began, self._step, self._seen = now, step, self._seen + 1
        if others := watch():
            others.at_step(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time inside for the current step."""
        with self._lock:
            spent = None if self._began is None else self._clock() - self._began
            self._began = None
        try:
            yield
        finally:
            with self._lock:
                self._began = None if spent is None else self._clock() - spent

    def late(self) -> tuple[float, float] | None:
        """Returns (seconds of the current step, the median) if it is late, once for each step."""
        with self._lock:
            if self._began is None or len(self._durations) < _MIN_STEPS or self._warned_of == self._step:
                return None
            seconds, median = self._clock() - self._began, statistics.median(self._durations)
            if seconds < max(self._times * median, self._least):
                return None
            self._warned_of = self._step
            return seconds, median

    def hangs(self) -> float | None:
        """Returns the seconds of the current step if they exceed the limit, else None."""
        with self._lock:
            seconds = 0.0 if self._began is None else self._clock() - self._began
        return seconds if seconds > self._hang else None

    def _run(self) -> None:
        while not self._ended.wait(_CHECK_SECONDS):
            if found := self.late():
                self._print("step {} has taken {:.0f} s so far, the median is {:.2g} s".format(self._step + 1, *found))
                if not self._showed_stacks:
                    self._showed_stacks = True
                    dump_stacks()
            if (others := watch()) and (seconds := self.hangs()):
                message = f"step {self._step + 1} has not ended in {seconds:.0f} s{_steps()}"
                others.alarms.sound(LOST_A_PEER, message)
                others.end(LOST_A_PEER, message, stacks=True)

    def _print(self, text: str) -> None:
        print(f"meshway: {text}{_steps()}", file=sys.stderr, flush=True)


def _steps() -> str:
    """Returns the last step of each process: one that hangs is behind."""
    others = watch()
    if others is None:
        return ""
    try:
        return "; last steps by process: " + ", ".join(f"{each}: {step}" for each, step in others.steps().items())
    except Exception:  # the store is gone: the watch reports it
        return ""
