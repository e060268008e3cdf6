import subprocess
import sys

import pytest

from meshway.tasks.registry import cache_directory, cached_file


def test_the_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MESHWAY_CACHE_DIR", raising=False)
    assert cache_directory() == tmp_path / "meshway"
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_a_file_is_made_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "new"))
    path = cached_file("x.bin", lambda: b"first")
    assert cached_file("x.bin", lambda: b"second") == path
    assert path.read_bytes() == b"first"

    def fail():
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        cached_file("y.bin", fail)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.bin"]


def test_a_place_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(ValueError, match="set MESHWAY_CACHE_DIR"):
        cached_file("x.bin", lambda: b"")


@pytest.mark.slow
def test_processes_that_race_all_succeed_and_leave_one_whole_file(monkeypatch, tmp_path):
    code = """if True:
        import pathlib, sys, time
        from meshway.tasks.registry import cached_file
        here = pathlib.Path(sys.argv[1])

        def make():
            (here / sys.argv[2]).touch()
            while len(list(here.glob("racer*"))) < 2:  # both are making the file at once
                time.sleep(0.01)
            return b"x" * 1_000_000

        assert len(cached_file("model", make).read_bytes()) == 1_000_000
    """
    monkeypatch.setenv("MESHWAY_CACHE_DIR", str(tmp_path / "cache"))
    racers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), f"racer{i}"]) for i in range(2)]
    assert [racer.wait(timeout=60) for racer in racers] == [0, 0]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["model"]
