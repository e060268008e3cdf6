"""Files in a bucket: written whole, grown by lines, claimed, and requests that fail."""

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from buckets import BUCKET, Proxy, emulator, on, variables

from meshway.framework.buckets import claims, client, objects
from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.stored import StoredParams
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.evaluation.records import COMMITTED, complete_steps
from meshway.framework.files import holder_of, in_bucket, locked, open_path, open_to_append, replace_file
from meshway.framework.telemetry.writers import JsonlWriter, TensorBoardWriter

HOLD = """
import sys, time
from meshway.framework.files import locked, open_path
with locked(open_path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def address():
    with emulator() as address, on(address):
        yield address


@pytest.fixture
def folder(address, request):
    return open_path(f"gs://{BUCKET}/{request.node.name}")


def test_a_path_in_a_bucket_has_the_methods_of_a_local_one(folder):
    assert in_bucket(folder) and not folder.exists() and not folder.is_dir() and list(folder.iterdir()) == []
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a.txt", "eval/one.jsonl", "eval/two.jsonl", "eval/two.predictions/5.jsonl"):
        replace_file(folder / name, lambda file, name=name: file.write(name.encode()))
    assert folder.is_dir() and not folder.is_file() and (folder / "a.txt").is_file()
    assert {path.name for path in folder.iterdir()} == {"a.txt", "eval"}
    assert [path.stem for path in sorted((folder / "eval").glob("*.jsonl"))] == ["one", "two"]
    assert [path.name for path in folder.glob("*/two.jsonl")] == ["two.jsonl"]
    assert len(list(folder.rglob("*.jsonl"))) == 3
    assert (folder / "eval/one.jsonl").read_text("utf-8") == "eval/one.jsonl"
    with (folder / "a.txt").open("rb") as file:
        assert file.read() == b"a.txt"
    assert str((folder / "a.txt").relative_to(folder)) == "a.txt" and (folder / "a.txt").parent == folder
    assert folder.resolve() == folder.absolute() == folder
    other = (folder / "eval").rename(folder / "aside")
    assert len(list(other.rglob("*"))) == 3 and not (folder / "eval").exists()
    other.rmtree()
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    with pytest.raises(FileNotFoundError):
        other.rmtree()
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gs:/typo", "did you mean gs://typo"),
        ("gs://a/run", "'a' cannot be the name of a bucket"),
        ("gs://Bucket/run", "cannot be the name of a bucket"),
        ("gs://bucket//run", "no empty part"),
        ("gs://bucket/../run", "no empty part, '.' or '..'"),
        ("hdfs://host/run", "is not a local path"),
    ],
)
def test_what_is_no_address_of_a_bucket_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        open_path(text)


def test_a_local_path_that_looks_like_a_bucket_is_local():
    assert not in_bucket(open_path("bucket/run")) and not in_bucket(open_path("gs/bucket"))


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(objects, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'meshway\[gcs\]'"):
        open_path("gs://bucket/run")


def test_a_log_holds_back_what_comes_fast_and_writes_all_when_it_is_flushed(folder, monkeypatch):
    monkeypatch.setattr(objects, "_LOG_SECONDS", 1000.0)
    log = open_to_append(folder / "log")
    for number in range(5):
        log.write(b"%d\n" % number)
    assert (folder / "log").read_bytes() == b"0\n", "the rest would be one write of the whole object each"
    log.flush()
    assert (folder / "log").read_bytes() == b"0\n1\n2\n3\n4\n"
    log.write(b"5\n")
    log.close()
    again = open_to_append(folder / "log")
    again.write(b"6\n")
    assert (folder / "log").read_bytes() == b"0\n1\n2\n3\n4\n5\n6\n"
    log.write(b"7\n")
    with pytest.raises(EnvironmentFailure, match="written by another process too"):
        log.flush()
    assert (folder / "log").read_bytes().endswith(b"6\n"), "nothing of either is lost"


def test_reports_of_a_run_appear_once_after_it_went_back(folder, monkeypatch):
    monkeypatch.setattr(objects, "_LOG_SECONDS", 1000.0)
    first = JsonlWriter(str(folder / "metrics.jsonl"))
    for step in (5, 10, 15):
        first.write(step, {"loss": 1.0})
    first.flush()  # and then killed
    second = JsonlWriter(folder / "metrics.jsonl", start_step=10)
    for step in (15, 20):
        second.write(step, {"loss": 2.0})
    second.close()
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in found] == [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0)]


def test_events_for_tensorboard_are_those_of_a_local_folder(folder, tmp_path):
    contents = []
    for where in (folder, tmp_path):
        writer = TensorBoardWriter(where)
        writer.write(3, {"loss": 1.5})
        writer.close()
        (path,) = where.iterdir()
        assert path.name.startswith("events.out.tfevents.")
        contents.append(path.read_bytes())
    assert len(contents[0]) == len(contents[1]) > 100  # they differ in their times alone


def test_a_claim_names_its_holder_and_is_taken_over_once_that_is_killed(folder, address):
    path = folder / ".lock"
    environment = os.environ | variables(address)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout.readline() == "True\n"
        assert holder_of(path).pid == process.pid and abs(holder_of(path).since - time.time()) < 60
        with locked(path) as held:
            assert not held
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists() and holder_of(path) is None
    with locked(path) as held:
        assert held and holder_of(path).pid == os.getpid()
    assert holder_of(path) is None and not path.exists()


@pytest.fixture
def elsewhere(monkeypatch):
    """Claims of this process look as if made on another machine, and a second is a minute."""
    monkeypatch.setattr(claims, "_is_same_machine", lambda said: False)
    monkeypatch.setattr(claims, "EXPIRES_SECONDS", 2.0)
    monkeypatch.setattr(claims, "RENEWED_SECONDS", 0.3)
    monkeypatch.setattr(claims, "_POLL_SECONDS", 0.1)


HOLDER = {"host": "far", "pid": 1, "since": 0.0}


def test_a_claim_of_another_machine_is_refused_while_it_is_renewed(folder, elsewhere):
    held = claims.Claim.take(folder / ".lock", HOLDER)
    assert claims.Claim.take(folder / ".lock", HOLDER) is None
    held.close()
    with locked(folder / ".lock") as free:
        assert free


def test_a_claim_of_another_machine_is_taken_over_once_it_expires_and_the_old_holder_writes_no_more(folder, elsewhere):
    path = folder / ".lock"
    first = claims.Claim.take(path, HOLDER)
    first._ended.set()  # as if its machine had stopped
    first._thread.join()
    second = claims.Claim.take(path, HOLDER | {"host": "near"})
    assert second is not None and holder_of(path).host == "near"
    first._ended.clear()
    first._renew()  # and had come back
    with pytest.raises(EnvironmentFailure, match="another one's now"):
        replace_file(folder / "metrics.jsonl", b"late")
    assert not (folder / "metrics.jsonl").exists()
    first.close()
    second.close()


@pytest.mark.parametrize("status", [503, 429, 0])
def test_requests_that_fail_for_a_while_are_repeated_and_counted(address, status):
    failed = []

    def fault(method, path):
        if len(failed) < 2 and "/o" in path:
            failed.append(path)
            return status
        return None

    with Proxy(address, fault) as proxy, on(proxy.address):
        before = client.num_repeated()
        log = open_to_append(open_path(f"gs://{BUCKET}/faults-{status}/log"))
        log.write(b"a\n")
        log.close()
        assert (open_path(f"gs://{BUCKET}/faults-{status}/log")).read_bytes() == b"a\n"
        # The library itself repeats, unseen, a request whose connection is cut.
        assert len(failed) == 2 and client.num_repeated() - before in ((1, 2) if status == 0 else (2,))


def test_a_write_whose_answer_is_lost_is_no_other_process(address):
    path = open_path(f"gs://{BUCKET}/lost/log")
    first = objects.put(path, b"a", 0)
    second = objects.put(path, b"ab", first)
    assert objects.put(path, b"ab", first) == second, "the same request again finds its own effect"
    with pytest.raises(objects.Replaced):
        objects.put(path, b"abc", first)


@pytest.mark.parametrize(
    ("status", "says"), [(403, "storage.objectUser"), (401, "wants credentials"), (400, "the store refuses")]
)
def test_what_is_refused_for_good_is_one_message_at_once(address, status, says):
    with Proxy(address, lambda method, path: status) as proxy, on(proxy.address):
        with pytest.raises(UserError, match=says):
            replace_file(open_path(f"gs://{BUCKET}/run/a"), b"a")
        assert len(proxy.requests) == 1, "it was not repeated"


def test_a_bucket_that_does_not_exist_is_named(address):
    path = open_path("gs://no-such-bucket/run")
    for call in (path.is_dir, path.exists, lambda: replace_file(path, b"a"), lambda: list(path.iterdir())):
        with pytest.raises(UserError, match="there is no bucket 'no-such-bucket'"):
            call()


def test_a_checkpoint_in_a_bucket_counts_once_its_last_file_is_there(folder):
    checkpoints, params = Checkpoints(folder / "checkpoints"), {"a": {"kernel": jnp.arange(12.0).reshape(3, 4)}}
    for step in (1, 2):
        checkpoints.save_params(params, step)
    checkpoints.close()
    assert complete_steps(folder / "checkpoints") == [1, 2]
    (folder / "checkpoints" / "2" / COMMITTED).unlink()  # as if killed before that
    assert complete_steps(folder / "checkpoints") == [1]
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.steps() == [1]
    stored = StoredParams(folder / "checkpoints" / "1" / "state", checkpoints.recipe(1)["schema"])
    np.testing.assert_array_equal(stored.value("a/kernel"), params["a"]["kernel"])
    kept = checkpoints.set_aside(1)
    assert kept.name == "1.damaged" and (kept / "state").is_dir() and checkpoints.steps() == []
    checkpoints.close()


def test_a_store_that_never_answers_is_a_failure_of_the_machine(address, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(client, "_passes", lambda error: True)
    path = open_path(f"gs://{BUCKET}/run/a")
    with Proxy(address, lambda method, path: 400) as proxy, on(proxy.address):
        pytest.raises(EnvironmentFailure, path.read_bytes).match("has not answered for")
