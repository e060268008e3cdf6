"""Attempts at a run: who is blamed, who is ended, what is tried again. The processes are small scripts."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from running import environment

from meshway.framework.distributed import watch
from meshway.framework.distributed.watch import LOST_A_PEER
from meshway.framework.errors import UserError
from meshway.launch.cluster import job, supervisor
from meshway.launch.cluster.supervisor import Child, Children

# What a process does, by attempt and place; `words` are: a folder that counts the attempts, and a script.
SCRIPT = """
import os, pathlib, signal, sys, time
folder, script = pathlib.Path(sys.argv[1]), sys.argv[2]
options = dict(word[2:].split("=") for word in sys.argv[3:])
process = int(options.get("process_id", 0))
attempt = len(list(folder.glob(f"began-{process}-*")))
(folder / f"began-{process}-{attempt}").write_text(repr(options))
def lost(): print("meshway: process 1 is missing", flush=True); os._exit(75)
exec(script)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(job, "command", lambda words: [sys.executable, "-c", SCRIPT, *words])
    monkeypatch.setattr(supervisor, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("MESHWAY_HEARTBEAT_SECONDS", "0.5")
    monkeypatch.setattr("meshway.launch.cluster.supervisor._TERM_SECONDS", 0.3)
    monkeypatch.setattr("meshway.launch.cluster.supervisor._LAST_WORDS_SECONDS", 1.0)


def began(folder, process=0):
    return len(list(folder.glob(f"began-{process}-*")))


def run(tmp_path, script, processes=3, **options):
    return supervisor.run_local([str(tmp_path), script], processes, 1, log_dir=str(tmp_path / "logs"), **options)


def test_a_run_that_goes_well_is_run_once(tmp_path, capfd):
    assert run(tmp_path, "print('said by', process)", restarts=3) == 0
    assert [began(tmp_path, process) for process in range(3)] == [1, 1, 1]
    heard = capfd.readouterr().out
    assert "said by 0" in heard and "said by 1" not in heard, "process 0 speaks"
    assert "said by 1" in (tmp_path / "logs" / "process_1.log").read_text()
    assert "said by 0" in (tmp_path / "logs" / "process_0.log").read_text()


class Slow(io.TextIOWrapper):
    """An output that is read slowly, and has no letters but English ones."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", write_through=True)

    def flush(self):
        time.sleep(0.5)


@pytest.mark.parametrize("held", [False, True])
def test_what_a_process_said_last_is_read_before_it_is_told(tmp_path, monkeypatch, capfd, held):
    """It has ended while its first words are still on their way, or its output is held by a child that it leaves."""
    monkeypatch.setattr(sys, "stdout", Slow())
    child = "import subprocess; subprocess.Popen(['sleep', '5']); " if held else ""
    script = child + "print('tâche ...', flush=True); time.sleep(0.1); print('meshway: error: no task', flush=True)"
    assert run(tmp_path, f"{script}; sys.exit(2)", processes=1) == 2
    assert "meshway: process 0 exited with 2 (error: no task)" in capfd.readouterr().err
    assert "tâche" in (tmp_path / "logs" / "process_0.log").read_text()


def test_where_stacks_are_is_not_why_a_process_ended(tmp_path, monkeypatch, capfd):
    child = Child(0, [], tmp_path / "log", code=75)
    monkeypatch.setenv("MESHWAY_STACKS", str(child.log))
    child.log.write_text("meshway: process 0 of 2 stops: process 1 is missing\n")
    watch.dump_stacks()
    with child.log.open("a") as log:
        log.write(capfd.readouterr().err)
    assert child.outcome() == "process 0 exited with 75 (process 0 of 2 stops: process 1 is missing)"


def test_a_killed_process_is_named_and_all_start_again(tmp_path, capfd):
    script = "if attempt == 0: os.kill(os.getpid(), signal.SIGKILL) if process == 1 else lost()"
    assert run(tmp_path, script, restarts=1) == 0
    assert [began(tmp_path, process) for process in range(3)] == [2, 2, 2]
    said = capfd.readouterr().err
    assert "attempt 1 of 2 ended" in said and "process 1 was killed by SIGKILL; process " in said
    assert "process 1 is missing" in said and "restarts left: 0" in said


def test_a_hung_process_is_ended_by_force(tmp_path, capfd):
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if process == 1: time.sleep(600)
lost()
"""
    assert run(tmp_path, script, restarts=0) == LOST_A_PEER
    assert "process 1 did not end with the others and was killed" in capfd.readouterr().err


def test_a_users_mistake_is_not_tried_again(tmp_path):
    assert run(tmp_path, "sys.exit(2) if process == 1 else lost()", restarts=5) == 2
    assert began(tmp_path) == 1


@pytest.mark.parametrize(("script", "code"), [("sys.exit(1)", 1), ("os.kill(os.getpid(), 9)", 137), ("lost()", 75)])
def test_the_last_code_is_that_of_the_run(tmp_path, script, code):
    assert run(tmp_path, script, restarts=2, processes=2) == code
    assert began(tmp_path) == 3


def test_elastic_attempts_have_fewer_processes(tmp_path):
    assert run(tmp_path, "sys.exit(1 if attempt < 3 else 0)", restarts=5, processes=4, elastic=True) == 0
    assert [began(tmp_path, process) for process in range(4)] == [4, 2, 1, 1]
    assert "num_processes" not in (tmp_path / "began-0-2").read_text(), "one process needs no others"
    assert supervisor.process_counts(12) == [12, 6, 4, 3, 2, 1]
    with pytest.raises(UserError, match="--elastic has no effect without --restarts=N"):
        run(tmp_path, "", restarts=0, processes=4, elastic=True)


def test_each_attempt_says_where_it_goes_on(tmp_path, capfd):
    script = "os.makedirs(folder / 'checkpoints' / str(10 * (attempt + 1))); sys.exit(1)"
    (tmp_path / "checkpoints" / "90.orbax-checkpoint-tmp").mkdir(parents=True)
    words = [str(tmp_path), script, f"--gin.MODEL_DIR={tmp_path}"]
    assert supervisor.run_local(words, 1, 1, restarts=1) == 1
    assert "starting again, from step 10; restarts left: 0" in capfd.readouterr().err
    assert (tmp_path / "logs" / "process_0.log").exists()


def test_a_supervisor_of_one_process(tmp_path, capfd):
    assert supervisor.supervise([str(tmp_path), "sys.exit(1 if attempt == 0 else 0)"], restarts=3) == 0
    assert began(tmp_path) == 2
    assert "process 0 exited with 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("kind", "number", "code"),
    [
        ("local", signal.SIGTERM, 0),
        ("local", signal.SIGINT, 130),
        ("supervise", signal.SIGTERM, 143),
        ("supervise", signal.SIGINT, 130),
    ],
)
def test_a_signal_is_handed_on_as_sigterm(tmp_path, kind, number, code):
    """A cluster that takes a host away must not take the run for done; a person who stops it may."""
    script = "signal.signal(15, lambda *_: sys.exit(0)); (folder / f'up-{process}').touch(); time.sleep(600)"
    call = "supervisor.run_local(words, 2, 1, restarts=3)" if kind == "local" else "supervisor.supervise(words, 3)"
    program = f"""
import sys
from meshway.launch.cluster import job, supervisor
job.command = lambda words: [sys.executable, "-c", {SCRIPT!r}, *words]
words = [{str(tmp_path)!r}, {script!r}]
sys.exit({call})
"""
    started = subprocess.Popen([sys.executable, "-c", program], env=environment())
    try:
        while len(list(tmp_path.glob("up-*"))) < (2 if kind == "local" else 1) and started.poll() is None:
            time.sleep(0.05)
        started.send_signal(number)
        assert started.wait(60) == code
    finally:
        started.kill()
    assert began(tmp_path) == 1


def test_wrong_numbers():
    for options in ({"processes": 0}, {"devices": 0}, {"restarts": -1}):
        with pytest.raises(UserError, match="must be at least"):
            supervisor.run_local(["train"], **{"processes": 1, "devices": 1, **options})


def test_causes_come_before_consequences():
    def ended(*codes):
        children = Children([], os.environ, 1.0)
        children.ended = [Child(index, [], code=code) for index, code in codes]
        return children

    assert supervisor.verdict(ended((0, 75), (1, -9), (2, 75))) == (
        137, "process 1 was killed by SIGKILL; process 0 exited with 75",
    )  # fmt: skip
    assert supervisor.verdict(ended((0, -9), (1, 2)))[0] == 2
    assert supervisor.verdict(ended((0, 0), (1, 0))) == (0, "")
