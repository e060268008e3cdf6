import io
import re

import pytest

from meshway.framework.telemetry.reporter import Progress
from meshway.framework.terminal import format_duration

REPORT = {
    "loss": 5.2312,
    "learning_rate": 3.2e-3,
    "tokens_per_second": 12345.4,
    "mfu": 0.213,
    "data_wait_fraction": 0.004,
    "step_seconds": 0.168,
    "grad_norm": 1.0,
}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_plain_lines_hold_a_report_each_and_no_escapes() -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream) as progress:
        progress.advance(101)
        progress.update(100, REPORT)
        progress.note("saved checkpoint 100")
        progress.write(101, {"loss": float("nan"), "step_seconds": 60.0})
    assert stream.getvalue().splitlines() == [
        "step 100/1000  loss 5.231  lr 3.2e-03  12,345 tokens/s  mfu 21.3%  data wait 0.4%  eta 2:31",
        "saved checkpoint 100",
        "step 101/1000  loss nan  eta 14:59:00",
    ]


def test_a_measured_peak_is_named() -> None:
    stream = io.StringIO()
    Progress(1000, stream=stream, peak_name="of matmul peak").update(100, {"mfu": 0.213})
    assert "  21.3% of matmul peak  " in stream.getvalue()


def test_time_left_is_read_from_the_clock_without_step_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("meshway.framework.telemetry.reporter.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = Progress(100, start_step=50, stream=stream)
    now = 20.0
    progress.update(60, {})  # ten steps in 20 s, 40 to go
    assert stream.getvalue() == "step 60/100  eta 1:20\n"


def test_a_terminal_shows_bar_numbers_and_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    with Progress(1000, stream=stream, terminal=True) as progress:
        progress.update(100, REPORT)
        progress.note("eval [topics] loss 5.1, " + "long " * 30)
        progress.advance(120)
    shown = ESCAPES.sub("", stream.getvalue())
    assert "eval [topics] loss 5.1, " + "long " * 30 in shown.replace("\n", "")
    assert "step 120/1000" in shown and "━" in shown
    assert "loss 5.231  lr 3.2e-03  12,345 tokens/s  mfu 21.3%  data wait 0.4%" in shown
    bar = [line for line in shown.splitlines() if "step 120/1000" in line][-1]
    assert len(bar.rstrip()) <= 100 and bar.rstrip().endswith("eta 2:28")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_gives_the_cursor_back(error: type[BaseException]) -> None:
    stream = io.StringIO()
    with pytest.raises(error), Progress(10, stream=stream, terminal=True) as progress:
        progress.update(1, REPORT)
        raise error
    written = stream.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")
    progress.close()  # again: no harm


def test_a_narrow_terminal_cuts_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    with Progress(1000, stream=stream, terminal=True) as progress:
        progress.update(100, REPORT)
    assert all(len(line.rstrip()) <= 40 for line in re.split(r"[\r\n]", ESCAPES.sub("", stream.getvalue())))


def test_a_late_report_does_not_move_the_bar_back() -> None:
    stream = io.StringIO()
    with Progress(1000, stream=stream, terminal=True) as progress:
        progress.advance(101)
        progress.update(100, REPORT)
    assert "step 101/1000" in ESCAPES.sub("", stream.getvalue()).splitlines()[-2]


def test_durations() -> None:
    seconds = [0, 59.6, 151, 3600, 86399, 90061]
    shown = ["0:00", "1:00", "2:31", "1:00:00", "23:59:59", "1d 1:01:01"]
    assert [format_duration(s) for s in seconds] == shown
