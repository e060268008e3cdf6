"""A cache that was killed again and again while it was built is the one of an undisturbed build, to the byte."""

import os
import random
import signal
import subprocess
import time

import pytest
from running import LAB, command, environment

KILLS = (4, 10)


def start(directory, log):
    """Starts a build in a process group of its own, workers included."""
    words = ["cache", "--task=kept_large", "--module=cached_tasks", "--workers=2", "--num_shards=16"]
    path = os.pathsep.join([str(LAB.parent), environment().get("PYTHONPATH", "")])
    return subprocess.Popen(
        command(*words, f"--directory={directory}"),
        cwd=LAB,
        env=environment() | {"PYTHONPATH": path},
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def finished(directory):
    return len(list(directory.glob("kept_large/*/*-of-*.json")))


def under_way(directory):
    return set(directory.glob("kept_large/.building-*/*.array_record"))


@pytest.mark.proofs
@pytest.mark.parametrize("kills", KILLS)
def test_kills_at_any_moment_neither_lose_nor_double_anything(tmp_path, kills):
    directory, chance = tmp_path / "killed", random.Random(3)
    shards = []
    with open(tmp_path / "log", "w+") as log:
        assert start(tmp_path / "undisturbed", log).wait() == 0
        for number in range(kills):
            left, before = under_way(directory), finished(directory)
            more = chance.randrange(6)  # shards to wait for, by count: machines differ in speed
            run = start(directory, log)
            while run.poll() is None and number != 2:  # that one is killed while it starts
                if under_way(directory) - left and finished(directory) >= before + more:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.4))
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            shards.append(finished(directory))
        assert start(directory, log).wait() == 0
    print(f"shards finished after each kill: {shards}")
    assert shards == sorted(shards) and len(set(shards)) > kills // 2
    assert files(directory) == files(tmp_path / "undisturbed")
