"""Processes of a run: start-up, which one speaks, and stopping all at the same step."""

import os
import signal
import sys
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from meshway.framework.errors import UserError

HEARTBEAT_SECONDS = 30  # jax's 100 leaves the survivors of a dead process waiting a minute and a half
SHUTDOWN_SECONDS = 30  # jax's 300 holds a failing process at the exit barrier for five minutes


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    simulated_devices: int | None = None,
) -> None:
    """Joins the processes of a run; call before anything else touches a device.

    Args:
      coordinator_address: host:port of process 0.
      num_processes, process_id: how many there are, and which this one is; all three or none must be given.
      simulated_devices: number of CPU devices to simulate in this process.

    Raises:
      UserError: only some of the three are given, or a number is out of range.
    """
    if simulated_devices is not None:
        if simulated_devices < 1:
            raise UserError(f"--simulated_devices={simulated_devices} must be at least 1")
        jax.config.update("jax_num_cpu_devices", simulated_devices)
    given = (coordinator_address, num_processes, process_id)
    if all(value is None for value in given):
        return
    if any(value is None for value in given):
        raise UserError("several processes need all of --coordinator_address, --num_processes and --process_id")
    assert num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be in 0..{num_processes - 1} (--num_processes={num_processes})"
        )
    jax.distributed.initialize(
        coordinator_address,
        num_processes,
        process_id,
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


def is_primary() -> bool:
    """Whether this process writes files and speaks for the run."""
    return jax.process_index() == 0


class StopSignal:
    """SIGTERM (and Ctrl-C) as a question asked after every step: `requested(step)`.

    In one process the first signal is remembered and a second one ends the program at once. With several, jax's
    preemption service agrees on one step for all of them; a Python handler would silently disable it.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; the same answer on every process."""
        if jax.process_count() == 1:
            return self._received
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received:
            os._exit(128 + number)
        self._received = True
        name = signal.Signals(number).name
        sys.stderr.write(f"\n{name}: saving after this step, then stopping; once more stops at once\n")
        sys.stderr.flush()
