"""`meshway eval` as users run it: beside a training run, several at once, killed, on several processes."""

import re
import shutil
import time

import pytest
from running import lines, meshway, outputs, start
from tiers import tiers

ARGUMENTS = ("train", "--gin_file=t5.gin", "--gin.manager.Keep.latest=None")
STEPS = [5, 10, 15, 20, 25, 30]
TASK = "lab_halves"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 30 steps with all its checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    done = meshway(*ARGUMENTS, f"--gin.MODEL_DIR={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """The same run, every checkpoint evaluated once it had ended."""
    folder = bare_copy(trained, tmp_path_factory.mktemp("evaluated"))
    done = meshway("eval", f"--model_dir={folder}", "--steps=all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(done.stdout) == STEPS
    return folder


def bare_copy(trained, folder):
    """Returns a copy of a run that nobody has evaluated, not even itself."""
    return shutil.copytree(trained, folder / "run", ignore=shutil.ignore_patterns("eval", "tensorboard"))


def told(output):
    """Returns the steps that a command says it has evaluated."""
    return [int(step) for step in re.findall(rf"^step (\d+)  {TASK}  loss", output, re.MULTILINE)]


def records(folder, name=TASK):
    """Returns the records of a task that programs beside the training run have written, by step."""
    path = folder / "eval" / f"{name}.jsonl"
    found = lines(path) if path.exists() else []
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    return {line["step"]: line for line in found if "fingerprint" in line}


def wait_for(what, deadline=200):
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come")


@pytest.mark.proofs
def test_a_watcher_beside_a_training_run_killed_once_equals_evaluating_afterwards(tmp_path, evaluated):
    watch = ("eval", f"--model_dir={tmp_path}", "--watch", "--idle_timeout=120")
    training = start(*ARGUMENTS, f"--gin.MODEL_DIR={tmp_path}")
    started = [training]
    try:
        wait_for((tmp_path / "config.gin").exists)
        started.append(start(*watch))
        claims = tmp_path / "eval" / ".claims"
        wait_for(lambda: records(tmp_path) and list(claims.glob("*/*")))
        started[-1].kill()  # in the middle of a step, after others
        before = records(tmp_path)
        assert 0 < len(before) < len(STEPS)
        started.append(start(*watch))
        said = outputs(started)
    finally:
        for process in started:
            process.kill()
    assert training.returncode == 0 and started[-1].returncode == 0, said
    assert told(said[1]) == list(before) and told(said[2]) == [step for step in STEPS if step not in before]
    assert records(tmp_path) == records(evaluated) and list(records(tmp_path)) == STEPS
    # The run's own evaluations of other steps stand, and of the same ones are replaced.
    assert [line["step"] for line in lines(tmp_path / "eval" / f"{TASK}.jsonl")] == [0, *STEPS]
    report = (tmp_path / "report.html").read_text()
    assert "same length" in report and f"{TASK}, step 30" in report


@pytest.mark.slow
def test_two_watchers_at_once_evaluate_each_step_once(tmp_path, trained, evaluated):
    folder = bare_copy(trained, tmp_path)
    watchers = [start("eval", f"--model_dir={folder}", "--watch") for _ in range(2)]
    said = outputs(watchers)
    assert [watcher.returncode for watcher in watchers] == [0, 0], said
    assert sorted(told(said[0]) + told(said[1])) == STEPS
    assert records(folder) == records(evaluated)
    assert not list((folder / "eval" / ".claims").glob("*/*"))
    again = meshway("eval", f"--model_dir={folder}", "--steps=all")
    assert again.returncode == 0 and told(again.stdout) == [] and "6 steps had been evaluated already" in again.stdout
    anew = meshway("eval", f"--model_dir={folder}", "--steps=10,30", "--again")
    assert anew.returncode == 0 and told(anew.stdout) == [10, 30] and records(folder) == records(evaluated)


@pytest.mark.parametrize("counts", tiers([[2], [2, 4]], slow=[[2]]))
def test_one_two_and_four_processes_find_the_same(tmp_path, trained, counts):
    """Of two tasks, 13 examples each in batches of 8: the last batch is padded on every process count."""
    asked = ("--task=lab_mix", "--gin.grain_loader.CachedData.eval_examples=13", "--steps=10,30")
    found = {}
    for count in (1, *counts):
        folder = bare_copy(trained, tmp_path / str(count))
        done = meshway("launch", "local", f"--processes={count}", "--", "eval", f"--model_dir={folder}", *asked)
        assert done.returncode == 0, done.stdout + done.stderr
        found[count] = {name: records(folder, name) for name in (TASK, "lab_openings")}
        assert (folder / "logs" / f"process_{count - 1}.log").exists()
    for name, alone in found[1].items():
        assert list(alone) == [10, 30]
        assert alone[30]["counts"].get("predictions") == (13 if name == TASK else None)  # the other has no metrics
        for count in counts:
            for step, record in found[count][name].items():
                assert record["metrics"] == pytest.approx(alone[step]["metrics"], rel=1e-5)
                assert {**record, "metrics": 0} == {**alone[step], "metrics": 0}
