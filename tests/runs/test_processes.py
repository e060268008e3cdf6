"""Two real processes of two devices each train to the losses of one process of four."""

import signal
import time

import numpy as np
import pytest
from running import free_port, lines, meshway, outputs, start

pytestmark = pytest.mark.slow  # each process compiles everything, on the same two cores


def arguments(folder, *more):
    # Without dropout and in float32: the processes' sums differ from one process's in the last digits only.
    return (
        "train", "--gin_file=t5.gin", f"--gin.MODEL_DIR={folder}", "--gin.LAYOUT=fsdp_model", "--gin.TRAIN_STEPS=10",
        "--gin.EVAL_PERIOD=10", *more,
    )  # fmt: skip


def start_two(folder, *more):
    address = f"127.0.0.1:{free_port()}"
    return [
        start(
            *arguments(folder, *more), "--simulated_devices=2", f"--coordinator_address={address}",
            "--num_processes=2", f"--process_id={index}",
        )
        for index in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    processes = start_two(folder)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder, said


def test_two_processes_equal_one(together, tmp_path):
    folder, said = together
    done = meshway(*arguments(tmp_path), "--simulated_devices=4")
    assert done.returncode == 0, done.stderr
    two, one = lines(folder / "metrics.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for name in ("loss", "validation/loss", "grad_norm"):
        np.testing.assert_allclose([line.get(name, 0) for line in two], [line.get(name, 0) for line in one], rtol=1e-5)
    assert "step 10/10" in said[0] and "step 10/10" not in said[1], "process 0 speaks for the run"


def test_one_process_goes_on_where_two_stopped(together):
    folder, _ = together
    done = meshway(*arguments(folder), "--gin.TRAIN_STEPS=15", "--simulated_devices=4")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert lines(folder / "metrics.jsonl")[-1]["step"] == 15


def test_sigterm_to_one_process_saves_the_same_step_on_all(tmp_path):
    processes = start_two(
        tmp_path, "--gin.TRAIN_STEPS=100000", "--gin.CHECKPOINT_PERIOD=50000", "--gin.EVAL_PERIOD=None"
    )
    metrics = tmp_path / "metrics.jsonl"
    end = time.monotonic() + 200
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(steps) == 1 and f"stopped after step {steps[0]}" in said[0]
