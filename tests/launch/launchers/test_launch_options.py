"""`meshway launch`: what its command line understands, what it refuses, and what it starts."""

import subprocess
import sys

import pytest
from hosts import FLAGS, WORDS
from running import LAB, free_port

from meshway.framework.errors import UserError
from meshway.launch import cli
from meshway.launch.launch_options import KINDS
from meshway.launch.launchers import local, ray_cluster, supervisor

TRAIN = ["--", "train", "--gin_file=t5.gin", "--gin.MODEL_DIR=/data/run"]
GKE = ["gke", "--image=lab", "--accelerator=tpu-v5p-slice"]
TPU = ["tpu_vm", "--zone=z"]


@pytest.fixture(autouse=True)
def in_the_lab(monkeypatch):
    monkeypatch.chdir(LAB)


def test_a_command_becomes_an_invocation():
    words = ["launch", "slurm", "--nodes=4", "--time=2-00:00:00", "--name=big", "--restarts=0", "--workdir=/data"]
    words += [f"--env=XLA_FLAGS={FLAGS}", "--env", "A=", "--setup=module load cuda", "--setup=true", "--output=x"]
    invocation = cli.parse([*words, "--", *WORDS, "--", "--more"][:-2])
    assert (invocation.verb, invocation.subject, invocation.output) == ("launch", "slurm", "x")
    assert invocation.gin_files == ("t5.gin",)
    job, place = invocation.job, invocation.place
    assert (job.words, job.name, job.restarts, job.workdir) == (WORDS, "big", 0, "/data")
    assert job.environment == {"XLA_FLAGS": FLAGS, "A": ""}
    assert job.setup == ("module load cuda", "true")
    assert (place.nodes, place.time, place.partition, place.notice) == (4, "2-00:00:00", None, 300)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lokal", *TRAIN], ["no kind 'lokal'; did you mean 'local'?"]),
        (["local", "--processes=2"], ["needs the command to run after --", "meshway launch local --processes=4"]),
        (["local", "--processes=2", "--"], ["needs the command to run after --"]),
        (["local", "--processes=2", "train", "--gin_file=a"], ["no argument 'train'; the command to run comes"]),
        (["local", "--processes=2", "--gin_file=a", *TRAIN], ["--gin_file belongs to the command to run, after --"]),
        (["local", *TRAIN], ["needs --processes=N: how many processes"]),
        (["local", "--processes=0", *TRAIN], ["--processes", "'0' is not a whole number of at least 1"]),
        (["local", "--processes=2", "--restarts=-1", *TRAIN], ["--restarts", "'-1'", "at least 0"]),
        (["local", "--proceses=2", *TRAIN], ["unknown flag --proceses; did you mean '--processes'?"]),
        (["local", "--processes=2", "--partition=a", *TRAIN], ["is a flag of `meshway launch slurm`, not of"]),
        (["slurm", "--nodes=2", "--elastic", *TRAIN], ["--elastic is a flag of `meshway launch local`"]),
        (["slurm", "--nodes=2", "--time=1h", *TRAIN], ["--time=1h", "24:00:00"]),
        (["slurm", "--nodes=2", "--name=Big_Job", *TRAIN], ["--name=Big_Job", "lower-case"]),
        (["slurm", "--nodes=2", "--env=XLA_FLAGS", *TRAIN], ["--env=XLA_FLAGS: write --env=KEY=VALUE"]),
        (["slurm", "--nodes=2", "--env=A=1", "--env=A=2", *TRAIN], ["--env=A=... is given twice"]),
        (["ray", "--processes=2", "--resources=TPU", *TRAIN], ["--resources=TPU", "TPU=4"]),
        ([*GKE, *TRAIN], ["needs --topology=2x2x4"]),
        ([*GKE, "--topology=16", *TRAIN], ["not '16'"]),
        ([*GKE, "--topology=2x3", *TRAIN], ["6 chips, not a multiple of --devices=4"]),
        ([*GKE, "--topology=2x2x4", "--nodes=4", *TRAIN], ["--nodes is for GPU nodes"]),
        (["gke", "--image=lab", "--accelerator=nvidia-l4", *TRAIN], ["needs --nodes=N"]),
        (["gke", "--image=lab", "--accelerator=nvidia-l4", "--num_slices=2", *TRAIN], ["--num_slices is for TPU"]),
        (["xpk", "--cluster=c", "--image=i", *TRAIN], ["either --tpu_type or --device_type"]),
        (["xpk", "--cluster=c", "--image=i", "--device_type=d", "--num_slices=2", *TRAIN], ["--num_slices is for TPU"]),
        (["xpk", "--cluster=c", "--image=i", "--tpu_type=d", "--nodes=2", *TRAIN], ["--nodes is for --device_type"]),
        ([*TPU, "--accelerator=v5p-8", *TRAIN], ["needs --runtime_version to create slices, or --node_ids"]),
        ([*TPU, "--node_ids=a,b", "--spot", *TRAIN], ["--spot is for slices to create"]),
        ([*TPU, "--node_ids=a,b", "--num_slices=3", *TRAIN], ["--num_slices=3, but --node_ids names 2"]),
        ([*TPU, "--accelerator=a", "--runtime_version=r", "--spot", "--reserved", *TRAIN], ["exclude each other"]),
        (["skypilot", "--accelerators=H100:8", "--runtime_version=r", *TRAIN], ["--runtime_version is for TPUs"]),
        # The command after --.
        (["slurm", "--nodes=2", "--", "trian"], ["after --: there is no verb 'trian'; did you mean 'train'?"]),
        (["slurm", "--nodes=2", "--", "train"], ["after --: meshway train needs a recipe"]),
        (["slurm", "--nodes=2", *TRAIN, "--dryrun"], ["after --: meshway train: unknown flag --dryrun"]),
        (["slurm", "--nodes=2", "--", "cache", "--task=a"], ["meshway cache runs in one process"]),
        (["slurm", "--nodes=2", "--", "launch", "local", "--processes=2", *TRAIN], ["launch runs in one process"]),
        (["slurm", "--nodes=2", *TRAIN, "--process_id=1"], ["leave out --process_id: the launcher gives it"]),
        (["local", "--processes=2", *TRAIN, "--simulated_devices=2"], ["leave out --simulated_devices: use --devices"]),
        (["slurm", "--nodes=2", *TRAIN, "--gin.MODEL_DIR=run"], ["MODEL_DIR=run would be another folder on each host"]),
        (["slurm", "--nodes=2", *TRAIN, "--gin.MODEL_DIR='run'"], ["MODEL_DIR=run would be another folder"]),
        (["slurm", "--nodes=2", *TRAIN, "--gin.MODEL_DIR=/tmp/run"], ["MODEL_DIR=/tmp/run is each host's own"]),
        ([*GKE, "--topology=2x2", *TRAIN, "--gin.MODEL_DIR=gs://me/run"], ["gs://me/run is no path of this machine"]),
        (["ray", "--processes=2", "--address=h:1", *TRAIN, "--gin.MODEL_DIR=run"], ["another folder on each host"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)  # fmt: skip
def test_a_wrong_command_exits_2_with_a_message(capsys, words, expected):
    assert cli.main(["launch", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("meshway: error: ") and "Traceback" not in error
    assert [part for part in expected if part not in error] == [], error


def test_a_run_directory_on_this_machine_may_be_relative():
    here = ["--", "train", "--gin_file=a", "--gin.MODEL_DIR=runs/a"]
    assert cli.parse(["launch", "local", "--processes=2", *here]).job.words[-1] == "--gin.MODEL_DIR=runs/a"
    assert cli.parse(["launch", "ray", "--processes=2", *here]) is not None


def test_a_worker_may_be_told_its_rank():
    rank = ["--coordinator_address=h:1", "--num_processes=2", "--process_id=1"]
    assert cli.parse(["launch", "worker", *TRAIN, *rank]).job.words[-1] == "--process_id=1"


def test_the_help_of_every_kind_names_its_flags(capsys):
    assert cli.main(["launch"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["launch", "--help"]) == 0
    assert capsys.readouterr().out == shown
    for name in KINDS:
        assert f"meshway launch {name} " in shown
        assert cli.main(["launch", name, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: meshway launch {name}" in text and "examples:" in text and " -- train " in text
        assert all(len(line) <= 100 for line in text.splitlines()), name
    assert "--env KEY=VALUE" in text and "--output FILE" in text


def test_examples_of_the_help_are_commands():
    for kind in KINDS.values():
        for example in kind.examples:
            assert cli.parse(example.split()[1:]) is not None, example


def test_help_imports_neither_jax_nor_gin_nor_numpy_nor_ray():
    program = (
        "import sys; from meshway.launch import cli; cli.main(['launch', 'ray', '--help']); "
        "print('heavy:', sorted({'jax', 'gin', 'numpy', 'ray', 'yaml', 'tensorflow'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("heavy: []\n")


def test_a_job_file_is_printed_or_written(capsys, tmp_path):
    words = ["launch", "slurm", "--nodes=2"]
    assert cli.main([*words, *TRAIN]) == 0
    printed = capsys.readouterr()
    assert printed.err == "meshway: with --output=meshway.sbatch, submit it by: sbatch meshway.sbatch\n"
    path = tmp_path / "a job"
    assert cli.main([*words, f"--output={path}", *TRAIN]) == 0
    assert path.read_text() == printed.out and printed.out.startswith("#!/bin/bash\n#SBATCH --job-name=meshway\n")
    assert capsys.readouterr().out == f"wrote '{path}'; submit it by: sbatch '{path}'\n"
    assert cli.main([*words, f"--output={tmp_path / 'none' / 'job'}", *TRAIN]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


def test_a_recipe_that_is_not_here_is_noted(capsys):
    assert cli.main(["launch", "slurm", "--nodes=2", "--", "train", "--gin_file=t6.gin"]) == 0
    error = capsys.readouterr().err
    assert "note: --gin_file=t6.gin: found no gin file 't6.gin'" in error and "the hosts will look" in error


def test_local_runs_the_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(local, "run_local", lambda *args: seen.append(args) or 75)
    monkeypatch.delenv("LAUNCHED", raising=False)
    words = ["launch", "local", "--processes=4", "--devices=2", "--restarts=3", "--elastic", "--log_dir=logs"]
    assert cli.main([*words, *TRAIN]) == 75
    assert seen == [(tuple(TRAIN[1:]), 4, 2, 3, True, "logs")]


def test_a_worker_is_supervised(monkeypatch):
    seen = []
    monkeypatch.setattr(supervisor, "supervise", lambda *args: seen.append(args) or 0)
    assert cli.main(["launch", "worker", "--restarts=2", *TRAIN]) == 0
    assert seen == [(tuple(TRAIN[1:]), 2)]


def test_ray_runs_the_actors(monkeypatch):
    seen = []
    monkeypatch.setattr(ray_cluster, "run_on_ray", lambda *args: seen.append(args) or 0)
    words = ["launch", "ray", "--processes=2", "--devices=2", "--restarts=1", "--resources=TPU=4", "--resources=GPU=1"]
    assert cli.main([*words, "--env=A=b", "--address=auto", "--workdir=/data", "--wait=5", *TRAIN]) == 0
    assert seen == [(tuple(TRAIN[1:]), 2, 2, 1, {"TPU": 4, "GPU": 1}, {"A": "b"}, "/data", "auto", 5)]


def test_a_cluster_that_is_not_there_is_said_at_once(capsys):
    pytest.importorskip("ray")
    words = ["launch", "ray", "--processes=2", f"--address=127.0.0.1:{free_port()}", *TRAIN]
    assert cli.main(words) == 1
    assert "the Ray cluster at 127.0.0.1:" in (error := capsys.readouterr().err) and "refused" in error


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'meshway\\[ray\\]'"):
        ray_cluster.run_on_ray(TRAIN[1:], 2)
