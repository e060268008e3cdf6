"""How processes find their place, from environments as clusters set them."""

import pytest

from meshway.framework.distributed.cluster import Cluster, ProcessArguments, recognise, split_address
from meshway.framework.errors import UserError

SRUN = {  # srun -N2 -n4, third task
    "SLURM_JOB_ID": "123456",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SBATCH = {  # the batch script itself
    "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_JOB_NODELIST": "gpu[007-008]",
}  # fmt: skip
MPIRUN_4 = {  # Open MPI 4, two hosts
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPIRUN_5 = {  # Open MPI 5, one host
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc,job-2.svc", "TPU_WORKER_ID": "1"}
MULTISLICE = GKE | {
    "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0.svc:8080",
}  # fmt: skip
TPU_VM = {"TPU_ML_PLATFORM": "JAX", "ENABLE_RUNTIME_UPTIME_TELEMETRY": "1"}  # as `import jax` leaves it there
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3", "HOSTNAME": "job-3-abcde"}
VARIABLES = {
    "MESHWAY_COORDINATOR_ADDRESS": "10.0.0.1:1234", "MESHWAY_NUM_PROCESSES": "4", "MESHWAY_PROCESS_ID": "3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"TPU_SKIP_MDS_QUERY": "1", "HOME": "/root"}, None),  # a machine without TPUs
        (SRUN, Cluster("Slurm", f"gpu007:{61440 + 123456 % 4096}", 4, 2, 0)),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "0"}, Cluster("Slurm", f"gpu007:{61440 + 123456 % 4096}", 4, 2, None)),
        (SBATCH, None),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "0"}, None),
        (MPIRUN_4, Cluster("Open MPI", f"10.96.0.1:{61440 + 1531576320 // 4096 % 4096}", 4, 3, 1)),
        (MPIRUN_5, Cluster("Open MPI", "127.0.0.1:8476", 2, 1, 1)),
        (MPIRUN_5 | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (GKE, Cluster("GKE TPU slice", "job-0.svc:8476", 3, 1)),
        (MULTISLICE, Cluster("GKE TPU, 2 slices", "slice-0-0.svc:8476", 6, 4)),
        (GKE | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (TPU_VM, Cluster("Cloud TPU VM", detection="gcetpu")),
        (TPU_VM | {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (POD, Cluster("Kubernetes Job", detection="k8s")),
        (VARIABLES, Cluster("flags", "10.0.0.1:1234", 4, 3)),
        (POD | VARIABLES, Cluster("flags", "10.0.0.1:1234", 4, 3)),
        (SRUN | {"MESHWAY_CLUSTER": "none"}, None),
        (SRUN | {"MESHWAY_COORDINATOR_PORT": "99"}, Cluster("Slurm", "gpu007:99", 4, 2, 0)),
        ({"MESHWAY_CLUSTER": "tpu"}, Cluster("Cloud TPU VM", detection="gcetpu")),
    ],
)
def test_environments(environment, found):
    assert recognise(environment) == found


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,b2", "a1"), ("a[01-04]", "a01"), ("a[3,5-7],b", "a3"), ("r[1-2]-ib", "r1-ib")],
)
def test_first_node_of_a_slurm_list(nodes, first):
    assert recognise(SRUN | {"SLURM_STEP_NODELIST": nodes}).coordinator.partition(":")[0] == first


def test_flags_win_over_variables_and_a_cluster_fills_in_the_rest():
    assert recognise(VARIABLES, ProcessArguments("h:1", 8, 7)) == Cluster("flags", "h:1", 8, 7)
    assert recognise(VARIABLES, ProcessArguments(process_id=1)).process_id == 1
    assert recognise(SRUN, ProcessArguments("h:1")) == Cluster("flags and Slurm", "h:1", 4, 2, 0)
    one_task = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    assert recognise(one_task, ProcessArguments("h:1", 2, 1)).num_processes == 2, (
        "several processes started in one task"
    )


@pytest.mark.parametrize(
    ("environment", "given", "message"),
    [
        (SRUN, ProcessArguments("h:1", 8, 2), "num_processes=8 .* contradicts Slurm, where it is 4"),
        (SRUN, ProcessArguments("h:1", 4, 1), "process_id=1 .* contradicts Slurm, where it is 2"),
        (SRUN | VARIABLES, ProcessArguments(), "process_id=3 .* contradicts"),
        ({}, ProcessArguments("h:1", 4), "need all of"),
        ({}, ProcessArguments("h:1", 2, 2), r"must be in 0..1"),
        ({}, ProcessArguments("h", 2, 1), "HOST:PORT"),
        ({"MESHWAY_PROCESS_ID": "x"}, ProcessArguments("h:1", 2), "'x' is not a whole number"),
        ({"MESHWAY_CLUSTER": "slurn"}, ProcessArguments(), "must be one of none, tpu"),
        ({"MESHWAY_CLUSTER": "slurm"}, ProcessArguments(), "lacks its variables"),
        (MPIRUN_5 | {"OMPI_COMM_WORLD_SIZE": "4"}, ProcessArguments(), "mpirun -x MESHWAY_COORDINATOR_ADDRESS"),
    ],
)
def test_what_is_incomplete_or_contradicts_is_an_error(environment, given, message):
    with pytest.raises(UserError, match=message):
        recognise(environment, given)


def test_addresses():
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("[fe80::1]:80") == ("fe80::1", 80)
    for wrong in ("host", ":80", "host:0", "host:x", "host:70000"):
        with pytest.raises(UserError):
            split_address(wrong)
