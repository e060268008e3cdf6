"""Killed at any moment and started again, a job leaves what an undisturbed one leaves."""

import contextlib
import itertools
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from crashes import Disk
from tiers import tiers

from meshway.framework.inference.bulk.inputs import Share
from meshway.framework.inference.bulk.store import ChunkStore

JOB = {"recipe": "abc", "step": "100"}
NUM_CHUNKS = 3
OUTPUTS = [("out.jsonl", None), ("out.parquet", None), ("out.txt", None), ("folder", "jsonl"), ("folder", "parquet")]


def outputs(*quick: int) -> list:
    """The outputs, all but some left to the slow tests."""
    return [
        output if number in quick else pytest.param(*output, marks=pytest.mark.slow)
        for number, output in enumerate(OUTPUTS)
    ]


def rows(number: int) -> list[dict]:
    """The second chunk has no rows, and the third's are of other types than the first's."""
    made = {0: [{"prediction": "a\n"}], 1: [], 2: [{"prediction": "b", "scores": [0.5]}, {"prediction": None}]}
    return made[number % NUM_CHUNKS]


def run(
    output: Path, format: str | None, num_chunks: int = NUM_CHUNKS, job=JOB, overwrite: bool = False, share=Share()
) -> int:
    """The loop of a job, or of a share: what is committed is not made again. Returns how many chunks were made."""
    made = 0
    chunks = ChunkStore(output, job, format, overwrite, share)
    try:
        chunks.open()
        if not chunks.finished:
            done = chunks.committed()
            for number in range(num_chunks):
                if number not in done and share.owns(number):
                    chunks.commit(number, rows(number), f"digest {number}", {"tokens": number}, [])
                    made += 1
            if not chunks.missing([f"digest {number}" for number in range(num_chunks)]) and not chunks.finished:
                chunks.finish(num_chunks, {"mode": "predict"})
    finally:
        chunks.close()
    return made


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("name, format", outputs(0, 3, 4))
def test_after_a_crash_at_every_step_a_rerun_ends_the_same(tmp_path, disk, name, format):
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole / name, format)
    expected = tree(whole)
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        with disk.crashing(step) as crashed:
            run(folder / name, format)
        # A second crash, at another step of what the rerun does.
        with disk.crashing(step % 7):
            run(folder / name, format)
        left = [path.split("/")[-1] for path in tree(folder)]
        with disk.crashing(-1):
            made = run(folder / name, format)
        assert tree(folder) == expected, step
        summed_up = any(path.endswith("summary.json") for path in left)
        sides = [path for path in left if path.startswith("chunk-") and path.endswith(".json")]
        assert made == (0 if summed_up else NUM_CHUNKS - len(sides)), step
        with disk.crashing(-1):
            assert run(folder / name, format) == 0
        assert tree(folder) == expected, step
        if not crashed:
            break
    assert step > 30


@pytest.mark.parametrize("name, format", tiers([OUTPUTS[0], OUTPUTS[4]], slow=[OUTPUTS[0]]))
def test_after_a_crash_at_every_step_of_a_share_the_shares_end_as_a_whole(tmp_path, disk, name, format):
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole" / name, format)
    expected = tree(tmp_path / "whole")
    for step in itertools.count():
        unhurt = []
        for hurt in (0, 1):  # the one that makes the result, or the other
            folder = tmp_path / f"{step}, {hurt}"
            folder.mkdir()
            for index in (1, 0):
                with disk.crashing(step if index == hurt else -1) as crashed:
                    run(folder / name, format, share=Share(index, 2))
                unhurt.append(not crashed)
            with disk.crashing(-1):
                run(folder / name, format, share=Share(hurt, 2))
            assert tree(folder) == expected, (step, hurt)
        if all(unhurt):
            break
    assert step > 20


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("name, format", outputs(0, 3))
def test_after_a_crash_at_every_step_of_overwriting_a_rerun_ends_the_same(tmp_path, disk, name, format, finished):
    whole = tmp_path / "whole"
    whole.mkdir()
    run(whole / name, format)
    expected = tree(whole)
    other = {**JOB, "step": "90"}
    # What is overwritten: another job's result, or what a crash in the midst of its finish has left.
    crash = -1 if finished else step_of_finish(tmp_path, disk, name, format)
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        with disk.crashing(crash):
            run(folder / name, format, num_chunks=2, job=other)
        with disk.crashing(step) as crashed:
            run(folder / name, format, overwrite=True)
        with disk.crashing(-1):
            run(folder / name, format, overwrite=True)
        assert tree(folder) == expected, step
        if not crashed:
            break
    assert step > 30


def step_of_finish(folder: Path, disk, name: str, format: str | None) -> int:
    """Returns at which step of a job of two chunks to crash, to leave (a part of) the result without summary."""
    for step in itertools.count():
        place = folder / f"finish {step}"
        place.mkdir()
        with disk.crashing(step):
            run(place / name, format, num_chunks=2)
        left = {path.split("/")[-1] for path in tree(place)}
        if left & {name if format is None else f"part-00000-of-00002.{format}"}:
            assert not any(path.endswith("summary.json") for path in left)
            return step
    raise AssertionError


def test_after_a_crash_at_every_step_of_replacing_a_chunk_it_is_the_old_or_the_new(tmp_path, disk):
    made = {"old": [{"prediction": "old"}], "new": [{"prediction": "new"}]}

    def commit(output: Path, digest: str) -> None:
        with contextlib.closing(ChunkStore(output, JOB, overwrite=True)) as chunks:
            chunks.open()
            chunks.commit(0, made[digest], digest, {}, [])

    found = set()
    for step in itertools.count():
        output = tmp_path / str(step) / "out.jsonl"
        output.parent.mkdir()
        with disk.crashing(-1):
            commit(output, "old")
        with disk.crashing(step) as crashed:
            commit(output, "new")
        with disk.crashing(-1), contextlib.closing(ChunkStore(output, JOB)) as chunks:
            chunks.open()
            digests = [chunk.digest for chunk in chunks.committed().values()]
            found.add(tuple(digests))
            if digests:
                chunks.finish(1, {})
                assert output.read_text() == f'{{"prediction":"{digests[0]}"}}\n'
        if not crashed:
            break
    assert found == {("old",), (), ("new",)}


PROGRAM = """
    import sys

    from meshway.framework.inference.bulk.inputs import Share
    from meshway.framework.inference.bulk.store import ChunkStore

    def work(opened, share):
        chunks = ChunkStore({output!r}, {job!r}, {format!r}, share=share)
        chunks.open()
        opened()
        if not chunks.finished:
            done = chunks.committed()
            for number in range({num_chunks}):
                if number not in done and share.owns(number):
                    rows = [{{"index": i, "prediction": f"text {{i}}" * 20, "scores": [i / 7]}} for i in range(50)]
                    chunks.commit(number, rows, str(number), {{"rows": 50}}, [])
            if not chunks.missing([str(number) for number in range({num_chunks})]) and not chunks.finished:
                chunks.finish({num_chunks}, {{}})
        chunks.close()
"""
SHARE = """
    work(lambda: None, Share(*map(int, sys.argv[1:])))
"""
# Processes forked of one that has imported what they need: a start of Python takes far longer than their work.
KILLS = """
    import os, random, signal, time, traceback
    import pyarrow.parquet

    kills, seed = map(int, sys.argv[1:])
    moments = random.Random(seed)
    for kill in range(kills + 1):
        is_open, opening = os.pipe()
        process = os.fork()
        if not process:
            try:
                work(lambda: os.write(opening, b"x"), Share())
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(opening)
        assert os.read(is_open, 1) == b"x"
        os.close(is_open)
        if kill < kills:
            time.sleep(moments.random() ** 2 / 10)
            os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in ((0, -signal.SIGKILL) if kill < kills else (0,)), code
        print(code)
"""


def program(output: Path, format: str | None, num_chunks: int, rest: str) -> str:
    made = textwrap.dedent(PROGRAM).format(output=str(output), job=JOB, format=format, num_chunks=num_chunks)
    return made + textwrap.dedent(rest)


def killed_until_done(folder: Path, name: str, format: str | None, num_chunks: int, kills: int, seed: int) -> list[str]:
    """Runs a job in processes that are killed at random moments; the last one is left in peace. Returns their codes."""
    words = [sys.executable, "-c", program(folder / name, format, num_chunks, KILLS), str(kills), str(seed)]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout.split()


FEW = [("out.jsonl", None, 40, 4), ("folder", "jsonl", 40, 4)]
SOME = [("out.parquet", None, 120, 15), ("folder", "parquet", 120, 15)]
MANY = [(name, format, 300, 60) for name, format in OUTPUTS if name != "out.txt"]


@pytest.mark.parametrize("name, format, num_chunks, kills", tiers([*FEW, *SOME, *MANY], slow=FEW))
def test_kill_9_at_random_moments_changes_nothing(tmp_path, name, format, num_chunks, kills):
    for folder, times in (("whole", 0), ("killed", kills)):
        (tmp_path / folder).mkdir()
        codes = killed_until_done(tmp_path / folder, name, format, num_chunks, times, seed=kills)
    assert codes.count("-9") > kills / 4  # others were done before
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


@pytest.mark.proofs
@pytest.mark.parametrize("name, format", [OUTPUTS[0], OUTPUTS[4]])
def test_shares_that_are_killed_while_others_work_end_as_a_whole(tmp_path, name, format):
    (tmp_path / "whole").mkdir()
    (tmp_path / "shared").mkdir()
    killed_until_done(tmp_path / "whole", name, format, 60, 0, seed=0)
    source = program(tmp_path / "shared" / name, format, 60, SHARE)
    moments = random.Random(0)
    for is_last in (False, False, True):
        shares = [subprocess.Popen([sys.executable, "-c", source, str(n), "2"]) for n in range(2)]
        try:
            if not is_last:
                time.sleep(2 + moments.random())
                shares[moments.randrange(2)].kill()
            codes = [share.wait(120) for share in shares]
            assert is_last <= (codes == [0, 0])
        finally:
            for share in shares:
                share.kill()
                share.wait()
    assert tree(tmp_path / "shared") == tree(tmp_path / "whole")
