"""Four processes of one run lose one of them again and again, in four ways; the run ends as an undisturbed one."""

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from running import LAB, command, environment, lines

HEARTBEAT = 6  # seconds
CHECKPOINT_PERIOD = 10
RECIPE = (
    "--gin_file=counting.gin", "--gin.counting.Counting.pause=0.02", "--gin.REPORT_PERIOD=1",
    f"--gin.CHECKPOINT_PERIOD={CHECKPOINT_PERIOD}",
)  # fmt: skip
CUT = LAB.parent / "cut"  # its sitecustomize.py puts a link that can be cut before each process
FOUR = {"kill": 1, "kill in save": 1, "stop": 1, "cut": 1}
EIGHT = {"kill": 2, "kill in save": 2, "stop": 2, "cut": 2}
TWENTY = {"kill": 6, "kill in save": 5, "stop": 5, "cut": 4}
STEPS_A_LOSS = 20


class Launched:
    """A run of four processes under the launcher, as its logs show it."""

    def __init__(self, folder, steps, restarts):
        self.folder, self.steps = folder, steps
        words = ("train", *RECIPE, f"--gin.MODEL_DIR={folder}", f"--gin.TRAIN_STEPS={steps}")
        launch = ("launch", "local", "--processes=4", "--devices=1", f"--restarts={restarts}", "--", *words)
        path = os.pathsep.join([str(CUT), environment().get("PYTHONPATH", "")])
        self.said = open(f"{folder}.log", "w+")  # noqa: SIM115 for as long as the run lasts
        self.process = subprocess.Popen(
            command(*launch),
            cwd=LAB,
            env=environment() | {"PYTHONPATH": path, "MESHWAY_HEARTBEAT_SECONDS": str(HEARTBEAT)},
            stdout=self.said,
            stderr=self.said,
        )

    def log(self, process, attempt):
        """Returns what a process has said in an attempt, None before it has begun."""
        path = self.folder / "logs" / f"process_{process}.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        found = re.search(rf"--- attempt {attempt} of .*?(?=\n--- attempt|\Z)", text, re.DOTALL)
        return found and found[0]

    def pid(self, process, attempt):
        return int(re.search(r"pid (\d+)", self.log(process, attempt))[1])

    def step(self, attempt):
        """Returns the last step that process 0 has reported in an attempt, 0 before the first."""
        steps = re.findall(r"\nstep (\d+)/", self.log(0, attempt) or "")
        return int(steps[-1]) if steps else 0

    def saves_now(self):
        return any("tmp" in path.name for path in (self.folder / "checkpoints").glob("*"))

    def wait(self, condition, pause=0.02, deadline=200):
        """Returns the condition's first true value; None when the run has ended before."""
        end = time.monotonic() + deadline
        while time.monotonic() < end:
            if value := condition():
                return value
            if self.process.poll() is not None:
                return None
            time.sleep(pause)
        raise AssertionError(f"nothing has happened for {deadline} s: {self.everything()}")

    def everything(self):
        self.said.seek(0)
        return self.said.read()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    @functools.cache
    def of(steps):
        run = Launched(tmp_path_factory.mktemp("undisturbed"), steps, restarts=0)
        assert run.process.wait(400) == 0, run.everything()
        return run.folder

    return of


def harm(run, way, victim, attempt, chance):
    """Waits for a moment, then does it; returns whether a checkpoint was being written."""
    first = run.wait(lambda: run.step(attempt))
    if way == "kill in save":
        run.wait(lambda: run.step(attempt) > first and run.saves_now(), pause=0.001)
    else:
        moment = first + chance.randrange(2 * CHECKPOINT_PERIOD)
        run.wait(lambda: run.step(attempt) >= moment)
    saving = run.saves_now()
    number = {"stop": signal.SIGSTOP, "cut": signal.SIGUSR1}.get(way, signal.SIGKILL)
    os.kill(run.pid(victim, attempt), number)
    return saving


def check_reasons(run, way, victim, attempt):
    """Every survivor has said who is missing, by itself and in time: the launcher kills those that have not."""
    for process in range(4):
        said = run.log(process, attempt)
        if process == victim and way != "cut":
            continue
        reason = re.search(rf"meshway: process {process} of 4 stops: (.*)", said)
        assert reason, f"{way} {victim}: {said[-3000:]}"
        missing = "process 0, at" if victim in (0, process) else f"process {victim} of 4"
        assert missing in reason[1], reason[0]
        assert "(most recent call first)" in said
    text = run.everything()
    outcome = re.search(rf"attempt {attempt} of \d+ ended .*", text)[0]
    cause = {"stop": "did not end with the others and was killed", "cut": "exited with 75"}.get(way, "SIGKILL")
    assert cause in outcome, outcome
    if way != "cut":
        assert f"process {victim} " in outcome
    blamed = re.findall(r"process (\d) did not end", outcome)
    assert blamed == ([str(victim)] if way == "stop" else []), outcome


@pytest.mark.proofs
@pytest.mark.parametrize("ways", [FOUR, EIGHT, TWENTY], ids=lambda ways: str(sum(ways.values())))
def test_losses_leave_no_trace(tmp_path, undisturbed, ways):
    folder = tmp_path / "chaos"
    folder.mkdir()
    chance = random.Random(4)
    every = [way for way, times in ways.items() for _ in range(times)]
    events = [(way, chance.randrange(4) if way != "cut" else chance.randrange(1, 4)) for way in every]
    chance.shuffle(events)
    steps = STEPS_A_LOSS * len(events)
    run = Launched(folder, steps, restarts=len(events) + 10)
    in_saves, begin = 0, time.monotonic()
    try:
        for attempt, (way, victim) in enumerate(events, start=1):
            all_there = run.wait(lambda attempt=attempt: all(run.log(process, attempt) for process in range(4)))
            assert all_there, f"the run ended before loss {attempt}: {run.everything()}"
            in_saves += harm(run, way, victim, attempt, chance)
            run.wait(lambda attempt=attempt: run.log(0, attempt + 1))
            check_reasons(run, way, victim, attempt)
            print(f"{time.monotonic() - begin:.0f} s: {way} {victim} at {run.step(attempt)}", file=sys.stderr)
        assert run.process.wait(400) == 0, run.everything()
    finally:
        run.process.terminate()
        run.process.terminate()
        run.process.wait(60)
    assert in_saves >= ways["kill in save"], "some were killed while a checkpoint was written"
    check_equal(folder, undisturbed(steps), steps)


def check_equal(folder, undisturbed, steps):
    ours, theirs = lines(folder / "metrics.jsonl"), lines(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, steps + 1))
    losses = [line["loss"] for line in theirs]
    np.testing.assert_allclose([line["loss"] for line in ours], losses, rtol=1e-6)
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.1, "it learns"  # 80 steps bring 0.3
