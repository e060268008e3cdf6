"""Runs whose directory is in a bucket: killed, resumed, refused, as one in a local folder is."""

import json
import re
import signal
import time

import pytest
from buckets import BUCKET, emulator, on, variables
from running import copy_lab, lines, meshway, outputs, start, state_hash

from meshway.framework.evaluation.records import complete_steps
from meshway.framework.files import holder_of, open_path

LAST = 60
ARGUMENTS = (
    *("train", "--gin_file=bigram.gin", "--simulated_devices=4", f"--gin.TRAIN_STEPS={LAST}"),
    "--gin.CHECKPOINT_PERIOD=10",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return copy_lab(tmp_path_factory.mktemp("buckets"))


@pytest.fixture(scope="module")
def store():
    with emulator() as address, on(address):
        yield variables(address)


@pytest.fixture(scope="module")
def undisturbed(lab):
    folder = lab / "undisturbed"
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={folder}", cwd=lab)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def wait_until(process, is_reached, deadline=300):
    """Returns once something is so while a process runs; else kills the process."""
    end, reached = time.monotonic() + deadline, False
    try:
        while not reached and time.monotonic() < end and process.poll() is None:
            time.sleep(0.1)
            reached = is_reached()
    finally:
        if not reached:
            process.kill()
    assert reached, process.communicate()[0]


@pytest.fixture(scope="module")
def killed(lab, store):
    """A run in a bucket, killed twice and resumed to its end; returns its directory and what it said."""
    run = open_path(f"gs://{BUCKET}/runs/killed")
    words = (*ARGUMENTS, f"--gin.MODEL_DIR={run}")
    told = []
    for step in (10, 30):
        process = start(*words, cwd=lab, **store)
        if step == 10:  # a second job on the same run is refused, and told who has it
            wait_until(process, (run / ".lock").exists)
            (said,) = outputs([second := start(*words, cwd=lab, **store)])
            assert second.returncode == 2 and f"is being trained by process {process.pid} on " in said, said
            assert not re.search("Traceback", said)
        wait_until(process, lambda step=step: max(complete_steps(run / "checkpoints"), default=0) >= step)
        process.send_signal(signal.SIGKILL)
        told.append(outputs([process])[0])
        assert max(complete_steps(run / "checkpoints")) < LAST, "killed in time"
        assert (run / ".lock").exists() and holder_of(run / ".lock") is None
    (said,) = outputs([last := start(*words, cwd=lab, **store)])
    assert last.returncode == 0 and f"done: step {LAST}; report: {run}/report.html" in said, said
    return run, (*told, said)


def test_a_run_in_a_bucket_is_killed_and_ends_as_an_undisturbed_local_one(lab, killed, undisturbed):
    run, said = killed
    assert "resuming from gs://" in said[1] and "resuming from gs://" in said[2]
    assert state_hash(run, LAST) == state_hash(undisturbed, LAST)
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(0, LAST + 1, 5))
    for line, other in zip(lines(run / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl"), strict=True):
        assert line.get("loss") == other.get("loss") and line.get("validation/loss") == other.get("validation/loss")
    assert not (run / ".lock").exists()
    assert {path.name for path in run.iterdir()} | {".lock"} >= {path.name for path in undisturbed.iterdir()}
    assert not list(lab.glob("gs*"))


def test_a_run_in_a_bucket_is_evaluated_and_told_of(lab, store, killed, undisturbed):
    run, _ = killed
    words = ("--steps=all", "--simulated_devices=4")
    local = meshway("eval", f"--model_dir={undisturbed}", *words, cwd=lab)
    (said,) = outputs([process := start("eval", f"--model_dir={run}", *words, cwd=lab, **store)])
    assert (local.returncode, process.returncode) == (0, 0), local.stderr + said
    (name,) = [path.name for path in (run / "eval").glob("*.jsonl")]
    found, expected = (lines(each / "eval" / name) for each in (run, undisturbed))
    assert [line["metrics"] for line in found] == [line["metrics"] for line in expected]
    assert sum("fingerprint" in line for line in found) == sum("fingerprint" in line for line in expected) >= 3
    (again,) = outputs([process := start("eval", f"--model_dir={run}", *words, cwd=lab, **store)])
    assert process.returncode == 0 and "had been evaluated already" in again, again
    (status,) = outputs([start("status", str(run), "--json", cwd=lab, **store)])
    status = json.loads(status.splitlines()[-1])
    assert status["running"] is None and status["step"] == status["saved_step"] == LAST and status["attempts"] == 3
    assert status["model_dir"] == str(run) and status["checkpoints"] == [40, 50, 60]
