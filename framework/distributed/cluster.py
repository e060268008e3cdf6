"""Recognises how this process was started, from its environment alone, without using the network."""

import dataclasses
import re
from collections.abc import Callable, Mapping

from meshway.framework.errors import UserError

_KINDS = ("none", "tpu", "gke", "slurm", "openmpi", "kubernetes")
_PORT = 8476  # of process 0, by default


@dataclasses.dataclass(frozen=True)
class Cluster:
    """This process's place among those of its run.

    Attributes:
      kind: what it was recognised by, for messages.
      coordinator: host:port of process 0.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      local_device: the one accelerator of its host that this process uses; None: all of them.
      detection: the `cluster_detection_method` of `jax.distributed.initialize` that finds the above, which are then
        None.
    """

    kind: str
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device: int | None = None
    detection: str | None = None

    def __str__(self) -> str:
        if self.detection:
            return f"{self.kind}, detected by jax (method {self.detection!r})"
        return f"{self.kind}: process {self.process_id} of {self.num_processes}, process 0 at {self.coordinator}"


@dataclasses.dataclass(frozen=True)
class ProcessArguments:
    """The flags of the command line; None for one that is not given."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def recognise(environment: Mapping[str, str], given: ProcessArguments = ProcessArguments()) -> Cluster | None:
    """Returns this process's place, or None for a run of one process.

    In order: flags; MESHWAY_COORDINATOR_ADDRESS, MESHWAY_NUM_PROCESSES and MESHWAY_PROCESS_ID; Slurm; Open MPI; GKE's
    TPU variables (one slice or several); a Cloud TPU VM; an indexed Kubernetes Job. Values that come first take
    precedence, and a cluster supplies the others. MESHWAY_CLUSTER (none, tpu, gke, slurm, openmpi, kubernetes) sets the
    cluster.

    Raises:
      UserError: the flags or variables are incomplete or out of range, or contradict a cluster of several processes.
    """
    given = _with_variables(environment, given)
    cluster = _cluster(environment)
    values = (given.coordinator_address, given.num_processes, given.process_id)
    if all(value is None for value in values):
        return cluster if cluster and (cluster.detection or cluster.num_processes != 1) else None
    if cluster and not cluster.detection and cluster.num_processes != 1:
        _refuse_contradiction(given, cluster)
    found = cluster if cluster and not cluster.detection else Cluster("flags")
    coordinator = given.coordinator_address or found.coordinator
    num_processes = found.num_processes if given.num_processes is None else given.num_processes
    process_id = found.process_id if given.process_id is None else given.process_id
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            "several processes need all of --coordinator_address, --num_processes and --process_id (or "
            "MESHWAY_COORDINATOR_ADDRESS, MESHWAY_NUM_PROCESSES, MESHWAY_PROCESS_ID)"
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} must be in 0..{num_processes - 1} (--num_processes={num_processes})"
        )
    split_address(coordinator)
    kind = "flags" if None not in values else f"flags and {found.kind}"
    return Cluster(kind, coordinator, num_processes, process_id, found.local_device)


def split_address(address: str) -> tuple[str, int]:
    """Returns (host, port) of `host:port` or `[v6]:port`; raises UserError for anything else."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"the coordinator's address is {address!r}; write HOST:PORT, as 10.0.0.1:{_PORT}")
    return host.strip("[]"), int(port)


def _with_variables(environment: Mapping[str, str], given: ProcessArguments) -> ProcessArguments:
    count = _number(environment, "MESHWAY_NUM_PROCESSES")
    index = _number(environment, "MESHWAY_PROCESS_ID")
    return ProcessArguments(
        given.coordinator_address or environment.get("MESHWAY_COORDINATOR_ADDRESS") or None,
        count if given.num_processes is None else given.num_processes,
        index if given.process_id is None else given.process_id,
    )


def _cluster(environment: Mapping[str, str]) -> Cluster | None:
    kind = environment.get("MESHWAY_CLUSTER", "")
    if kind:
        if kind not in _KINDS:
            raise UserError(f"MESHWAY_CLUSTER={kind!r} must be one of {', '.join(_KINDS)}")
        if kind == "none":
            return None
        found = _RECOGNISERS[kind](environment, True)
        if found is None:
            raise UserError(f"MESHWAY_CLUSTER={kind}, but the environment of this process lacks its variables")
        return found
    return next((found for each in _RECOGNISERS.values() if (found := each(environment, False))), None)


def _slurm(environment: Mapping[str, str], named: bool) -> Cluster | None:
    """A task of an `srun` step; the batch script or `salloc` shell around it has no step."""
    if "SLURM_STEP_NODELIST" not in environment or "SLURM_PROCID" not in environment:
        return None
    count = _number(environment, "SLURM_STEP_NUM_TASKS") or _number(environment, "SLURM_NTASKS")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES") or 1
    job = _number(environment, "SLURM_JOB_ID") or 0
    if count is None:
        return None
    port = _port(environment, 61440 + job % 4096)  # two jobs that share a node take different ports
    several = count > nodes and not _one_visible(environment)
    local = _number(environment, "SLURM_LOCALID") if several else None
    address = f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}"
    return Cluster("Slurm", address, count, _number(environment, "SLURM_PROCID"), local)


def _first_node(nodes: str) -> str:
    """Returns the first host of a Slurm list: `a07,b1`, `a[07-09,12],b1`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} names no host")
    return "".join(part or "" for part in match.groups())


def _openmpi(environment: Mapping[str, str], named: bool) -> Cluster | None:
    count = _number(environment, "OMPI_COMM_WORLD_SIZE")
    index = _number(environment, "OMPI_COMM_WORLD_RANK")
    if count is None or index is None:
        return None
    if count == 1:
        return Cluster("Open MPI", None, 1, 0)
    on_host = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    local = _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK") if on_host > 1 else None
    match = re.search(r"(\d+)\..*?tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    address = None
    if match:  # `mpirun` of Open MPI 4 sets its address; job numbers are multiples of 4096
        address = f"{match[2]}:{_port(environment, 61440 + int(match[1]) // 4096 % 4096)}"
    elif on_host == count:
        address = f"127.0.0.1:{_port(environment, _PORT)}"
    elif not environment.get("MESHWAY_COORDINATOR_ADDRESS"):
        raise UserError(
            f"Open MPI started {count} processes on several hosts, and this version does not tell which host is the "
            f"first: mpirun -x MESHWAY_COORDINATOR_ADDRESS=HOST:{_PORT} ..., HOST being that of rank 0"
        )
    return Cluster("Open MPI", address, count, index, None if _one_visible(environment) else local)


def _gke(environment: Mapping[str, str], named: bool) -> Cluster | None:
    """A TPU pod of GKE: its hosts by name, sorted; several slices by MEGASCALE_*."""
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    worker = _number(environment, "TPU_WORKER_ID")
    if not hosts or worker is None:
        return None
    names = [name for name in hosts.split(",") if name]
    slices = _number(environment, "MEGASCALE_NUM_SLICES") or 1
    index = worker + (_number(environment, "MEGASCALE_SLICE_ID") or 0) * len(names)
    first = (environment.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    kind = "GKE TPU slice" if slices == 1 else f"GKE TPU, {slices} slices"
    return Cluster(kind, f"{first}:{_port(environment, _PORT)}", len(names) * slices, index)


def _tpu(environment: Mapping[str, str], named: bool) -> Cluster | None:
    """A Cloud TPU VM. `import jax` sets TPU_ML_PLATFORM if there are libtpu and chips; the rest is in its metadata."""
    present = environment.get("TPU_ML_PLATFORM") == "JAX" and "TPU_SKIP_MDS_QUERY" not in environment
    return Cluster("Cloud TPU VM", detection="gcetpu") if named or present else None


def _kubernetes(environment: Mapping[str, str], named: bool) -> Cluster | None:
    present = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return Cluster("Kubernetes Job", detection="k8s") if present else None


_RECOGNISERS: dict[str, Callable[[Mapping[str, str], bool], Cluster | None]] = {
    "slurm": _slurm,
    "openmpi": _openmpi,
    "gke": _gke,
    "tpu": _tpu,
    "kubernetes": _kubernetes,
}


def _refuse_contradiction(given: ProcessArguments, cluster: Cluster) -> None:
    for name in ("num_processes", "process_id"):
        flag, found = getattr(given, name), getattr(cluster, name)
        if flag is not None and flag != found:
            raise UserError(
                f"--{name}={flag} (or its MESHWAY_ variable) contradicts {cluster.kind}, where it is {found}; leave it "
                "out, or set MESHWAY_CLUSTER=none to ignore the cluster"
            )


def _one_visible(environment: Mapping[str, str]) -> bool:
    """Whether the cluster shows this process a single accelerator already."""
    shown = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES")
    return bool(shown) and "," not in str(shown)


def _port(environment: Mapping[str, str], otherwise: int) -> int:
    return _number(environment, "MESHWAY_COORDINATOR_PORT") or otherwise


def _number(environment: Mapping[str, str], variable: str) -> int | None:
    text = environment.get(variable, "")
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"{variable}={text!r} is not a whole number")
    return int(text)
