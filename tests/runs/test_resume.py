"""A run that is killed or stopped, and started again, ends where an undisturbed one ends: bit for bit."""

import random
import shutil
import signal
import time

import pytest
from running import lines, meshway, start, state_hash

from meshway.framework.telemetry.timeline import read_goodput
from meshway.launch.status import read_status

ARGUMENTS = ("train", "--gin_file=t5.gin")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def check_equal(folder, undisturbed):
    assert state_hash(folder, 30) == state_hash(undisturbed, 30)
    steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
    assert steps == [line["step"] for line in lines(undisturbed / "metrics.jsonl")] == [0, 5, 10, 15, 20, 25, 30]
    for line, other in zip(lines(folder / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl"), strict=True):
        assert line.get("loss") == other.get("loss") and line.get("validation/loss") == other.get("validation/loss")
    evaluations = [line["step"] for line in lines(folder / "eval" / "lab_halves.jsonl")]
    assert evaluations == [0, 15, 30]


def check_timeline(folder, outcomes):
    """Every second from the first start to the last line is of some kind, and the page tells.

    `outcomes` are the ways in which the attempts may have ended.
    """
    found = read_goodput(folder / "timeline.jsonl")
    assert [attempt.outcome for attempt in found.attempts] in outcomes
    every = lines(folder / "timeline.jsonl")
    assert abs(found.wall - (every[-1]["time"] - every[0]["began"])) < 0.1
    for attempt in found.attempts:
        worked = attempt.outcome is not None  # what is killed has the time it has
        kinds = ("startup", "compile", "productive", "checkpoint") if worked else ("startup",)
        assert all(attempt.seconds[kind] > 0 for kind in kinds)
    assert found.seconds["evaluation"] > 0 and found.attempts[-1].last_step == 30
    assert all(attempt.seconds["restart"] > 0 for attempt in found.attempts[1:])
    assert "Where the time went" in (folder / "report.html").read_text()
    return found


def wait_for_step(process, folder, step, deadline=300):
    end = time.monotonic() + deadline
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") and lines_upto(metrics) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {process.communicate()[0]}")


def lines_upto(path):
    whole = path.read_text().rpartition("\n")[0]
    import json

    return json.loads(whole.splitlines()[-1])["step"] if whole else -1


def kill_and_resume(folder, undisturbed, waits):
    for step, delay in waits:
        process = start(*ARGUMENTS, f"--gin.MODEL_DIR={folder}")
        try:
            wait_for_step(process, folder, step)
            time.sleep(delay)
        finally:
            process.kill()
            process.communicate()
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(folder, undisturbed)
    # Killed in its first seconds, before it has looked at its folder, an attempt leaves no line.
    found = check_timeline(folder, [[None] * count + ["done"] for count in range(1, len(waits) + 1)])
    assert f" in {len(found.attempts)} attempts: " in done.stdout


@pytest.mark.slow
def test_kill_9_loses_nothing(tmp_path, undisturbed):
    kill_and_resume(tmp_path, undisturbed, [(10, 0.05)])


@pytest.mark.proofs
@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_three_random_moments(tmp_path, undisturbed, seed):
    chance = random.Random(seed)
    steps = sorted(chance.sample([0, 5, 10, 15, 20], 3))
    kill_and_resume(tmp_path, undisturbed, [(step, chance.uniform(0.0, 1.0)) for step in steps])


@pytest.mark.slow
def test_sigterm_saves_says_how_to_go_on_and_exits_0(tmp_path, undisturbed):
    process = start(*ARGUMENTS, f"--gin.MODEL_DIR={tmp_path}")
    try:
        wait_for_step(process, tmp_path, 5)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "saved; run the same command again to go on" in output
    assert (tmp_path / "report.html").exists()
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={tmp_path}")
    assert done.returncode == 0 and "resuming from" in done.stdout
    assert state_hash(tmp_path, 30) == state_hash(undisturbed, 30)
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert check_timeline(tmp_path, [["stopped", "done"]]).seconds["lost"] == 0


@pytest.mark.slow
def test_running_a_finished_run_again_changes_nothing(undisturbed):
    before = state_hash(undisturbed, 30)
    metrics = (undisturbed / "metrics.jsonl").read_text()
    check_timeline(undisturbed, [["done"]])
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={undisturbed}")
    assert done.returncode == 0, done.stderr
    assert "already" in done.stdout
    assert state_hash(undisturbed, 30) == before
    assert (undisturbed / "metrics.jsonl").read_text() == metrics
    check_timeline(undisturbed, [["done"]])


@pytest.mark.slow
def test_the_resolved_recipe_reproduces_the_run(tmp_path, undisturbed):
    done = meshway("train", f"--gin_file={undisturbed / 'config.gin'}", f"--gin.MODEL_DIR={tmp_path}")
    assert done.returncode == 0, done.stderr
    check_equal(tmp_path, undisturbed)


@pytest.mark.slow
def test_what_a_run_leaves_behind(undisturbed):
    assert "TRAIN_STEPS = 30" in (undisturbed / "config.gin").read_text()
    assert {"began", "outcome"} <= {key for line in lines(undisturbed / "timeline.jsonl") for key in line}
    page = (undisturbed / "report.html").read_text()
    assert "lab_halves" in page and page.count("<svg") + page.count("data:image") >= 3, "curves are drawn"
    assert list((undisturbed / "tensorboard").glob("*tfevents*"))
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir() if path.name.isdigit()) == [
        "20",
        "25",
        "30",
    ]
    last = lines(undisturbed / "metrics.jsonl")[-1]
    names = (
        "loss accuracy grad_norm learning_rate tokens_per_second step_seconds data_wait_fraction mfu validation/loss"
    )
    assert all(name in last for name in names.split()), last
    assert last["loss"] < lines(undisturbed / "metrics.jsonl")[1]["loss"]
    evaluation = lines(undisturbed / "eval" / "lab_halves.jsonl")[-1]
    assert {"same_length", "loss"} <= set(evaluation["metrics"])
    assert {"input", "target", "prediction"} == set(evaluation["predictions"][0])
    assert "params/token_embedding/embedding" in (undisturbed / "model_info.txt").read_text()


@pytest.mark.slow
def test_a_run_counts_on_from_another_and_resumes_without_it(undisturbed, tmp_path):
    """As fine-tuning in T5X: ten more steps, then five more, once what it started from is gone."""
    before = shutil.copytree(undisturbed, tmp_path / "before")
    words = (*ARGUMENTS, f"--gin.MODEL_DIR={tmp_path / 'tuned'}", f"--gin.INITIAL_CHECKPOINT_PATH={before}")
    words += ("--gin.mapping.Initial.optimizer_state=True",)
    done = meshway(*words, "--gin.TRAIN_STEPS_RELATIVE=10")
    assert done.returncode == 0 and "done: step 40" in done.stdout, done.stdout + done.stderr
    shutil.rmtree(before)
    done = meshway(*words, "--gin.TRAIN_STEPS_RELATIVE=15")
    assert done.returncode == 0 and "done: step 45" in done.stdout, done.stdout + done.stderr
    found = [line["step"] for line in lines(tmp_path / "tuned" / "metrics.jsonl")]
    assert found == [30, 35, 40, 45]
    assert read_status(tmp_path / "tuned").total == 45
