"""The processes of a run: joining them, which one speaks, and leaving together, however a run ends."""

import contextlib
import faulthandler
import os
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from meshway.framework import stages
from meshway.framework.distributed import abort, rendezvous
from meshway.framework.distributed.barrier import barrier as wait_at_barrier
from meshway.framework.distributed.barrier import named
from meshway.framework.distributed.cluster import Cluster, Given, recognise, split_address
from meshway.framework.distributed.deadlines import Deadlines
from meshway.framework.distributed.stop_signal import note_handler
from meshway.framework.distributed.store import CoordinationStore, place
from meshway.framework.distributed.watch import LOST_A_PEER, Watch
from meshway.framework.errors import EnvironmentFailure, UserError, report
from meshway.framework.version import installed_version

_watch: Watch | None = None


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    simulated_devices: int | None = None,
) -> Iterator[None]:
    """Joins the processes of a run for the time of a `with` block; enter before anything else touches a device.

    What is not given is taken from the environment (`cluster.recognise`); a run of one process does nothing here.
    With several, each watches the others from here on. When the block ends well, all wait for each other. When it
    raises, the error is reported here, the others are told, and the program ends with the error's exit code: Python's
    own end would wait for them.

    Args:
      coordinator_address: host:port of process 0.
      num_processes, process_id: how many there are, and which this one is.
      simulated_devices: number of CPU devices to simulate in this process.

    Raises:
      UserError: the numbers are incomplete, out of range, or not those of the other processes.
      EnvironmentFailure: not all processes came within `Deadlines.start`.
    """
    if simulated_devices is not None:
        if simulated_devices < 1:
            raise UserError(f"--simulated_devices={simulated_devices} must be at least 1")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    cluster = recognise(os.environ, Given(coordinator_address, num_processes, process_id))
    if cluster is not None:
        with stages.stage("joining the other processes of the run"):
            _join(cluster, Deadlines.of())
        if not is_primary():
            stages.silence()
    if _watch is None:
        yield
        return
    try:
        yield
        _finish(_watch)
    except BaseException as error:
        _leave(_watch, error)


def is_primary() -> bool:
    """Whether this process writes files and speaks for the run."""
    return jax.process_index() == 0


def watch() -> Watch | None:
    """Returns what watches the other processes; None in a run of one."""
    return _watch


def barrier(
    name: str, seconds: float | None, value: str = "", waiting: Callable[[], None] = lambda: None
) -> dict[int, str]:
    """Waits until every process has come to `name`; see `barrier.barrier`. A run of one does not wait."""
    if jax.process_count() == 1:
        return {0: value}
    return wait_at_barrier(CoordinationStore(), jax.process_index(), jax.process_count(), name, seconds, value, waiting)


def _join(cluster: Cluster, deadlines: Deadlines) -> None:
    global _watch
    if cluster.kind != "flags":
        print(f"meshway: {cluster}", file=sys.stderr, flush=True)
    arguments: dict[str, Any] = {"cluster_detection_method": cluster.detection}
    if cluster.detection is None:
        assert cluster.coordinator and cluster.num_processes is not None and cluster.process_id is not None
        card = rendezvous.Card(cluster.process_id, cluster.num_processes, socket.gethostname(), installed_version())
        rendezvous.meet(cluster.coordinator, card, deadlines.start)
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
            heartbeat_timeout_seconds=round(3 * deadlines.heartbeat) + 1,  # the watch speaks first
            shutdown_timeout_seconds=round(deadlines.heartbeat) + 1,
        )
    except Exception as error:
        raise EnvironmentFailure(f"{cluster}: the processes could not be joined: {error}") from error
    process_id, num_processes = place()
    if num_processes == 1:
        return
    note_handler()
    faulthandler.enable()
    abort.install()
    _watch = Watch(CoordinationStore(), process_id, num_processes, cluster.coordinator, deadlines.heartbeat)
    _watch.start()


def _limit_collectives(seconds: float) -> None:
    """Between CPUs a collective waits for ever for a process that hangs, unless it is told not to."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_collective_timeout_seconds" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_collective_timeout_seconds={round(seconds)}".strip()


def _finish(watch: Watch) -> None:
    """Ends a run that went well: nobody leaves before all have come so far."""
    global _watch
    barrier("the end of the run", None)
    watch.close()
    _watch = None
    abort.uninstall()
    jax.distributed.shutdown()


def _leave(watch: Watch, error: BaseException) -> NoReturn:
    """Ends this process and tells the others why."""
    if isinstance(error, SystemExit):
        code, message = error.code if isinstance(error.code, int) else int(error.code is not None), "it left"
    elif _is_own(error):
        code, message = report(error), str(error) or "interrupted"
    else:
        # A peer's end shows up as errors of all kinds; if one is missing, the watch says so, and ends this process.
        message = f"{type(error).__name__}: {str(error).strip()}"
        silent = watch.silent()
        code = report(error)
        if silent:
            code, message = LOST_A_PEER, f"{named(silent, jax.process_count())} silent; {message}"
    if code:
        watch.alarms.sound(code, message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_own(error: BaseException) -> bool:
    """Whether an error surely comes from this process alone: what failed collectives and saves cause has a cause."""
    if isinstance(error, KeyboardInterrupt):
        return True
    return isinstance(error, (UserError, EnvironmentFailure)) and not (error.__cause__ or error.__context__)
