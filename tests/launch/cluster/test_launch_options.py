"""`meshway launch`: what its command line understands, what it refuses, and what it starts."""

import itertools
import sys

import pytest
from hosts import FLAGS, WORDS
from running import LAB, free_port, python_after

from meshway.framework.errors import UserError
from meshway.framework.terminal import installed_version
from meshway.launch import cli
from meshway.launch.cluster import ray_cluster, supervisor
from meshway.launch.cluster.job import tpu_chips
from meshway.launch.cluster.options import KINDS
from meshway.launch.cluster.tpu_vm import TpuVm

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
    assert invocation.command.gin_files == ("t5.gin",)
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
        ([*GKE, "--topology=2x2x4", *TRAIN], ["/data/run is in no volume", "by --volume=CLAIM:/data"]),
        ([*GKE, "--topology=2x2x4", "--volume=a:/b", *TRAIN], ["is in no volume", "; mounted are /b"]),
        ([*GKE, "--topology=2x2x4", "--volume=runs", *TRAIN], ["--volume=runs: write --volume=CLAIM:/DIR"]),
        ([*GKE, "--topology=2x2x4", "--volume=a:/b", "--volume=c:/b", *TRAIN], ["mounts one folder twice"]),
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
        ([*GKE, "--topology=2x2", *TRAIN, "--gin.MODEL_DIR=gs://me/run"], ["gs://me/run is not a local path"]),
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
    loaded = python_after("from meshway.launch import cli; cli.main(['launch', 'ray', '--help'])")
    assert not {"jax", "gin", "numpy", "ray", "yaml", "tensorflow"} & loaded


def test_a_job_file_is_printed_or_written(capsys, tmp_path):
    words = ["launch", "slurm", "--nodes=2", f"--workdir={LAB}"]
    assert cli.main([*words, *TRAIN]) == 0
    printed = capsys.readouterr()
    needs = [
        f"meshway {installed_version()} on every host",
        f"the recipe {LAB}/t5.gin, with the files it includes, on every host",
        "/data/run on a file system that every host mounts",
    ]
    listed = "".join(f"\n  it needs {line}" for line in needs) + "\n"
    assert printed.err == f"meshway: with --output=meshway.sbatch, submit it by: sbatch meshway.sbatch{listed}"
    assert "".join(f"\n#   needs {line}" for line in needs) in printed.out
    path = tmp_path / "a job"
    assert cli.main([*words, f"--output={path}", *TRAIN]) == 0
    assert path.read_text() == printed.out and printed.out.startswith("#!/bin/bash\n#SBATCH --job-name=meshway\n")
    assert capsys.readouterr().out == f"wrote '{path}'; submit it by: sbatch '{path}'{listed}"
    assert cli.main([*words, f"--output={tmp_path / 'none' / 'job'}", *TRAIN]) == 2
    assert "cannot be written: No such file" in capsys.readouterr().err


PLACES = {
    "slurm": ["--nodes=2"],
    "tpu_vm": ["--zone=z", "--node_ids=a"],
    "gke": ["--image=lab", "--accelerator=tpu-v5p-slice", "--topology=2x2x4", "--volume=runs:/data"],
    "xpk": ["--cluster=c", "--image=i", "--tpu_type=v5p-8"],
    "skypilot": ["--accelerators=H100:8"],
    "ray": ["--processes=2"],
    "local": ["--processes=2"],
}
WRONG = {
    "a recipe that is not here": (["--gin_file=t6.gin"], "--gin_file=t6.gin: found no gin file 't6.gin'"),
    "a misspelt binding": (["--gin.attention.Attention.num_head=8"], "no parameter 'num_head'; did you mean"),
    "a value": (["--gin.TRAIN_STEPS=many"], "TRAIN_STEPS = 'many', taken by"),
    "a macro without use": (["--gin.DROPUOT_RATE=0.1"], "did you mean 'DROPOUT_RATE'?"),
}


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [*itertools.product(PLACES, list(WRONG)[:2]), *itertools.product(["slurm", "local"], list(WRONG)[2:])],
)
def test_a_recipe_is_checked_before_anything_is_made(kind, wrong, capsys, tmp_path, monkeypatch):
    """With the words of the verb itself."""

    def started(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr(supervisor, "run_local", started)
    monkeypatch.setattr(ray_cluster, "run_on_ray", started)
    more, expected = WRONG[wrong]
    command = ["train", f"--gin_file={LAB}/t5.gin", "--gin.MODEL_DIR=/data/run", *more]
    file = [f"--output={tmp_path / 'job'}"] if KINDS[kind].renders else []
    assert cli.main(["launch", kind, *PLACES[kind], *file, "--", *command]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("meshway: error: ") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


UNFIT = {
    "an unknown task": (["--gin.MIXTURE_OR_TASK_NAME=lab_halfs"], "registered as 'lab_halfs'"),
    "a module that its package has not": (["--gin.MIXTURE_OR_TASK_MODULE=tasks.topic"], "module 'tasks.topic'"),
    "an unknown split": (["--gin.grain_loader.CachedData.train_split=trian"], "has no split 'trian' for training"),
    "a vocabulary that is larger": (["--gin.VOCAB_SIZE=128"], "set VOCAB_SIZE to at least 259"),
    "another model's converter": (["--gin.FEATURE_CONVERTER=@features.PrefixLanguageModel()"], "do not fit the model"),
    "a batch that does not divide": (["--gin.BATCH_SIZE=6"], "set BATCH_SIZE to a multiple of"),
    "a mesh of other devices": (
        ["--gin.mesh.MeshShape.ici={'data': 3, 'fsdp': -1}"],
        "needs a multiple of 3 devices, and --",
    ),
    "a mesh of more devices": (["--gin.mesh.MeshShape.ici={'data': 64}"], "needs 64 devices, and --"),
    "a mesh of too few hosts": (["--gin.mesh.MeshShape.ici={'data': 1}"], "leaves hosts without any"),
}
CHIPS = {
    "slurm": ["--nodes=4", "--gpus_per_node=2"],
    "gke": ["--image=lab", "--accelerator=tpu-v5p-slice", "--topology=2x2x2", "--volume=runs:/data"],
    "tpu_vm": ["--zone=z", "--accelerator=v4-8", "--runtime_version=r", "--num_slices=2"],
    "skypilot": ["--accelerators=H100:4", "--nodes=2"],
    "xpk": ["--cluster=c", "--image=i", "--tpu_type=v5p-8", "--num_slices=2"],
}


@pytest.mark.parametrize(("wrong", "kind"), list(zip(UNFIT, itertools.cycle(CHIPS))))
def test_a_training_is_checked_before_it_is_submitted(wrong, kind, capsys, tmp_path, monkeypatch):
    """On eight devices, those of this process: what a dry run says."""
    monkeypatch.syspath_prepend(str(LAB))
    more, expected = UNFIT[wrong]
    command = ["train", f"--gin_file={LAB}/t5.gin", "--gin.MODEL_DIR=/data/run", *more]
    assert cli.main(["launch", kind, *CHIPS[kind], f"--output={tmp_path / 'job'}", "--", *command]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("meshway: error: ") == 1 and "Traceback" not in error, error
    assert not list(tmp_path.iterdir())


def test_a_task_of_a_module_of_the_hosts_is_left_to_them(capsys, tmp_path):
    """Said; what needs no task is checked all the same."""
    words = ["launch", "slurm", "--nodes=2", f"--workdir={LAB}", *TRAIN, "--gin.MIXTURE_OR_TASK_MODULE=of_hosts.tasks"]
    assert cli.main(words) == 0
    assert "note: the module of_hosts.tasks is not here: the task, its splits" in capsys.readouterr().err
    assert cli.main([*words, "--gin.NUM_HEADS=3", "--gin.LAYOUT=model_1d"]) == 2
    assert "'heads' of size 3" in capsys.readouterr().err


def test_data_of_the_hosts_is_left_to_them(capsys, tmp_path, monkeypatch):
    """A data source of one's own that reads a file."""
    (tmp_path / "of_hosts.py").write_text(
        "class Data:\n    def train(self, rows):\n        open('/of/hosts')\n    def eval_tasks(self): return []\n"
    )
    (tmp_path / "mine.gin").write_text(
        f"from __gin__ import dynamic_registration\nimport of_hosts\ninclude '{LAB}/t5.gin'\nDATA = @of_hosts.Data()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    train = ["train", f"--gin_file={tmp_path}/mine.gin", "--gin.MODEL_DIR=/data/run"]
    assert cli.main(["launch", "slurm", "--nodes=2", "--", *train]) == 0
    assert "note: its data cannot be read here ([Errno 2] No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "chips"),
    [("v5p-128", 64), ("v4-8", 4), ("v5litepod-16", 16), ("v6e-8", 8), ("v5e-4", 4), ("v3-32", 32), ("v9-8", None),
     ("v5p-7", None), ("h100", None)],
)  # fmt: skip
def test_chips_are_told_by_a_slices_type(kind, chips):
    assert tpu_chips(kind) == chips
    place = TpuVm(zone="z", accelerator=kind, runtime_version="r", num_slices=2)
    assert place.chips == (chips and (2 * chips, 2, f"--accelerator={kind} x 2"))


@pytest.mark.parametrize("kind", [kind for kind in PLACES if kind != "local"])
def test_a_recipe_of_the_hosts_alone_is_left_to_them(kind, capsys, monkeypatch):
    monkeypatch.setattr(ray_cluster, "run_on_ray", lambda *args: 0)
    words = ["launch", kind, *PLACES[kind], "--", "train", "--gin_file=/data/t6.gin", "--gin.MODEL_DIR=/data/run"]
    assert cli.main(words) == 2
    assert "--unchecked before -- leaves this to them" in capsys.readouterr().err
    assert cli.main([*words[:2], "--unchecked", *words[2:]]) == 0


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("slurm", ["--gin_file=t5.gin"], "--gin_file=t5.gin would be looked for in another folder on each host"),
        ("skypilot", ["--gin_file=./t5"], "--gin_file=./t5 would be looked for"),
        ("gke", ["--gin_file=quickstart", "--gin_search_paths=layouts"], "--gin_search_paths=layouts would be"),
        ("gke", ["--gin_file=quickstart", "--gin.MODEL_DIR=/mnt/run"], "MODEL_DIR=/mnt/run is in no volume"),
        ("slurm", ["--gin_file={folder}/own.gin"], "MODEL_DIR=mine would be another folder on each host"),
    ],
)
def test_what_would_differ_between_hosts_is_refused(kind, more, expected, capsys, tmp_path):
    """A path of the user's own, relative; a shipped recipe's name is the same everywhere."""
    (tmp_path / "own.gin").write_text("include 'quickstart'\nMODEL_DIR = 'mine'\n")
    more = [word.replace("{folder}", str(tmp_path)) for word in more]
    directory = [] if "own.gin" in more[0] else ["--gin.MODEL_DIR=/data/run"]
    assert cli.main(["launch", kind, *PLACES[kind], "--", "train", *directory, *more]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_shipped_recipes_and_a_working_folder_are_the_same_everywhere(capsys):
    run = ["--gin.MODEL_DIR=/data/run"]
    assert cli.main(["launch", "slurm", "--nodes=2", "--", "train", "--gin_file=quickstart", *run]) == 0
    assert "the recipe" not in capsys.readouterr().err
    assert cli.main(["launch", "slurm", "--nodes=2", "--workdir=/elsewhere", *TRAIN]) == 0
    assert "it needs the recipe /elsewhere/t5.gin" in capsys.readouterr().err


def test_a_run_s_own_recipe_is_the_hosts_where_it_is_not_here(capsys):
    words = ["launch", "slurm", "--nodes=2", "--", "eval", "--model_dir=/data/none"]
    assert cli.main(words) == 0
    assert "note: /data/none is not here: its recipe is left to the hosts" in capsys.readouterr().err


def test_local_runs_the_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(supervisor, "run_local", lambda *args: seen.append(args) or 75)
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
    words = ["launch", "ray", "--processes=2", f"--address=127.0.0.1:{free_port()}", f"--workdir={LAB}", *TRAIN]
    assert cli.main(words) == 1
    assert "the Ray cluster at 127.0.0.1:" in (error := capsys.readouterr().err) and "refused" in error


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install 'meshway\\[ray\\]'"):
        ray_cluster.run_on_ray(TRAIN[1:], 2)
