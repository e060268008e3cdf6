"""SkyPilot: a task that it places on the cheapest cloud that has the machines, and brings back when they go."""

import dataclasses
from typing import ClassVar

from meshway.framework.errors import UserError
from meshway.launch.cluster.job import PORT, Chips, Job, Renderer, quoted, tpu_chips, yaml_text
from meshway.launch.flags import flag

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
