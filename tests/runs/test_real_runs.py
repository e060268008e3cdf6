"""Runs as people start and stop them, from the command line: two at once, Ctrl-C, what is said, what is told of them.

Beside them stand: damaged checkpoints, another optimizer, full disks (`test_mistakes.py`); dry runs (`test_mistakes.py`
and `tests/launch/cluster/test_launch_options.py`); addresses of buckets, the first line of each verb
(`tests/launch/test_cli.py`); vocabularies that grew (`tests/test_starting_points.py`); loss on part of the tokens, and
texts that start alike in all verbs (`tests/test_fine_tuning.py`); the quickstart (`tests/test_readme.py`).
"""

import json
import signal

import pytest
from running import answer, copy_lab, lines, outputs, start

pytestmark = pytest.mark.proofs

SLOW = ("train", "--gin_file=counting.gin", "--gin.counting.Counting.pause=0.05", "--gin.TRAIN_STEPS=100000",
        "--gin.REPORT_PERIOD=1", "--gin.CHECKPOINT_PERIOD=None")  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return copy_lab(tmp_path_factory.mktemp("runs"))


def begun(process, run, steps=1):
    """Waits until a run has reported so many steps."""
    while not (run / "metrics.jsonl").exists() or len(lines(run / "metrics.jsonl")) < steps:
        assert process.poll() is None, process.communicate()


def test_a_run_that_is_trained_has_one_trainer_and_is_told_and_stopped(lab):
    """A second training is refused and told who holds the run; Ctrl-C saves, exits with 130, and is no finished run."""
    run = lab / "runs/one"
    first = start(*SLOW, "--gin.MODEL_DIR=runs/one", cwd=lab)
    try:
        begun(first, run, 3)
        said = answer(
            "status", "runs/one", cwd=lab, says=(f"process {first.pid} on ", "steps/s", " of 100,000 reported")
        )
        assert "to go" in said
        told = json.loads(answer("status", "runs/one", "--json", cwd=lab))
        assert (told["running"]["pid"], told["total"]) == (first.pid, 100_000)
        words = (*SLOW, "--gin.MODEL_DIR=runs/one")
        answer(*words, cwd=lab, exits=2, says=f"MODEL_DIR='runs/one' is being trained by process {first.pid} on ")
        answer(*words, "--dry_run", cwd=lab, says=f"is being trained by process {first.pid} on ")
    finally:
        first.send_signal(signal.SIGINT)
        (said,) = outputs([first])
    assert first.returncode == 130 and "saved; run the same command again to go on" in said, said
    assert "Traceback" not in said
    steps = [row["step"] for row in lines(run / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert json.loads(answer("status", "runs/one", "--json", cwd=lab))["saved_step"] == steps[-1]
    answer("eval", "--model_dir=runs/one", "--finished", cwd=lab, exits=2, says=f"saved step {steps[-1]} of 100000")
    answer(*SLOW, "--gin.MODEL_DIR=runs/one", f"--gin.TRAIN_STEPS={steps[-1] + 2}", cwd=lab, says="done: step ")


def test_a_run_says_what_it_does_and_nothing_of_others(lab):
    """No start-up notes of TensorFlow or absl from a user's seqio module; what takes time is named."""
    words = ("--gin_file=t5.gin", "--gin.LAYOUT=single", "--gin.EVAL_PERIOD=None", "--gin.TRAIN_STEPS=1")
    said = answer(
        "train", *words, "--gin.MODEL_DIR=runs/said", cwd=lab, says=("compiling the training step", "done: step 1")
    )
    assert said.index("importing what it needs") < said.index("importing tasks.topics") < said.index("compiling")
    for note in ("oneDNN", "cpu_feature_guard", "absl::InitializeLog", "cuda", "computation_placer"):
        assert note not in said, said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gin_file=absent.gin"], "after --: --gin_file=absent.gin: found no gin file 'absent.gin'"),
        (["--gin_file=t5.gin", "--gin.NUM_HEAD=2"], "did you mean 'NUM_HEADS'"),
        (["--gin_file=t5.gin", "--gin.MIXTURE_OR_TASK_NAME=lab_halfs"], "did you mean 'lab_halves'"),
        (["--gin_file=t5.gin", "--gin.D_MODEL=0"], "it must be at least 1"),
        (["--gin_file=t5.gin", "--gin.MODEL_DIR=runs/relative"], "runs/relative"),
    ],
    ids=" ".join,
)
def test_a_job_is_checked_before_it_is_submitted(lab, words, says):
    given = (*words, *(() if "MODEL_DIR" in words[-1] else ("--gin.MODEL_DIR=/data/run",)))
    place = ("slurm", "--nodes=2", "--gpus_per_node=2", f"--workdir={lab}", "--output=job.sh")
    answer("launch", *place, "--", "train", *given, cwd=lab, exits=2, says=says)
    assert not (lab / "job.sh").exists()


@pytest.mark.parametrize("recipe", ["t5.gin", "counting.gin"])
def test_a_sound_job_is_written(lab, recipe):
    """And says what is left to the hosts."""
    place = ("slurm", "--nodes=2", "--gpus_per_node=2", f"--workdir={lab}", f"--output={recipe}.sh")
    words = (f"--gin_file={recipe}", *(["--gin.LAYOUT=data"] if recipe == "t5.gin" else []))
    answer("launch", *place, "--", "train", *words, "--gin.MODEL_DIR=/data/run", cwd=lab)
    assert "train --gin_file=" in (lab / f"{recipe}.sh").read_text()
