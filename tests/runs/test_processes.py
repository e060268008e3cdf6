"""Real processes: any number of them trains to the same losses, and each hears how the others end."""

import shutil
import signal
import time

import numpy as np
import pytest
from running import free_port, lines, meshway, outputs, start
from tiers import tiers


def arguments(folder, *more):
    # Without dropout and in float32: the processes' sums differ from one process's in the last digits only.
    return (
        "train", "--gin_file=t5.gin", f"--gin.MODEL_DIR={folder}", "--gin.LAYOUT=fsdp_model", "--gin.TRAIN_STEPS=10",
        "--gin.EVAL_PERIOD=10", *more,
    )  # fmt: skip


def start_two(folder, *more):
    return start_together(2, *arguments(folder, *more))


def start_together(count, *words, variables=()):
    """Starts processes with four devices in all; `variables` (process -> environment) differ between them."""
    address = f"127.0.0.1:{free_port()}"
    place = (f"--coordinator_address={address}", f"--num_processes={count}") if count > 1 else ()
    return [
        start(
            *words, f"--simulated_devices={4 // count}", *place, *([f"--process_id={index}"] if place else []),
            **dict(variables).get(index, {}),
        )
        for index in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    processes = start_two(folder)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return folder, said


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_two_processes_equal_one(together, tmp_path):
    folder, said = together
    done = meshway(*arguments(tmp_path), "--simulated_devices=4")
    assert done.returncode == 0, done.stderr
    two, one = lines(folder / "metrics.jsonl"), lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for name in ("loss", "validation/loss", "grad_norm"):
        np.testing.assert_allclose([line.get(name, 0) for line in two], [line.get(name, 0) for line in one], rtol=1e-5)
    assert "step 10/10" in said[0] and "step 10/10" not in said[1], "process 0 speaks for the run"


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_one_process_goes_on_where_two_stopped(together):
    folder, _ = together
    done = meshway(*arguments(folder), "--gin.TRAIN_STEPS=15", "--simulated_devices=4")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert lines(folder / "metrics.jsonl")[-1]["step"] == 15


@pytest.mark.slow  # each process compiles everything, on the same two cores
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


def counting(folder, steps, *more):
    return "train", "--gin_file=counting.gin", f"--gin.MODEL_DIR={folder}", f"--gin.TRAIN_STEPS={steps}", *more


@pytest.fixture(scope="module")
def by_count(tmp_path_factory):
    """Twenty steps by one, two and four processes of four devices in all."""
    folders = {count: tmp_path_factory.mktemp(f"by-{count}") for count in (1, 2, 4)}
    for count, folder in folders.items():
        processes = start_together(count, *counting(folder, 20))
        said = outputs(processes)
        assert [process.returncode for process in processes] == [0] * count, "\n".join(said)
    return folders


def losses(folder):
    return {line["step"]: line["loss"] for line in lines(folder / "metrics.jsonl")}


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_one_two_and_four_processes_have_equal_losses(by_count):
    one = losses(by_count[1])
    assert list(one) == [5, 10, 15, 20]
    for count in (2, 4):
        assert losses(by_count[count]) == pytest.approx(one, rel=1e-6)


CROSSINGS = [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]


@pytest.mark.parametrize(("first", "then"), tiers(CROSSINGS, slow=[(1, 4), (2, 1), (4, 2)]))
def test_checkpoints_cross_between_any_two_counts(by_count, tmp_path, first, then):
    folder = tmp_path / "run"
    shutil.copytree(by_count[first], folder)
    shutil.rmtree(folder / "checkpoints" / "20")
    processes = start_together(then, *counting(folder, 20))
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0] * then, "\n".join(said)
    assert "resuming from" in said[0] and "checkpoints/10" in said[0]
    assert losses(folder) == pytest.approx(losses(by_count[1]), rel=1e-6)


def start_from(by_count, tmp_path, seen):
    """Starts two processes that begin with `~/first`, each with a home of its own that shows the steps `seen` of it.

    So a shared folder looks while another run saves and removes checkpoints there, and listings are not of one moment.

    Args:
      by_count: runs that have checkpoints of steps 10 and 20.
      tmp_path: where the homes and the new run are.
      seen: the steps that each of the processes sees; None for no run at all.
    """
    words = counting(
        tmp_path / "run", 100, "--gin.INITIAL_CHECKPOINT_PATH='~/first'", "--gin.mapping.Initial.count_on=True",
        "--gin.TRAIN_STEPS_RELATIVE=5", "--gin.REPORT_PERIOD=1",
    )  # fmt: skip
    variables = {}
    for process, steps in enumerate(seen):
        home = tmp_path / f"home-{process}"
        for step in steps or ():
            shutil.copytree(by_count[1] / "checkpoints" / str(step), home / "first" / "checkpoints" / str(step))
        variables[process] = {"HOME": str(home)}
    return words, variables


@pytest.mark.slow  # each process compiles everything, on the same two cores
@pytest.mark.parametrize(("first", "second"), [((10,), (10, 20)), ((20,), (10, 20))])
def test_processes_start_from_the_checkpoint_that_the_first_found(by_count, tmp_path, first, second):
    """Whatever is the latest to the others; from there they go on as one process does."""
    words, variables = start_from(by_count, tmp_path, (first, second))
    said = outputs(processes := start_together(2, *words, variables=variables))
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    found = losses(tmp_path / "run")
    assert list(found) == [first[-1] + step for step in range(1, 6)]
    one = start_together(1, *(word.replace(str(tmp_path / "run"), str(tmp_path / "one")) for word in words),
                         variables=variables)  # fmt: skip
    (alone,) = outputs(one)
    assert one[0].returncode == 0, alone
    assert found == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


@pytest.mark.slow  # each process compiles everything, on the same two cores
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((10, 20), (10,), "has no checkpoint of step 20; there are [10]"),
        ((10,), None, "is neither a run directory nor a checkpoint"),
        (None, (10,), "is neither a run directory nor a checkpoint"),
    ],
    ids=["another", "none", "none at the first"],
)
def test_a_process_that_cannot_start_from_there_stops_all(by_count, tmp_path, first, second, message):
    """With the one message about what it lacks, which the other hears of it; nothing was trained."""
    words, variables = start_from(by_count, tmp_path, (first, second))
    said = outputs(processes := start_together(2, *words, variables=variables))
    assert [process.returncode for process in processes] == [2, 2], "\n".join(said)
    for text in said:
        assert "Traceback" not in text and message in text, text
    assert "\n".join(said).count("meshway: error: ") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.proofs  # each process compiles everything, on the same two cores
def test_a_hook_s_word_stops_all_processes_at_one_step(tmp_path):
    """That of process 0 counts, whatever the others' hooks say: of evaluations, and of reports a step later."""
    words = arguments(tmp_path, "--gin.EVAL_PERIOD=2", "--gin.REPORT_PERIOD=1")
    words = [words[0], "--gin_file=stopping.gin", *words[2:]]
    own = {"LAB_STOP": "6", "LAB_STOP_REPORT": "3"}, {"LAB_STOP": "2", "LAB_STOP_REPORT": "1"}
    processes = start_together(2, *words, variables=enumerate(own))
    said = outputs(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert "stopped after step 4 of 10, saved. StopsAt: the lab says 3. Run the same command" in said[0]


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_an_exception_in_one_process_ends_all_with_its_message(tmp_path):
    variables = {1: {"LAB_FAILS_AT_BATCH": "7"}}
    processes = start_together(2, *counting(tmp_path, 5000), variables=variables)
    said = outputs(processes)
    assert [process.returncode for process in processes] == [75, 1], "\n".join(said)
    assert "Traceback" in said[1] and "the disk of this machine is gone" in said[1]
    assert "process 0 of 2 stops: process 1: RuntimeError: the disk of this machine is gone" in said[0]


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_a_mistake_is_a_mistake_in_all(tmp_path):
    processes = start_together(2, *counting(tmp_path, 10, "--gin.BATCH_SIZE=7"))
    said = outputs(processes)
    assert [process.returncode for process in processes] == [2, 2], "\n".join(said)
    assert "is not divisible" in said[0]


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_processes_with_other_recipes_are_named(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        start(
            *counting(tmp_path, steps), "--simulated_devices=1", f"--coordinator_address={address}",
            "--num_processes=4", f"--process_id={index}",
        )
        for index, steps in enumerate([10, 10, 11, 10])
    ]  # fmt: skip
    said = outputs(processes)
    assert [process.returncode for process in processes] == [2] * 4, "\n".join(said)
    assert "do not agree: recipe: process 2 of 4: " in said[0]


@pytest.mark.slow  # each process compiles everything, on the same two cores
def test_processes_that_do_not_meet_say_why(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    place = (f"--coordinator_address={address}", "--num_processes=3")
    processes = [
        start(*counting(tmp_path, 10), *place, f"--process_id={index}", MESHWAY_START_SECONDS="20") for index in (0, 1)
    ]
    said = outputs(processes)
    assert [process.returncode for process in processes] == [1, 1], "\n".join(said)
    for text in said:
        assert f"process 2 of 3 did not reach process 0 at {address} in 20 s" in text
        assert "Traceback" not in text
