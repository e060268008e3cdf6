import io
import re
import threading
import time

from meshway.framework import terminal
from meshway.framework.telemetry.reporter import Progress
from meshway.framework.terminal import Stages


def wait_until(true) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_log_has_a_line_when_a_stage_begins_and_how_long_a_long_one_took(monkeypatch):
    monkeypatch.setattr(terminal, "_WORTH_SECONDS", 0.05)
    stream = io.StringIO()
    shown = Stages(stream, terminal=False)
    with shown.stage("reading the recipe"):
        assert stream.getvalue() == "reading the recipe ...\n"
        with shown.stage("importing mylab.tasks"):
            pass
        time.sleep(0.06)
    with shown.stage("compiling"):
        pass
    lines = stream.getvalue().splitlines()
    assert lines[1] == "importing mylab.tasks ..." and lines[3] == "compiling ..." and len(lines) == 4
    assert re.fullmatch(r"reading the recipe: 0\.\d s", lines[2])


def test_a_log_hears_again_of_a_stage_that_lasts():
    stream = io.StringIO()
    with Stages(stream, terminal=False, period=0.02).stage("compiling"):
        wait_until(lambda: "so far" in stream.getvalue())
    assert re.match(r"compiling \.\.\.\n(compiling: 0\.\d s so far\n)+$", stream.getvalue())


def test_a_terminal_has_one_line_with_a_clock_that_goes_when_the_stage_ends(monkeypatch):
    monkeypatch.setattr(terminal, "_WORTH_SECONDS", 60.0)
    stream = io.StringIO()
    shown = Stages(stream, terminal=True)
    with shown.stage("reading [/runs]/a.gin"):  # no markup
        wait_until(lambda: len(re.findall(r"reading \[/runs\]/a.gin \.\.\. \d+ s", stream.getvalue())) > 1)
    assert stream.getvalue().endswith("\x1b[2K")


def test_another_display_holds_the_terminal_while_it_is_there():
    below, above = io.StringIO(), io.StringIO()
    with terminal.shown(Stages(below, terminal=True)), terminal.stage("opening the data"):
        progress = Progress(10, stream=above, terminal=True)
        written = below.getvalue()
        with terminal.stage("compiling"):
            time.sleep(0.3)
        assert below.getvalue() == written, "two displays draw on one terminal"
        assert "compiling ..." in above.getvalue()
        progress.close()
        wait_until(lambda: below.getvalue() != written)


def test_a_failure_ends_the_stage_without_a_line():
    stream = io.StringIO()
    shown = Stages(stream, terminal=False)
    try:
        with shown.stage("compiling"):
            raise ValueError
    except ValueError:
        pass
    assert stream.getvalue() == "compiling ...\n" and not shown._open


def test_a_library_another_thread_and_other_processes_say_nothing(capsys):
    with terminal.stage("compiling"), terminal.through(print):
        pass
    stream = io.StringIO()
    with terminal.shown(Stages(stream, terminal=False)):

        def reading() -> None:
            with terminal.stage("reading ahead"):
                pass

        thread = threading.Thread(target=reading)
        thread.start()
        thread.join()
        terminal.silence()
        with terminal.stage("compiling"):
            pass
    assert stream.getvalue() == "" and capsys.readouterr() == ("", "")
