"""Job files do on a host what the command line said: they are run here, between stand-ins for what they call."""

import random
import shlex
import signal
import subprocess
import time

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hosts import FLAGS, WORDS

from meshway.framework.errors import UserError
from meshway.launch.cluster.gke import Gke, Xpk
from meshway.launch.cluster.job import Job, quoted, variable
from meshway.launch.cluster.queues import SkyPilot, Slurm
from meshway.launch.cluster.tpu_vm import TpuVm

WORKER = ["launch", "worker", "--restarts=3", "--", *WORDS]
TPU = TpuVm(zone="us-east5-a", accelerator="v5p-16", runtime_version="v2-alpha-tpuv5")
SLICES = TpuVm(zone="z", project="p", accelerator="v5p-16", runtime_version="v2", num_slices=2, spot=True)
POD = Gke(accelerator="tpu-v5p-slice", topology="2x2x4", image="lab")
VOLUMES = ("runs:/mnt/runs", "/data:/mnt/data")
GPUS = Gke(accelerator="nvidia-h100-80gb", nodes=2, devices=8, image="lab")


def ran_as_asked(host, more=()):
    """Every process got the words as they were typed, in the folder, with the variables."""
    calls = host.calls("meshway")
    assert calls
    for words, variables, folder in calls:
        assert words == [*WORKER, *more]
        assert variables.pop("XLA_FLAGS") == FLAGS and variables.pop("NOTE") == "set"
        assert folder == str(host.folder / "my lab")
    return [variables for _, variables, _ in calls]


def container(text):
    """Returns the command and variables of a JobSet's container, as Kubernetes hands them on: `$$(` is `$(`."""
    (jobs,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    (found,) = jobs["template"]["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"].replace("$$(", "$(") for each in found["env"]}
    assert "$(" not in found["command"][2].replace("$$(", "")  # nothing it would expand
    return [word.replace("$$(", "$(") for word in found["command"]], variables


def test_slurm_runs_the_command(host, job):
    host.bash(Slurm(nodes=2).render(job))
    ran_as_asked(host)
    ((words, _, _),) = host.calls("srun")
    assert words[:3] == ["--kill-on-bad-exit=1", "bash", "-c"]
    assert not host.calls("scancel") and not host.calls("scontrol")


def test_slurm_saves_and_queues_again_when_its_time_is_up(host, job):
    """The notice reaches the tasks through scancel; the job is queued again once they have saved."""
    record = host.folder / "record"
    host.command("meshway", "", "#!/bin/bash\ntrap 'sleep 0.3; echo saved >> \"$RECORD.saved\"; exit 0' TERM\n"
                 "touch \"$RECORD.up\"\nwhile true; do sleep 0.1; done\n")  # fmt: skip
    host.command("scancel", f"import signal\nos.kill(int(open({str(record) + '.srun'!r}).read()), signal.SIGTERM)\n")
    host.command(
        "scontrol", f"assert os.path.exists({str(record) + '.saved'!r})\nopen({str(record)!r} + '.queued', 'w')\n"
    )
    script = host.folder / "job.sbatch"
    script.write_text(Slurm(nodes=2).render(job))
    batch = subprocess.Popen(["bash", str(script)], env=host.environment, cwd=host.folder)
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and not (host.folder / "record.up").exists():
            time.sleep(0.05)
        batch.send_signal(signal.SIGUSR1)
        assert batch.wait(timeout=60) == 0
    finally:
        batch.kill()
    assert (host.folder / "record.saved").read_text() == "saved\n"
    assert [words for words, _, _ in host.calls("scancel")] == [["--signal=TERM", "7"]]
    assert [words for words, _, _ in host.calls("scontrol")] == [["requeue", "7"]]
    assert (host.folder / "record.queued").exists(), "queued again before it had saved"


def test_slurm_hands_on_a_failure(host, job):
    host.command("meshway", "sys.exit(3)\n")
    script = host.folder / "job.sbatch"
    script.write_text(Slurm(nodes=1).render(job))
    assert subprocess.run(["bash", str(script)], env=host.environment, cwd=host.folder).returncode == 3
    assert not host.calls("scontrol")


def test_tpu_vm_runs_detached_on_the_hosts(host, job):
    script = TPU.render(job)
    host.bash(script, "run")
    end = time.monotonic() + 60
    while time.monotonic() < end and not host.calls("meshway"):
        time.sleep(0.05)
    assert ran_as_asked(host) == [{}]
    ((words, _, _),) = [call for call in host.calls("gcloud") if "ssh" in call[0]]
    assert words[:6] == ["compute", "tpus", "tpu-vm", "ssh", "lab", "--zone=us-east5-a"]
    assert words[6] == "--worker=all"


def test_tpu_vm_tells_slices_who_they_are(host, job):
    host.bash(SLICES.render(job), "run")
    end = time.monotonic() + 60
    while time.monotonic() < end and len(host.calls("meshway")) < 2:
        time.sleep(0.05)
    found = sorted(ran_as_asked(host), key=lambda variables: variables["MEGASCALE_SLICE_ID"])
    assert found == [
        {"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.7", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": index}
        for index in ("0", "1")
    ]
    assert {words[4] for words, _, _ in host.calls("gcloud")} == {"lab-0", "lab-1"}


@pytest.mark.parametrize(
    ("place", "step", "expected"),
    [
        (
            TPU,
            "create",
            "queued-resources create lab --zone=us-east5-a --accelerator-type=v5p-16 "
            "--runtime-version=v2-alpha-tpuv5 --node-id=lab",
        ),
        (
            SLICES,
            "create",
            "queued-resources create lab --zone=z --project=p --accelerator-type=v5p-16 --spot "
            "--runtime-version=v2 --node-count=2 --node-prefix=lab",
        ),
        (SLICES, "delete", "queued-resources delete lab --zone=z --project=p --force"),
        (
            TpuVm(zone="z", accelerator="v5p-16", runtime_version="v2", direct=True, reserved=True),
            "create",
            "tpu-vm create lab --zone=z --accelerator-type=v5p-16 --reserved --version=v2",
        ),
        (TpuVm(zone="z", node_ids="a,b"), "stop", "tpu-vm ssh a --zone=z --worker=all --command="),
        (TpuVm(zone="z", node_ids="a,b"), "create", ""),
    ],
)
def test_tpu_vm_asks_gcloud(host, job, place, step, expected):
    host.command("pkill")
    host.bash(place.render(job), step)
    calls = ["compute tpus " + expected] if expected else []
    found = sorted(" ".join(words) for words, _, _ in host.calls("gcloud"))
    assert [call for call in calls if not any(line.startswith(call) for line in found)] == [], found
    assert bool(found) == bool(expected)
    if step == "stop":
        assert host.calls("pkill")[0][0] == ["-TERM", "-f", "[m]eshway launch worker"] and len(host.calls("pkill")) == 2


def test_gke_runs_the_command(host, job):
    (shell, flag, script), variables = container(POD.render(job))
    assert (shell, flag) == ("bash", "-c")
    host.bash(script, **variables)
    ran_as_asked(host)


def test_gke_tells_gpu_pods_who_they_are(host, job):
    (*_, script), variables = container(GPUS.render(job))
    host.bash(script, **variables, JOB_COMPLETION_INDEX="1")
    ran_as_asked(host, ["--coordinator_address=lab-workers-0-0.lab:8476", "--num_processes=2", "--process_id=1"])


def test_xpk_runs_the_command(host, job):
    host.command("xpk")
    place = Xpk(cluster="pods", tpu_type="v5p-128", num_slices=2, image="lab", spot=True, zone="z", priority="high")
    host.bash(place.render(job), "--dry-run")
    ((words, _, _),) = host.calls("xpk")
    *asked, command = words
    assert asked == [
        *("workload", "create", "--dry-run", "--workload=lab", "--cluster=pods", "--tpu-type=v5p-128"),
        *("--num-slices=2", "--docker-image=lab", "--max-restarts=3", "--restart-on-exit-codes=1,75"),
        *("--termination-grace-period-seconds=120", "--priority=high", "--zone=z", f"--env=XLA_FLAGS={FLAGS}"),
        "--spot",
    ]
    host.bash(f"({command.removeprefix('--command=')}) & wait $!", XLA_FLAGS=FLAGS)
    ran_as_asked(host)


def test_skypilot_runs_the_command(host, job):
    task = yaml.safe_load(SkyPilot(accelerators="H100:8", nodes=2).render(job))
    host.bash(
        "export NOTE=set\n" + task["run"],
        **task["envs"],
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NODE_RANK="1",
    )
    ran_as_asked(host, ["--coordinator_address=10.0.0.1:8476", "--num_processes=2", "--process_id=1"])
    assert task["setup"].splitlines() == ["set -e", f"cd {shlex.quote(job.workdir)}", "export NOTE=set"]


def test_skypilot_task():
    place = SkyPilot("tpu-v5p-16", 1, "gcp/us-east5", "v2-alpha-tpuv5", "docker:lab", True, ".")
    task = yaml.safe_load(place.render(Job(WORDS, "lab", 2)))
    task.pop("run")
    assert task == {
        "name": "lab",
        "num_nodes": 1,
        "resources": {
            "infra": "gcp/us-east5",
            "accelerators": "tpu-v5p-16",
            "accelerator_args": {"runtime_version": "v2-alpha-tpuv5"},
            "image_id": "docker:lab",
            "use_spot": True,
            "job_recovery": {"max_restarts_on_errors": 2},
        },
        "workdir": ".",
    }


@pytest.mark.proofs
def test_skypilot_takes_the_task(tmp_path, job):
    """By SkyPilot's own reader, where it is installed."""
    sky = pytest.importorskip("sky")
    path = tmp_path / "task.yaml"
    path.write_text(SkyPilot(accelerators="H100:8", nodes=2, spot=True).render(job))
    task = sky.Task.from_yaml(str(path))
    assert (task.name, task.num_nodes, task.envs) == ("lab", 2, {"XLA_FLAGS": FLAGS})


# The part of the JobSet resource (v1alpha2) that we write; the Job in it is checked against Kubernetes' own schema.
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
                "namespace": {"type": "string"},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        },
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["action", "name"],
                                "additionalProperties": False,
                                "properties": {
                                    "action": {"enum": ["FailJobSet", "RestartJobSet"]},
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "onJobFailureReasons": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "template": {
                                "type": "object",
                                "required": ["spec"],
                                "additionalProperties": False,
                                "properties": {"spec": {"type": "object"}},
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize(
    "place",
    [
        POD,
        GPUS,
        Gke(
            "tpu-v6e-slice",
            "lab",
            ("runs:/mnt/runs", "/data:/mnt/data"),
            "4x4",
            4,
            3,
            None,
            "ns",
            "queue",
            "high",
            "robot",
            True,
            60,
        ),
        Gke("tpu-v6e-slice", "lab", topology="2x2"),
    ],
    ids=["slice", "gpus", "everything", "one host"],
)
def test_a_jobset_fits_the_schemas(place, job):
    jobset = yaml.safe_load(place.render(job))
    jsonschema.validate(jobset, JOBSET)
    (jobs,) = jobset["spec"]["replicatedJobs"]
    spec = jobs["template"]["spec"]
    kubernetes_validate.validate(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "lab"}, "spec": spec}, "1.33", strict=True
    )
    assert jobs["replicas"] == place.num_slices
    assert spec["parallelism"] == spec["completions"] == place.hosts


def test_hosts_of_a_jobset():
    assert (POD.hosts, GPUS.hosts, Gke("tpu-v6e-slice", "lab", topology="2x2").hosts) == (4, 2, 1)


RENDERED = [
    (Slurm(4, 8, 16, "part", "acc", "high", "ib", "24:00:00", 60, "me/lab"), [
        "--nodes=4", "--gpus-per-node=8", "--cpus-per-task=16", "--partition=part", "--account=acc", "--qos=high",
        "--constraint=ib", "--time=24:00:00", "--signal=B:USR1@60", "--container-image=me/lab", "--requeue",
        "--job-name=lab",
    ]),
    (Gke("tpu-v6e-slice", "me/lab", VOLUMES, "4x4", 4, 3, None, "ns", "queue", "high", "robot", True, 60), [
        "gke-tpu-accelerator: tpu-v6e-slice", "image: me/lab", "gke-tpu-topology: 4x4", "google.com/tpu: 4",
        "replicas: 3", "namespace: ns", "queue-name: queue", "priorityClassName: high", "serviceAccountName: robot",
        "gke-spot: 'true'", "terminationGracePeriodSeconds: 60", "hostNetwork: true", "maxRestarts: 3",
        "claimName: runs", "mountPath: /mnt/runs", "path: /data", "mountPath: /mnt/data",
    ]),
    (Xpk("pods", "me/lab", None, "h100-mega-80gb-8", 1, 2, "proj", "z", "low", False, 60), [
        "--cluster=pods", "--docker-image=me/lab", "--device-type=h100-mega-80gb-8", "--num-nodes=2",
        "--project=proj", "--zone=z", "--priority=low", "--termination-grace-period-seconds=60",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("place", "expected"), RENDERED, ids=["slurm", "gke", "xpk"])
def test_every_flag_is_in_the_file(place, expected, job):
    text = place.render(job)
    assert [part for part in expected if part not in text] == []


def test_xpk_refuses_what_it_would_spoil():
    place = Xpk(cluster="pods", tpu_type="v5p-8", image="lab")
    for job in (Job(WORDS, env=('A="b"',)), Job(WORDS, setup=("a\nb",))):
        with pytest.raises(UserError, match="pastes into YAML"):
            place.render(job)


@pytest.mark.parametrize("place", [TPU, SLICES, TpuVm(zone="z", node_ids="a"), Slurm(1)])
def test_scripts_are_scripts(place, host, job):
    host.bash("true")
    (host.folder / "script.sh").write_text(place.render(job))
    assert subprocess.run(["bash", "-n", str(host.folder / "script.sh")]).returncode == 0


def test_a_quoted_word_is_what_bash_reads(host):
    drawn = random.Random(0)
    words = ["".join(drawn.choices("ab '\"$`\\!(){}*#~\n", k=drawn.randrange(6))) for _ in range(500)]
    words += [f"it's {mark}HOME" for mark in '"$`\\!']
    done = host.bash("printf '%s\\0' " + " ".join(quoted(word) for word in words))
    assert done.stdout.split("\0")[:-1] == words


@pytest.mark.parametrize("text", ["", "a\n  b", "END_OF_NAME\nEND_OF_NAME_", "'\"$HOME`id`\\"])
def test_a_variable_holds_the_text(host, text):
    assert host.bash(variable("NAME", text) + 'printf %s "$NAME"').stdout.rstrip("\n") == text


@pytest.mark.parametrize("place", [Slurm(1), TPU, POD, Xpk("c", "i", "t"), SkyPilot("H100:8")])
def test_a_job_file_says_what_it_needs(place):
    text = place.render(Job(("train",), needs=("the recipe a.gin", "a\nb")))
    assert "# meshway train\n#   needs the recipe a.gin\n#   needs a b\n" in text


def test_a_comment_stays_one_line():
    text = Slurm(1).render(Job(("train", "--gin.NOTE=a\nrm -rf /")))
    assert [line for line in text.splitlines() if line.startswith("rm -rf")] == ["rm -rf /'"]  # inside the quoted word
