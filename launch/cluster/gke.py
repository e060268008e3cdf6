"""Google Kubernetes Engine: a JobSet, one Job a slice; or the xpk command that makes one."""

import dataclasses
import math
import re
from typing import Any, ClassVar

from meshway.framework.errors import UserError
from meshway.launch.cluster.job import PORT, Chips, Job, Renderer, quoted, tpu_chips, yaml_text
from meshway.launch.flags import flag

_WORKERS = "workers"
_CLAIM = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_USER_ERROR = 2  # the exit code of a wrong command or recipe: another try would end the same


@dataclasses.dataclass(frozen=True)
class Gke(Renderer):
    """A GKE cluster with the JobSet controller: TPU slices by topology, or GPU nodes by number.

    GKE tells the pods of a TPU slice, and the slices of a JobSet, who their peers are (TPU_WORKER_*, MEGASCALE_*); GPU
    pods get it from here.

    Raises:
      UserError: a topology that is not one, or what does not go together.
    """

    suffix: ClassVar[str] = ".yaml"

    accelerator: str = flag("what GKE calls it, as tpu-v5p-slice or nvidia-h100-80gb", "TYPE")
    image: str = flag("the container image, with meshway and the recipe in it", "IMAGE")
    volume: tuple[str, ...] = flag(
        "mount a PersistentVolumeClaim (runs:/mnt/runs) or a folder of every node (/data:/mnt/data); repeat for more",
        "NAME:DIR",
        (),
    )
    topology: str | None = flag("chips of a TPU slice, as 2x2x4", "AxBxC", None)
    devices: int = flag("chips or GPUs of one host (default: 4)", "N", 4)
    num_slices: int = flag("TPU slices, joined over the data-centre network (default: 1)", "N", 1)
    nodes: int | None = flag("how many GPU nodes", "N", None)
    namespace: str | None = flag("the Kubernetes namespace", "NAME", None)
    queue: str | None = flag("the Kueue queue to wait in", "NAME", None)
    priority: str | None = flag("the Kubernetes priority class", "NAME", None)
    service_account: str | None = flag("the Kubernetes service account", "NAME", None)
    spot: bool = flag("use spot capacity", default=False)
    grace: int = flag("seconds to save in when a pod is told to go (default: 120)", "S", 120)

    def __post_init__(self) -> None:
        for pair in self.volume:
            name, _, path = pair.rpartition(":")
            if not path.startswith("/") or not (name.startswith("/") or _CLAIM.fullmatch(name)):
                raise UserError(f"--volume={pair}: write --volume=CLAIM:/DIR, or --volume=/FOLDER_OF_NODES:/DIR")
        if len({path for path in self.mounts}) < len(self.volume):
            raise UserError(f"--volume mounts one folder twice: {', '.join(self.volume)}")
        if not self.tpu:
            if self.topology or self.num_slices > 1:
                given = "--topology" if self.topology else "--num_slices"
                raise UserError(f"{given} is for TPU slices, and --accelerator={self.accelerator} is not one")
            if not self.nodes:
                raise UserError(f"--accelerator={self.accelerator} needs --nodes=N, how many of them")
            return
        if self.nodes:
            raise UserError("--nodes is for GPU nodes: a TPU slice has as many hosts as its --topology needs")
        if not self.topology or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", self.topology):
            found = f", not {self.topology!r}" if self.topology else ""
            raise UserError(f"--accelerator={self.accelerator} needs --topology=2x2x4 or the like{found}")
        if self.slice_chips > self.devices and self.slice_chips % self.devices:
            raise UserError(
                f"--topology={self.topology} has {self.slice_chips} chips, not a multiple of --devices={self.devices} "
                "a host"
            )

    @property
    def mounts(self) -> list[str]:
        """The folders of a pod that outlive it."""
        return [pair.rpartition(":")[2] for pair in self.volume]

    @property
    def tpu(self) -> bool:
        """Whether the accelerator is a TPU, by GKE's name for it."""
        return self.accelerator.startswith("tpu")

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(int(size) for size in (self.topology or "0").split("x"))

    @property
    def chips(self) -> Chips | None:
        """The chips of all slices, or the GPUs of all nodes."""
        if not self.tpu:
            return Chips(self.hosts * self.devices, self.hosts, f"--nodes={self.nodes} with --devices={self.devices}")
        words = f"--topology={self.topology}" + (f" x {self.num_slices}" if self.num_slices > 1 else "")
        return Chips(self.num_slices * self.slice_chips, self.num_slices * self.hosts, words)

    @property
    def hosts(self) -> int:
        """Pods of one Job: hosts of one slice, or all GPU nodes."""
        return self.nodes or max(1, self.slice_chips // self.devices)

    def render(self, job: Job) -> str:
        """Returns the JobSet as YAML."""
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        jobset = {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": {
                "name": job.name,
                "namespace": self.namespace,
                "labels": {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else None,
                "annotations": annotations if self.tpu else None,  # a slice for each Job alone
            },
            "spec": {
                "failurePolicy": {
                    "maxRestarts": job.restarts,
                    "rules": [
                        {
                            "name": "userError",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        }
                    ],
                },
                "replicatedJobs": [{"name": _WORKERS, "replicas": self.num_slices, "template": self._job(job)}],
            },
        }
        return job.comment() + "\n" + yaml_text(jobset)

    def _job(self, job: Job) -> dict[str, Any]:
        """Returns the template of one slice's Job."""
        wrong = {"containerName": "meshway", "operator": "In", "values": [_USER_ERROR]}
        return {
            "spec": {
                "parallelism": self.hosts,
                "completions": self.hosts,
                "completionMode": "Indexed",
                "backoffLimit": 0,  # a lost pod restarts the whole JobSet, which resumes from its last checkpoint
                "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong}]},
                "template": {"spec": self._pod(job)},
            }
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        resource = "google.com/tpu" if self.tpu else "nvidia.com/gpu"
        kind = "cloud.google.com/gke-tpu-accelerator" if self.tpu else "cloud.google.com/gke-accelerator"
        selector = {kind: self.accelerator, "cloud.google.com/gke-tpu-topology": self.topology}
        host_network = True if self.num_slices > 1 else None  # DCN traffic past the pods' virtual network
        return {
            "restartPolicy": "Never",
            "nodeSelector": selector | {"cloud.google.com/gke-spot": "true" if self.spot else None},
            "priorityClassName": self.priority,
            "serviceAccountName": self.service_account,
            "hostNetwork": host_network,
            "dnsPolicy": "ClusterFirstWithHostNet" if host_network else None,
            "terminationGracePeriodSeconds": self.grace,
            "tolerations": [{"key": resource, "operator": "Exists"}],
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}, *self._volumes()],
            "containers": [
                {
                    "name": "meshway",
                    "image": self.image,
                    "command": ["bash", "-c", _literal(self._script(job))],
                    "env": [{"name": key, "value": _literal(value)} for key, value in job.environment.items()] or None,
                    "ports": [{"containerPort": PORT}],
                    "resources": {"limits": {resource: self.devices}},
                    "volumeMounts": [
                        {"name": "shared-memory", "mountPath": "/dev/shm"},
                        *({"name": f"volume-{i}", "mountPath": path} for i, path in enumerate(self.mounts)),
                    ],
                }
            ],
        }

    def _volumes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for index, pair in enumerate(self.volume):
            name = pair.rpartition(":")[0]
            kind: dict[str, Any] = {"persistentVolumeClaim": {"claimName": name}}
            if name.startswith("/"):
                kind = {"hostPath": {"path": name, "type": "Directory"}}
            found.append({"name": f"volume-{index}", **kind})
        return found

    def _script(self, job: Job) -> str:
        peers = [
            f"--coordinator_address={job.name}-{_WORKERS}-0-0.{job.name}:{PORT}",
            f"--num_processes={self.hosts}",
            '--process_id="$JOB_COMPLETION_INDEX"',
        ]
        return job.script(expanded=() if self.tpu else peers) + "\n"

    def submit(self, path: str) -> str:
        """Returns the command that submits the file."""
        return f"kubectl apply -f {quoted(path)}"


@dataclasses.dataclass(frozen=True)
class Xpk(Renderer):
    """A GKE cluster made with xpk, which writes the JobSet itself."""

    suffix: ClassVar[str] = ".sh"

    cluster: str = flag("the cluster", "NAME")
    image: str = flag("the container image, with meshway and the recipe in it", "IMAGE")
    tpu_type: str | None = flag("a TPU slice by cores or chips, as v5p-128", "TYPE", None)
    device_type: str | None = flag("any other machine, as h100-mega-80gb-8", "TYPE", None)
    num_slices: int = flag("TPU slices, joined over the data-centre network (default: 1)", "N", 1)
    nodes: int | None = flag("how many machines of --device_type", "N", None)
    project: str | None = flag("the Google Cloud project", "PROJECT", None)
    zone: str | None = flag("the zone, as us-east5-a", "ZONE", None)
    priority: str | None = flag("very-low, low, medium, high or very-high", "LEVEL", None)
    spot: bool = flag("use spot capacity", default=False)
    grace: int = flag("seconds to save in when a pod is told to go (default: 120)", "S", 120)

    def __post_init__(self) -> None:
        if bool(self.tpu_type) == bool(self.device_type):
            raise UserError("meshway launch xpk needs either --tpu_type or --device_type")
        if self.tpu_type and self.nodes:
            raise UserError("--nodes is for --device_type: a TPU slice has as many hosts as --tpu_type needs")
        if self.device_type and self.num_slices > 1:
            raise UserError("--num_slices is for TPU slices (--tpu_type)")

    @property
    def chips(self) -> Chips | None:
        """The chips of the slices, where their type tells."""
        chips = tpu_chips(self.tpu_type or "")
        words = f"--tpu_type={self.tpu_type}" + (f" x {self.num_slices}" if self.num_slices > 1 else "")
        return Chips(self.num_slices * chips, self.num_slices, words) if chips else None

    def render(self, job: Job) -> str:
        """Returns a shell script of one command."""
        on_each = " && ".join([*job.before(), f"exec {job.command()}"])  # one line: xpk pastes it into YAML
        for text, written in ((on_each, "\n"), (" ".join(job.env), '"'), (" ".join(job.env), "\n")):
            if written in text:
                raise UserError(f"meshway launch xpk: {text!r} holds {written!r}, which xpk pastes into YAML as it is")
        asked = {
            "workload": job.name,
            "cluster": self.cluster,
            "tpu-type": self.tpu_type,
            "device-type": self.device_type,
            "num-slices": self.num_slices if self.tpu_type else None,
            "num-nodes": self.nodes,
            "docker-image": self.image,
            "max-restarts": job.restarts,
            # Beside its own 42 and 127 to 255: 1, a failure of the machine, and 75, a lost peer.
            "restart-on-exit-codes": "1,75" if job.restarts else None,
            "termination-grace-period-seconds": self.grace,
            "priority": self.priority,
            "project": self.project,
            "zone": self.zone,
        }
        words = [f"--{key}={value}" for key, value in asked.items() if value is not None]
        words += [f"--env={pair}" for pair in job.env] + (["--spot"] if self.spot else []) + [f"--command={on_each}"]
        lines = ["#!/usr/bin/env bash", job.comment(), "set -e", 'exec xpk workload create "$@" \\']
        return "\n".join(lines) + "\n" + " \\\n".join(f"    {quoted(word)}" for word in words) + "\n"

    def submit(self, path: str) -> str:
        """Returns the command that submits the file."""
        return f"bash {quoted(path)}"


def _literal(value: str) -> str:
    """Returns text that Kubernetes leaves as it is: it would read `$(NAME)` as a variable of `env`."""
    return value.replace("$(", "$$(")
