"""What all displays of progress have in common: lines in a log, a bar on a terminal, nothing where another speaks."""

import io
import re
from types import SimpleNamespace

import pytest

from meshway.framework.data.cache.workers import CacheProgress
from meshway.framework.evaluation.job import EvaluationDisplay
from meshway.framework.inference.bulk.job import JobProgress
from meshway.framework.progress import progress_of_bytes

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("meshway.framework.progress.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def predicting(clock, **screen):
    with JobProgress(50, **screen) as shown:
        shown.skip(10)
        clock.now += 4
        shown.advance(20, 400)
        clock.now += 4
        shown.advance(10, 400)
        shown.note("left out: in.jsonl:[3]")


def caching(clock, **screen):
    with CacheProgress(4, 1000, **screen) as shown:
        shown.update(0, 0)
        clock.now += 10
        shown.update(0, 200)
        shown.finish(1, 50)
        shown.note("task [x]: 2 of 6 shards are there")


def evaluating(clock, **screen):
    with EvaluationDisplay(**screen) as shown:
        shown.begin(100)
        for done in (100, 400, 1200):
            shown.observe("summary", "predictions", done, 1200)
            clock.now += 30
        shown.say("waiting for [a checkpoint]")


def converting(clock, **screen):
    with progress_of_bytes(3 * 2**20, "writing tensors", **screen) as wrote:
        clock.now += 2
        wrote(2**20)


LOGS = {
    predicting: [
        "30 of 50 examples  5.0 examples/s  100 tokens/s  eta 0:04",
        "40 of 50 examples  3.8 examples/s  100 tokens/s  eta 0:03",
        "left out: in.jsonl:[3]",
    ],
    caching: [
        "shard 0/4  200 examples  20 examples/s  eta 0:40",
        "task [x]: 2 of 6 shards are there",
    ],
    evaluating: [
        "at step 100  summary  predictions  400/1,200  eta 1:20",
        "at step 100  summary  predictions  1,200/1,200  eta 0:00",
        "waiting for [a checkpoint]",
    ],
    converting: ["writing tensors  1.0 MiB of 3.0 MiB  512.0 KiB/s  eta 0:04"],
}


@pytest.mark.parametrize("work", LOGS)
def test_a_log_has_a_line_once_a_period_and_no_escapes(work, clock):
    stream = io.StringIO()
    work(clock, stream=stream, terminal=False, period=2.0)
    assert stream.getvalue().splitlines() == LOGS[work]
    rarely = io.StringIO()
    clock.now = 100.0
    work(clock, stream=rarely, terminal=False, period=1e9)
    assert rarely.getvalue().splitlines() == [line for line in LOGS[work] if "eta" not in line]


@pytest.mark.parametrize("work", LOGS)
def test_a_terminal_has_a_bar_that_goes_and_notes_that_stay(work, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream, anything = io.StringIO(), SimpleNamespace(now=0.0)
    work(anything, stream=stream, terminal=True)
    written, shown = stream.getvalue(), ESCAPES.sub("", stream.getvalue())
    assert "━" in shown
    assert all(line in shown for line in LOGS[work] if "eta" not in line)
    assert written.endswith("\x1b[1A\x1b[2K") or written.endswith("\x1b[2K"), "the bar is still there"
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor is gone"


@pytest.mark.parametrize("work", LOGS)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_silent_one_shows_nothing(work, terminal, clock):
    stream = io.StringIO()
    work(clock, stream=stream, terminal=terminal, period=0.0, silent=True)
    assert stream.getvalue() == ""


def test_without_a_total_there_is_no_time_left(clock):
    stream = io.StringIO()
    with JobProgress(None, stream=stream, terminal=False, period=0.0) as shown:
        clock.now += 2
        shown.advance(20, 400)
    assert stream.getvalue() == "20 examples  10.0 examples/s  200 tokens/s\n"
    drawn = io.StringIO()
    with JobProgress(None, stream=drawn, terminal=True) as shown:
        shown.redraw()
    assert "0 examples" in ESCAPES.sub("", drawn.getvalue())
