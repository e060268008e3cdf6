import subprocess
import sys

import pytest

from meshway.framework.errors import UserError
from meshway.framework.evaluation.records import Claims


def test_a_claim_is_held_by_one_and_leaves_nothing(tmp_path):
    one, other = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    with one.take("10") as held:
        assert held
        with other.take("10") as too:
            assert not too
        with other.take("20") as beside:
            assert beside
    assert not list((tmp_path / "claims").iterdir())
    with other.take("10") as held:
        assert held


def test_a_claim_is_given_back_when_work_fails(tmp_path):
    claims = Claims(tmp_path)
    with pytest.raises(KeyError), claims.take("10"):
        raise KeyError
    with claims.take("10") as held:
        assert held


HEAD = """
import pathlib, sys, time
from meshway.framework.evaluation.records import Claims
claims = Claims(pathlib.Path(sys.argv[1]))
"""
HOLD = """
with claims.take("10") as held:
    print(held, flush=True)
    time.sleep(60)
"""
COUNT = """
path, done = pathlib.Path(sys.argv[2]), 0
while done < 300:
    with claims.take("10") as held:
        if held:
            number = int(path.read_text())
            path.write_text(str(number + 1))
            done += 1
"""


def start(program, *arguments):
    words = [sys.executable, "-c", HEAD + program, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_a_killed_holder_loses_its_claim(tmp_path):
    holder = start(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "True\n"
        with Claims(tmp_path).take("10") as held:
            assert not held
    finally:
        holder.kill()
        holder.wait()
    with Claims(tmp_path).take("10") as held:
        assert held


def test_files_that_come_and_go_let_no_two_in(tmp_path):
    """A holder removes the file that another has just opened: that one must not take the lock for the claim."""
    path = tmp_path / "number"
    path.write_text("0")
    counters = [start(COUNT, tmp_path / "claims", path) for _ in range(3)]
    assert [counter.wait(60) for counter in counters] == [0, 0, 0]
    assert path.read_text() == "900"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), Claims(tmp_path / "file").take("10"):
        pass
