"""Locks: held by one process, given back however it ends, and a name for who holds them."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from meshway.framework.errors import UserError
from meshway.framework.files import holder_of, local_path, locked, try_lock
from meshway.framework.training.run_directory import RunDirectory

HOLD = """
import pathlib, sys, time
from meshway.framework.files import locked
with locked(pathlib.Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "True\n"
        holder = holder_of(path)
        assert holder.pid == process.pid and abs(holder.since - time.time()) < 60
        assert f"process {process.pid} on {holder.host}, since 20" in str(holder)
        with locked(path) as held:
            assert not held
        assert holder_of(path) == holder, "asking changes nothing"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert holder_of(path) is None
    with locked(path) as held:
        assert held and holder_of(path).pid == os.getpid()
    assert holder_of(path) is None and not path.exists()


def test_a_lock_whose_file_was_removed_meanwhile_is_not_held(tmp_path, monkeypatch):
    """The holder removes its file while another process has opened it already."""
    path, removed = tmp_path / "lock", []

    def opened(*arguments, original=os.open):
        descriptor = original(*arguments)
        if not removed:
            removed.append(path.unlink())
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    lock = try_lock(path)
    assert os.path.samestat(os.fstat(lock), os.stat(path))
    os.close(lock)


def test_who_asks_for_the_holder_keeps_nobody_out(tmp_path, monkeypatch):
    """As `meshway status`, run every second, at the very moment at which a supervisor starts a run again."""
    path = tmp_path / "lock"
    path.touch()
    with open(path) as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        with open(path) as too:
            fcntl.flock(too, fcntl.LOCK_SH)
            waits = iter([lambda: None, too.close, asking.close])
            monkeypatch.setattr(time, "sleep", lambda seconds: next(waits)())
            lock = try_lock(path)
    assert lock is not None and next(waits, None) is None and holder_of(path).pid == os.getpid()
    os.close(lock)


@pytest.mark.parametrize("content", [b"", b"17", b'{"pid": 3}', b"\xff"])
def test_a_holder_that_does_not_tell(tmp_path, content):
    lock = try_lock(tmp_path / "lock")
    (tmp_path / "lock").write_bytes(content)
    assert holder_of(tmp_path / "lock") is None
    os.close(lock)


@pytest.mark.parametrize(
    "path, message",
    [
        ("runs/" + "é" * 128, r"^é{20}\.\.\. is a name of 256 bytes, and a file or folder may have 255: give"),
        ("/".join(["runs"] * 900), r"runs/runs.*\.\.\. is a path of more than 4095 bytes: give a shorter one"),
        ("runs/\0mine", r"'runs/\\x00mine' is not a path: it has a null character"),
    ],
)
def test_a_path_that_no_file_system_takes_is_refused(path, message):
    with pytest.raises(UserError, match=message):
        local_path(path)
    assert local_path("runs/" + "é" * 127).name == "é" * 127


def test_a_refused_training_leaves_no_folder(tmp_path):
    def refused(root, *more):
        with pytest.raises(UserError, match="no such thing"), RunDirectory(root).held():
            RunDirectory(root).checkpoints.mkdir(exist_ok=True)
            for name in more:
                (root / name).mkdir(parents=True)
            raise UserError("no such thing")

    refused(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refused(tmp_path / "begun", "checkpoints/10")
    assert (tmp_path / "begun" / "checkpoints" / "10").is_dir()
    (tmp_path / "own").mkdir()
    refused(tmp_path / "own")
    assert list((tmp_path / "own").iterdir()) == []
    with pytest.raises(OSError), RunDirectory(tmp_path / "failed").held():
        RunDirectory(tmp_path / "failed").checkpoints.mkdir()
        raise OSError("a machine's failure is tried again in the same folder")
    assert (tmp_path / "failed" / "checkpoints").is_dir()


def test_a_second_training_of_a_run_directory_is_refused_by_name(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with directory.held():
        with (
            pytest.raises(UserError, match=f"is being trained by process {os.getpid()} on .*, since 20"),
            directory.held(),
        ):
            pass
        assert holder_of(directory.lock).pid == os.getpid()
    with directory.held():
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be written.*--gin.MODEL_DIR"),
        RunDirectory(tmp_path / "file/run").held(),
    ):
        pass
