"""`meshway infer` in real processes: killed at any moment it goes on, on as many processes as there are then; and what
it predicts of an example depends on nothing but the example."""

import json
import os
import random
import signal
import subprocess
import time

import pytest
from running import command, environment, meshway
from saved_runs import save_run
from tiers import tiers

NUM_EXAMPLES, NUM_CHUNKS, NUM_KILLS = 300, 30, (3, 10)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nobody", "looks", "at", "all"]


def questions(seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, 11))) for _ in range(NUM_EXAMPLES)]


def write(path, texts):
    path.write_text("".join(json.dumps({"inputs": text, "id": n}) + "\n" for n, text in texts))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(
        tmp_path_factory.mktemp("runs") / "t5", "t5_1_1", "TASK_FEATURE_LENGTHS = {'inputs': 80, 'targets': 8}"
    )


def infer(run, source, output, processes=1, *words):
    """Returns the command of a job on four devices, over so many processes."""
    size = () if any(word.startswith("--batch_size") for word in words) else ("--batch_size=8",)
    own = ("infer", f"--model_dir={run}", f"--input={source}", f"--output={output}", *size, *words)
    if processes == 1:
        return (*own, "--simulated_devices=4")
    return ("launch", "local", f"--processes={processes}", f"--devices={4 // processes}", "--", *own)


def committed(output):
    return len(list((output.parent / f"{output.name}.parts").glob("*.json"))) if output.parent.exists() else 0


def killed_at(words, output, chunks, delay):
    """Runs a command until so many chunks are committed, and a moment more; returns whether it was still running."""
    process = subprocess.Popen(
        command(*words), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        for _ in range(3000):
            if process.poll() is not None or committed(output) >= chunks:
                break
            time.sleep(0.02)
        time.sleep(delay)
        running = process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return running


@pytest.mark.parametrize("num_kills", tiers(NUM_KILLS, slow=NUM_KILLS[:1]))
def test_killed_and_resumed_on_other_process_counts_it_writes_the_same(run, tmp_path, num_kills):
    source = write(tmp_path / "in.jsonl", enumerate(questions()))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    ended = meshway(*infer(run, source, whole, 1, "--chunk_size=10"))
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(row["index"], row["id"], row["inputs"]) for row in rows] == [(n, n, q) for n, q in enumerate(questions())]
    draw, kills = random.Random(1), 0
    for n in range(num_kills):
        words = infer(run, source, output, (1, 2, 4)[n % 3], "--chunk_size=10")
        before = committed(output)
        kills += killed_at(words, output, before + draw.randint(0, 3), draw.random() * 0.3)
        assert before <= committed(output) <= NUM_CHUNKS and not output.exists()
    assert kills == num_kills and 0 < committed(output) < NUM_CHUNKS
    ended = meshway(*infer(run, source, output, 2, "--chunk_size=10"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert output.read_bytes() == whole.read_bytes()
    again = meshway(*infer(run, source, output, 4, "--chunk_size=10"))
    assert again.returncode == 0 and "finished" in again.stdout + again.stderr


@pytest.mark.proofs
def test_a_prediction_depends_on_its_example_alone(run, tmp_path):
    texts = list(enumerate(questions()))
    shuffled = random.Random(2).sample(texts, len(texts))
    ways = {
        "as it is": (texts, 1, ()),
        "in another order": (shuffled, 1, ()),
        "without most neighbours": (texts[::7], 1, ()),
        "in other chunks": (texts, 1, ("--chunk_size=37",)),
        "in other batches": (texts, 1, ("--batch_size=24",)),
        "in other buckets": (texts, 1, ("--max_input_length=100",)),
        "on two processes": (texts, 2, ()),
    }
    found = {}
    for number, (name, (given, processes, words)) in enumerate(ways.items()):
        source, output = write(tmp_path / f"{number}.jsonl", given), tmp_path / f"{number}.out.jsonl"
        ended = meshway(*infer(run, source, output, processes, *words))
        assert ended.returncode == 0, ended.stdout + ended.stderr
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert [row["index"] for row in rows] == list(range(len(given)))
        found[name] = {row["id"]: {k: v for k, v in row.items() if k != "index"} for row in rows}
    first = found.pop("as it is")
    assert len({row["prediction"] for row in first.values()}) > 100, "predictions differ among examples"
    same_shapes = ("in another order", "without most neighbours", "in other chunks", "on two processes")
    for name, rows in found.items():
        for n, row in rows.items():
            if name in same_shapes:
                assert row == first[n], f"{name}: example {n}"
            assert row["prediction"] == first[n]["prediction"], f"{name}: example {n}"
            assert row["score"] == pytest.approx(first[n]["score"], rel=1e-3), f"{name}: example {n}"
