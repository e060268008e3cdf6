"""How a run stands, told from its files alone."""

import json
import os

import pytest
from running import python_after

from meshway.framework.evaluation.records import Records
from meshway.framework.telemetry.timeline import Timeline
from meshway.framework.telemetry.writers import json_line
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import cli


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for step in (10, 20):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / "15.damaged").mkdir()
    (folder / "config.gin").write_text("SEED = 0\nTRAIN_STEPS = 100\n")
    reports = [json_line(step, {"loss": 2.0, "step_seconds": 0.5}) for step in (10, 20, 24)]
    (folder / "metrics.jsonl").write_bytes(b"".join(reports) + b'{"step": 2')  # what kill -9 cut
    Records(folder / "eval").add(20, {"dates": {"metrics": {"exact_match": 0.75}}})
    with Timeline(folder / "timeline.jsonl") as line:
        line.mark("ready")
    return folder


def test_a_run_at_work(run, capsys):
    with RunDirectory(run).held():
        assert cli.main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    for part in (
        f"process {os.getpid()} on ", "step 24 of 100 reported, 20 saved, 2 steps/s, 0:38 to go",
        "last evaluation of dates: step 20: exact_match 0.75", "goodput",
    ):  # fmt: skip
        assert part in said, said


def test_a_run_that_nobody_works_on_as_json(run, capsys):
    assert cli.main(["status", f"--model_dir={run}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["running"] is None and found["eta_seconds"] is None and found["attempts"] == 1
    assert (found["step"], found["saved_step"], found["total"], found["checkpoints"]) == (24, 20, 100, [10, 20])
    assert found["evaluations"] == {"dates": {"step": 20, "exact_match": 0.75}}


def test_json_is_strict_whatever_the_files_hold(run, capsys):
    """A file of evaluations that another program wrote, with the NaN that Python's JSON allows."""
    (run / "eval" / "dates.jsonl").write_text('{"step": 20, "metrics": {"perplexity": NaN, "f1": [1.0, -Infinity]}}\n')
    assert cli.main(["status", f"--model_dir={run}", "--json"]) == 0

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["evaluations"] == {"dates": {"step": 20, "perplexity": None, "f1": [1.0, None]}}
    assert found["nonfinite"] == {"evaluations.dates.perplexity": "nan", "evaluations.dates.f1.1": "-inf"}


def test_what_was_reported_and_what_was_saved_are_told_apart(run, capsys):
    def said():
        assert cli.main(["status", str(run)]) == 0
        return capsys.readouterr().out.splitlines()[1]

    (run / "checkpoints" / "30").mkdir()  # it ended as it wrote the report
    assert said() == "step 24 of 100 reported, 30 saved, 2 steps/s"
    for step in (10, 20, 30):
        (run / "checkpoints" / str(step)).rmdir()
    assert said() == "step 24 of 100 reported, none saved, 2 steps/s"
    (run / "metrics.jsonl").unlink()
    assert said() == "no step reported, none saved of 100"


def test_no_run_is_named(tmp_path, capsys):
    for words, message in (
        (["status"], "meshway status needs --model_dir=DIR"),
        (["status", str(tmp_path / "nowhere")], "there is no such directory"),
        (["status", __file__], "it is a file, not a directory"),
        (["status", str(tmp_path)], "is not a run directory"),
        (["status", "s3://bucket/run"], "is not a local path"),
        (["status", str(tmp_path), "b"], "takes no argument 'b'\n"),
    ):
        assert cli.main(words) == 2 and message in capsys.readouterr().err


def test_it_loads_neither_jax_nor_tensorflow_nor_gin(run):
    loaded = python_after(f"from meshway.launch import cli; assert cli.main(['status', {str(run)!r}]) == 0")
    assert not {"jax", "tensorflow", "gin", "seqio", "orbax"} & loaded


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("meshway ")
