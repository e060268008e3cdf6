import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshway.framework.errors import UserError
from meshway.framework.telemetry import timeline
from meshway.framework.telemetry.timeline import PHASES, Timeline, parse_line, process_began, read_goodput


class Clock:
    """Time as a test wants it; the wall clock may be put forward or back on its own."""

    def __init__(self) -> None:
        self.now, self.shift = 1000.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9 + self.shift


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timeline, "time", SimpleNamespace(time=clock.time, perf_counter=clock.perf_counter))
    return clock


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_second_is_of_one_phase(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "run" / "timeline.jsonl"
    with Timeline(path, 40, began=clock.time() - 3) as line:
        clock.now += 2
        line.mark("ready")
        with line.phase("compile"):
            clock.now += 7
        line.mark("compiled", devices=8)
        with line.phase("training"):
            clock.now += 10
            line.move(4, "data_wait")
            line.reached(45)
            with line.phase("checkpoint"):
                clock.now += 0.5
                clock.shift -= 3600  # the wall clock is put back: no phase loses an hour
            clock.now += 1
            line.mark("report", 44)
        line.outcome = "stopped"
    lines = written(path)
    assert [line["event"] for line in lines] == ["ready", "compiled", "report", "end"]
    for line in lines:
        assert list(line["seconds"]) == list(PHASES)
        assert sum(line["seconds"].values()) == pytest.approx(line["time"] - line["began"])
        assert line["began"] == 1e9 + 997 and line["start_step"] == 40
        assert parse_line(json.dumps(line)) == line
    assert lines[0]["seconds"] == dict.fromkeys(PHASES, 0.0) | {"startup": 5.0}
    expected = {"startup": 5.0, "compile": 7.0, "training": 7.0, "data_wait": 4.0, "checkpoint": 0.5, "evaluation": 0.0}
    assert lines[-1]["seconds"] == expected
    assert [line["step"] for line in lines] == [40, 40, 44, 45]
    assert lines[1]["devices"] == 8 and lines[-1]["outcome"] == "stopped"


def test_an_error_is_how_an_attempt_ended(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "timeline.jsonl"
    with pytest.raises(UserError), Timeline(path) as line, line.phase("evaluation"):
        clock.now += 5
        raise UserError("the disk is full\nand more")
    assert written(path)[-1]["outcome"] == "failed: UserError: the disk is full"
    with pytest.raises(KeyboardInterrupt), Timeline(path):
        raise KeyboardInterrupt
    assert written(path)[-1]["outcome"] == "failed: KeyboardInterrupt"
    line = Timeline(path)
    line.end("failed: a peer is gone")
    line.end("done")
    assert [line["event"] for line in written(path)] == ["end"] * 3


def test_long_steps_give_a_sign_of_life_once_a_minute(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "timeline.jsonl"
    line = Timeline(path)
    line.mark("ready")
    for step in range(1, 21):
        clock.now += 10
        line.reached(step)
    assert [(line["event"], line["step"]) for line in written(path)] == [("ready", 0), ("alive", 7), ("alive", 14)]


def test_a_second_run_in_one_process_begins_where_the_first_ended(tmp_path: Path, clock: Clock) -> None:
    path, began = tmp_path / "timeline.jsonl", clock.time()
    for _ in range(2):
        clock.now += 50
        with Timeline(path, began=began):
            clock.now += 10
    assert [attempt.began - began for attempt in read_goodput(path).attempts] == [0.0, 60.0]
    assert read_goodput(path).wall == pytest.approx(120.0)


@pytest.mark.parametrize("torn", range(0, 200, 7))
def test_a_torn_line_costs_only_itself(tmp_path: Path, clock: Clock, torn: int) -> None:
    path = tmp_path / "timeline.jsonl"
    line = Timeline(path)
    with line.phase("training"):
        for step in (10, 20, 30):
            clock.now += 10
            line.mark("report", step)
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    path.write_bytes(whole[: len(whole) - last + torn])  # kill -9 while the last line was written
    clock.now += 5
    with Timeline(path, 15) as line, line.phase("training"):
        clock.now += 8
    first, second = read_goodput(path).attempts
    assert (first.seconds["productive"], first.seconds["lost"]) == pytest.approx((15.0, 5.0))
    assert (second.start_step, second.outcome) == (15, "done")
    assert (second.seconds["restart"], second.seconds["productive"]) == pytest.approx((15.0, 8.0))


def test_who_does_not_speak_counts_too_and_writes_nothing(tmp_path: Path, clock: Clock) -> None:
    with Timeline(None) as line, line.phase("evaluation"):
        clock.now += 3
        line.mark("report", 1)
        line.reached(2)
    assert line.seconds()["evaluation"] == 3.0
    assert not list(tmp_path.iterdir())


def test_what_is_no_line_is_none() -> None:
    whole = {"began": 1.0, "time": 2.0, "start_step": 0, "step": 1, "seconds": dict.fromkeys(PHASES, 0.5)}
    assert parse_line(json.dumps(whole)) == whole
    wrong = [{"began": None}, {"time": True}, {"step": 1.5}, {"start_step": -1}, {"seconds": {}}, {"seconds": 3.0}]
    wrong += [{"seconds": whole["seconds"] | {"training": value}} for value in (-1.0, float("nan"), 1e300, "1")]
    for change in wrong:
        assert parse_line(json.dumps(whole | change)) is None, change
    for text in ("", "[]", "null", "{", "[" * 100_000):
        assert parse_line(text) is None


def test_a_folder_in_its_place_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write .*: Is a directory"):
        Timeline(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks the Linux kernel")
def test_a_process_knows_when_it_began() -> None:
    program = (
        "import time; time.sleep(0.5); from meshway.framework.telemetry import timeline as t; print(t.process_began())"
    )
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        after = time.time()
        began = float(process.communicate()[0])
    assert before - 0.1 <= began <= after + 0.1
    assert process_began() <= time.time()
