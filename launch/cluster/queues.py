"""Places with a queue. Slurm: an sbatch file that saves before its time is up and queues itself again. SkyPilot: a task
that it places on the cheapest cloud that has the machines, and brings back when they go."""

import dataclasses
import re
from typing import ClassVar

from meshway.framework.errors import UserError
from meshway.launch.cluster.job import PORT, Chips, Job, Renderer, quoted, tpu_chips, variable, yaml_text
from meshway.launch.flags import flag

_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")

# The notice is USR1, since TERM is how `scancel` ends a job for good. srun must not get TERM itself, or it kills its
# tasks at once: scancel hands it to the tasks, which save and stop.
_RUN = """\
stopped=
notice() {
    stopped=yes
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap notice USR1

# A supervisor that gave up ends the others too; while it has restarts left it does not end.
srun --kill-on-bad-exit=1 %sbash -c "$COMMAND" &
step=$!
code=0
wait "$step" || code=$?
if [[ -n "$stopped" ]]; then
    code=0
    wait "$step" || code=$?
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class Slurm(Renderer):
    """A Slurm cluster.

    Raises:
      UserError: a time that sbatch does not understand.
    """

    suffix: ClassVar[str] = ".sbatch"

    nodes: int = flag("how many nodes", "N")
    gpus_per_node: int | None = flag("GPUs of each node; one process drives them all", "N", None)
    cpus_per_task: int | None = flag("CPU cores of each process", "N", None)
    partition: str | None = flag("the partition", "NAME", None)
    account: str | None = flag("the account that pays", "NAME", None)
    qos: str | None = flag("the quality of service", "NAME", None)
    constraint: str | None = flag("what nodes must have", "FEATURES", None)
    time: str | None = flag("the longest time to run, as 24:00:00; the job then saves and queues again", "TIME", None)
    notice: int = flag("seconds before the end of the time at which the run is asked to save (default: 300)", "S", 300)
    image: str | None = flag("a container image, where the cluster has Pyxis", "IMAGE", None)

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise UserError(f"--time={self.time}: write minutes, H:MM:SS or D-HH:MM:SS, as 24:00:00 or 2-00:00:00")

    @property
    def chips(self) -> Chips | None:
        """The GPUs that are asked for, where they are by number."""
        if self.gpus_per_node is None:
            return None
        words = f"--nodes={self.nodes} with --gpus_per_node={self.gpus_per_node}"
        return Chips(self.nodes * self.gpus_per_node, self.nodes, words)

    def render(self, job: Job) -> str:
        """Returns the sbatch file."""
        asked = {
            "job-name": job.name,
            "output": f"{job.name}-%j.log",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus_per_node,
            "cpus-per-task": self.cpus_per_task,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "time": self.time,
            "signal": f"B:USR1@{self.notice}",  # to this script alone (B:), which tells the tasks
            "open-mode": "append",
        }
        options = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value is not None]
        container = f"--container-image={quoted(self.image)} " if self.image else ""
        lines = [
            "#!/bin/bash",
            *options,
            "#SBATCH --requeue",
            job.comment(),
            "",
            *job.exports(),
            variable("COMMAND", job.script()),
        ]
        return "\n".join([*lines, _RUN % container])

    def submit(self, path: str) -> str:
        """Returns the command that submits the file."""
        return f"sbatch {quoted(path)}"


# Hosts of a TPU slice count too, whatever num_nodes is: all of them are in the list of addresses.
_PEERS = (
    f'--coordinator_address="$(head -n 1 <<< "$SKYPILOT_NODE_IPS"):{PORT}"',
    '--num_processes="$(wc -l <<< "$SKYPILOT_NODE_IPS")"',
    '--process_id="$SKYPILOT_NODE_RANK"',
)


@dataclasses.dataclass(frozen=True)
class SkyPilot(Renderer):
    """A task of SkyPilot, submitted as a managed job: machines that are taken away are replaced.

    Raises:
      UserError: what does not go together.
    """

    suffix: ClassVar[str] = ".yaml"

    accelerators: str = flag("of each node, as H100:8 or tpu-v5p-16", "TYPE[:N]")
    nodes: int = flag("how many nodes, or slices of one host each (default: 1)", "N", 1)
    infra: str | None = flag("where, as gcp/us-east5 or k8s (default: the cheapest)", "CLOUD[/REGION]", None)
    runtime_version: str | None = flag("the software of a TPU VM, as v2-alpha-tpuv5", "VERSION", None)
    image: str | None = flag("the image, as docker:NAME", "IMAGE", None)
    spot: bool = flag("use spot capacity", default=False)
    upload: str | None = flag("a folder of this machine to copy to the hosts, and to run in", "DIR", None)

    def __post_init__(self) -> None:
        if self.runtime_version and not self.accelerators.startswith("tpu"):
            raise UserError(f"--runtime_version is for TPUs, and --accelerators={self.accelerators} are not TPUs")

    @property
    def chips(self) -> Chips | None:
        """The chips of all nodes, where their type tells."""
        kind, _, number = self.accelerators.partition(":")
        chips = tpu_chips(kind.removeprefix("tpu-")) if kind.startswith("tpu-") else int(number or 1)
        words = f"--accelerators={self.accelerators}" + (f" x {self.nodes}" if self.nodes > 1 else "")
        return Chips(self.nodes * chips, self.nodes, words) if chips else None

    def render(self, job: Job) -> str:
        """Returns the task as YAML."""
        version = {"runtime_version": self.runtime_version} if self.runtime_version else None
        prepared = dataclasses.replace(job, setup=())  # SkyPilot runs `setup` by itself
        task = {
            "name": job.name,
            "num_nodes": self.nodes,
            "resources": {
                "infra": self.infra,
                "accelerators": self.accelerators,
                "accelerator_args": version,
                "image_id": self.image,
                "use_spot": True if self.spot else None,
                "job_recovery": {"max_restarts_on_errors": job.restarts} if job.restarts else None,
            },
            "workdir": self.upload,
            "envs": job.environment or None,
            "setup": "\n".join(["set -e", *job.before()]) + "\n" if job.setup else None,
            "run": prepared.script(expanded=_PEERS) + "\n",
        }
        return job.comment() + "\n" + yaml_text(task)

    def submit(self, path: str) -> str:
        """Returns the command that submits the file."""
        return f"sky jobs launch {quoted(path)}"
