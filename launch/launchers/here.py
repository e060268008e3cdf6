"""Places that are this machine: several processes of it, or one process of a cluster's host."""

import dataclasses
import os
from typing import ClassVar

from meshway.launch.launchers.job import Job, flag


@dataclasses.dataclass(frozen=True)
class Local:
    """Several processes on this machine, each with simulated CPU devices."""

    common: ClassVar[tuple[str, ...]] = ("restarts", "env")
    shared_directory: ClassVar[bool] = False

    processes: int = flag("how many processes run together", "N")
    devices: int = flag("CPU devices that each of them simulates (default: 1)", "N", 1)
    elastic: bool = flag("go on with fewer processes after each failure: the next number that divides N", default=False)
    log_dir: str | None = flag("a folder for a log of each process (default: `logs` in MODEL_DIR)", "DIR", None)

    def run(self, job: Job) -> int:
        """Runs the job in `processes` processes; returns the exit code."""
        from meshway.launch.launchers.local import run_local

        os.environ.update(job.environment)
        return run_local(job.words, self.processes, self.devices, job.restarts, self.elastic, self.log_dir)


@dataclasses.dataclass(frozen=True)
class Worker:
    """One process, on a host of a cluster that runs this on each of its hosts."""

    common: ClassVar[tuple[str, ...]] = ("restarts", "env")
    shared_directory: ClassVar[bool] = False

    def run(self, job: Job) -> int:
        """Runs the job in one supervised process; returns the exit code."""
        from meshway.launch.launchers.supervisor import supervise

        os.environ.update(job.environment)
        return supervise(job.words, job.restarts)
