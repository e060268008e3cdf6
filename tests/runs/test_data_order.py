"""The rows of a run are the same on any number of processes, and follow one another over restarts on other numbers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import LAB, environment, free_port, meshway, outputs, start
from tiers import tiers

COUNT = 201
READ = """if True:
    import itertools, sys
    from meshway.framework.data.features import EncoderDecoder
    from meshway.framework.data.grain_loader import CachedData
    import hashed
    folder, cache, first, share = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    data = CachedData("lab_mix", {"inputs": 64, "targets": 64}, 8, EncoderDecoder(), "tasks.topics", cache_dir=cache)
    stream = hashed.Hashed(data, folder).train(slice(first, first + share))
    for _ in range(%d):
        next(stream)
"""


def hashes(folder):
    """Returns (batch, row) -> hash over all files of a folder; the same row must have the same hash each time."""
    found = {}
    for path in folder.glob("rows-*.jsonl"):
        for line in path.read_text().splitlines():
            batch, row, digest = json.loads(line)
            assert found.setdefault((batch, row), digest) == digest, (batch, row)
    return found


def read_on(processes, folder, cache):
    share = 8 // processes
    settings = {"env": environment() | {"PYTHONPATH": str(LAB)}, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, "-c", READ % COUNT, str(folder), str(cache)]
    started = [
        subprocess.Popen([*words, str(first), str(share)], cwd=LAB, stdout=subprocess.PIPE, **settings)
        for first in range(0, 8, share)
    ]
    said = outputs(started)
    assert not any(process.returncode for process in started), "\n".join(said)
    return hashes(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    done = meshway("cache", "--task=lab_mix", "--module=tasks.topics", f"--directory={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(cache, tmp_path_factory):
    return read_on(1, tmp_path_factory.mktemp("one"), cache)


@pytest.mark.parametrize("processes", tiers([2, 4], slow=[4]))
def test_batches_0_to_200_are_the_same(alone, cache, tmp_path, processes):
    assert len(alone) == COUNT * 8 and len(set(alone.values())) > COUNT
    assert read_on(processes, tmp_path, cache) == alone


def train(folder, cache, processes, steps):
    words = (
        "train", "--gin_file=hashed.gin", f"--gin.MODEL_DIR={folder}", f"--gin.CACHE_DIR={cache}", "--gin.LAYOUT=data",
        f"--gin.TRAIN_STEPS={steps}", f"--simulated_devices={4 // processes}",
    )  # fmt: skip
    address = f"127.0.0.1:{free_port()}"
    joined = (f"--coordinator_address={address}", f"--num_processes={processes}") if processes > 1 else ()
    started = [start(*words, *joined, *((f"--process_id={index}",) if joined else ())) for index in range(processes)]
    said = outputs(started)
    assert not any(process.returncode for process in started), "\n".join(said)


@pytest.fixture(scope="module")
def stopped(alone, cache, tmp_path_factory):
    """A run of two processes that has ended after 30 steps; its rows are those of one process."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(folder, cache, 2, 30)
    found = hashes(folder)
    assert {batch for batch, _ in found} >= set(range(30))
    assert all(alone[key] == digest for key, digest in found.items())
    for path in folder.glob("rows-*.jsonl"):
        path.unlink()
    return folder


@pytest.mark.parametrize("processes", tiers([1, 4], slow=[1]))
def test_training_goes_on_with_the_same_rows_on_another_number_of_processes(alone, cache, stopped, tmp_path, processes):
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    train(folder, cache, processes, 40)
    found = hashes(folder)
    assert min(batch for batch, _ in found) == 30
    assert all(alone[key] == digest for key, digest in found.items())
    assert {(batch, row) for batch in range(30, 40) for row in range(8)} <= set(found)
