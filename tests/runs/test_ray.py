"""`meshway launch ray` on this machine, for real: actors that die are started again, and nothing is left behind."""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from running import LAB, TIMEOUT, command, environment, lines, meshway

pytest.importorskip("ray")
BIGRAM = ("train", "--gin_file=bigram.gin", "--gin.EVAL_PERIOD=None", "--gin.REPORT_PERIOD=50")


@pytest.fixture
def launch():
    """Starts `meshway launch ray` with a folder for Ray of its own (a short one: sockets lie in it)."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    started = []

    def start(*words: str) -> tuple[subprocess.Popen, Path]:
        said = folder / "said"
        own = {"RAY_TMPDIR": str(folder), "RAY_COLOR_PREFIX": "0"}
        with said.open("w") as file:
            process = subprocess.Popen(
                command("launch", "ray", *words),
                cwd=LAB,
                env=environment() | own,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(process)
        return process, said

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
                process.terminate()
                process.wait(timeout=60)
        left = left_behind(folder)
        for number in left:
            os.kill(number, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left, "processes of Ray were left behind"


def left_behind(folder: Path) -> list[int]:
    """Returns the processes that name Ray's folder, once they had time to end."""
    end = time.monotonic() + 30
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes()
            except OSError:
                continue
            if str(folder).encode() in text and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)


def wait_for(process: subprocess.Popen, said: Path, condition) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < end, said.read_text()
        time.sleep(0.02)


def saved(folder: Path) -> list[int]:
    checkpoints = folder / "checkpoints"
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def actors(said: Path) -> list[int]:
    return [int(found) for found in re.findall(r"\(actor (\d+)\)", said.read_text())]


@pytest.mark.proofs  # minutes of waiting
def test_an_actor_that_dies_costs_the_steps_since_the_last_checkpoint(launch, tmp_path):
    steps = ("--gin.TRAIN_STEPS=400", "--gin.CHECKPOINT_PERIOD=50")
    process, said = launch(
        "--processes=2", "--devices=2", "--restarts=2", "--", *BIGRAM, *steps, f"--gin.MODEL_DIR={tmp_path / 'ray'}"
    )
    wait_for(process, said, lambda: saved(tmp_path / "ray"))
    os.kill(actors(said)[1], signal.SIGKILL)
    process.wait(timeout=TIMEOUT)
    text = said.read_text()
    assert process.returncode == 0, text
    assert "the actor of process 1 died" in text and "starting all again, 2 left" in text, text
    assert "process 0 on 127.0.0.1" in text, text
    assert len(actors(said)) == 4 and "resuming from" in text, text
    alone = meshway(*BIGRAM, *steps, f"--gin.MODEL_DIR={tmp_path / 'one'}", "--simulated_devices=4")
    assert alone.returncode == 0, alone.stderr
    found, expected = lines(tmp_path / "ray" / "metrics.jsonl"), lines(tmp_path / "one" / "metrics.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-5)


@pytest.mark.slow
def test_sigterm_makes_all_save_the_same_step(launch, tmp_path):
    process, said = launch(
        "--processes=2", "--devices=2", "--restarts=1", "--", *BIGRAM, f"--gin.MODEL_DIR={tmp_path}",
        "--gin.TRAIN_STEPS=1000000", "--gin.CHECKPOINT_PERIOD=500000",
    )  # fmt: skip
    wait_for(process, said, lambda: (tmp_path / "metrics.jsonl").exists() and lines(tmp_path / "metrics.jsonl"))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=TIMEOUT)
    (step,) = saved(tmp_path)
    assert process.returncode == 0 and f"stopped after step {step}" in said.read_text(), said.read_text()


@pytest.mark.slow
def test_a_wrong_recipe_is_not_tried_again(launch, tmp_path):
    process, said = launch(
        "--processes=2", "--restarts=5", "--", *BIGRAM, "--gin.BATCH_SIEZ=3", f"--gin.MODEL_DIR={tmp_path}"
    )
    process.wait(timeout=TIMEOUT)
    text = said.read_text()
    assert process.returncode == 2 and "BATCH_SIEZ" in text and "starting all again" not in text, text


@pytest.mark.slow
def test_resources_that_are_not_there_are_named(launch, tmp_path):
    process, said = launch(
        "--processes=2", "--resources=TPU=4", "--wait=2", "--", *BIGRAM, f"--gin.MODEL_DIR={tmp_path}"
    )
    process.wait(timeout=TIMEOUT)
    text = said.read_text()
    assert process.returncode == 1 and "gave no 2 places of CPU=1 TPU=4 each within 2 s; it has CPU=2" in text, text
