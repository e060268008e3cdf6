"""Several processes of one run on this machine, supervised."""

import os
import socket
import tempfile
from collections.abc import Sequence

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.launch.cluster.supervisor import Child, Children, grace, model_directory, run_attempts, say

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
    say(f"{processes} processes of {devices} devices; logs in {logs}")
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
