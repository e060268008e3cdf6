"""Trackers: no step twice after a crash, the same run of theirs, and what is refused."""

import base64
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meshway.framework.errors import UserError
from meshway.framework.interfaces import Attempt
from meshway.framework.telemetry import tracker, trackers
from meshway.framework.telemetry.writers import JsonlWriter, Writers

RECIPE = "SEED = 3\nMODEL_DIR = 'runs/one'\nadam.rate = 0.5\nWIDTHS = \\\n    (1, 2)\nMODEL = @t5.T5()\n"


class Kept(tracker.Tracker):
    """Keeps in lists what a service would show."""

    kind, module = "kept", "json"

    def __init__(self, runs: dict, down: bool = False):
        super().__init__()
        self.runs, self.down = runs, down

    def _begin(self, attempt, run_id):
        self.id = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.id, [])
        return self.id

    def _log(self, step, scalars, values):
        if self.down:
            raise OSError("no network")
        self.runs[self.id].append((step, dict(scalars), dict(values)))

    def _end(self):
        pass


def attempt(folder: Path, start: int, steps, own, recipe: str = RECIPE, close: bool = True):
    """Reports steps as training does, from the checkpoint `start` on."""
    lines = JsonlWriter(folder / "metrics.jsonl", start)
    writers = Writers([lines, own])
    Writers([own]).begin(Attempt(folder, start, lines.reported, recipe))
    for step in steps:
        writers.write_values(step + 1, {"note": {"kind": "text", "text": f"at {step}"}})
        writers.write(step, {"loss": 1 / step})
    if close:
        writers.close()
    return own


def in_jsonl(folder: Path) -> dict[int, float]:
    return {each["step"]: each["loss"] for each in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}


def test_no_step_comes_twice_however_often_a_run_is_killed(tmp_path):
    """Killed after step 5, after 4 in the second attempt, and then ended: the third knows of the first."""
    runs: dict = {}
    attempt(tmp_path, 0, range(1, 6), Kept(runs), close=False)
    attempt(tmp_path, 2, range(3, 5), Kept(runs), close=False)
    attempt(tmp_path, 2, range(3, 8), Kept(runs))
    ((_, reports),) = runs.items()
    assert {step: scalars["loss"] for step, scalars, _ in reports if scalars} == in_jsonl(tmp_path)
    assert [step for step, *_ in reports] == [1, 2, 3, 4, 5, 6, 7, 8]  # 8: what waited for its report when it ended
    assert [values["note"]["text"] for *_, values in reports[1:]] == [f"at {step}" for step in range(1, 8)]


def test_a_run_begun_anew_is_another_only_under_another_recipe(tmp_path):
    runs: dict = {}
    attempt(tmp_path, 0, [1, 2], Kept(runs))
    attempt(tmp_path, 0, [1, 2, 3], Kept(runs))
    attempt(tmp_path, 0, [1], Kept(runs), recipe="SEED = 4\n")
    assert [[step for step, scalars, _ in each if scalars] for each in runs.values()] == [[1, 2, 3], [1]]
    evaluations = Kept(runs)
    evaluations.begin(Attempt(tmp_path, 0, -1, RECIPE, evaluation=True))
    for step in (20, 10):
        evaluations.write(step, {"loss": 1.0})
    evaluations.close()
    assert [step for step, *_ in runs["run2"]] == [20, 10] and len(runs) == 3


def test_a_service_that_is_down_stops_no_training_and_gets_all_later(tmp_path, capsys):
    runs: dict = {}
    own = attempt(tmp_path, 0, [1, 2], Kept(runs, down=True), close=False)
    assert capsys.readouterr().err == "Kept: no network; reports are kept and given later\n"
    own.down = False
    own.write(3, {"loss": 1.0})
    assert [step for step, *_ in runs["run0"]] == [1, 2, 3]
    own.down = True
    own.write(4, {"loss": 1.0})
    own.close()
    assert "1 reports, steps 4 to 4, were not taken; metrics.jsonl has them" in capsys.readouterr().err


def test_hyperparameters_are_the_recipe_s():
    expected = {"SEED": 3, "MODEL_DIR": "runs/one", "adam.rate": 0.5, "WIDTHS": "(1, 2)", "MODEL": "@t5.T5()"}
    assert tracker.hyperparameters(RECIPE) == expected


class Written:
    """A clu MetricWriter's methods, without TensorFlow."""

    def __init__(self, logdir):
        self.logdir, self.calls = logdir, []
        made.append(self)

    def __getattr__(self, name):
        return lambda *words: self.calls.append((name, *words))


made: list[Written] = []


def test_clu_writers_get_scalars_texts_images_and_hyperparameters(tmp_path):
    own = trackers.Clu(Written)
    own.begin(Attempt(tmp_path, 0, -1, RECIPE))
    file = io.BytesIO()
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(file, "png")
    image = {"kind": "image", "png": [base64.b64encode(file.getvalue()).decode()]}
    own.write_values(4, {"note": {"kind": "text", "text": "as it is"}, "seen": image})
    own.write(4, {"loss": 0.5})
    own.close()
    (writer,) = made
    hyper, recipe, scalars, texts, images, *rest = writer.calls
    assert writer.logdir == str(tmp_path / "clu") and hyper[1]["adam.rate"] == 0.5 and recipe[2] == {"recipe": RECIPE}
    assert scalars == ("write_scalars", 4, {"loss": 0.5}) and texts == ("write_texts", 4, {"note": "as it is"})
    np.testing.assert_array_equal(images[2]["seen"], np.arange(12).reshape(1, 2, 2, 3))
    assert [name for name, *_ in rest] == ["flush", "close"]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: trackers.Clu("SummaryWriter"), "write it with its module, as clu.metric_writers.SummaryWriter"),
        (lambda: trackers.Clu("json.Writer"), "Clu: Clu.writer = 'json.Writer' is not there: .* no attribute 'Writer'"),
        (lambda: trackers.Clu(lambda logdir: 1 / 0), "Clu refused: division by zero; mend it, or leave it out"),
    ],
)
def test_what_cannot_be_is_one_message_before_training(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make().begin(Attempt(tmp_path, 0, -1, RECIPE))


@pytest.mark.parametrize("of", [trackers.WeightsAndBiases, trackers.MLflow])
def test_a_missing_extra_is_named(of, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{of.__name__} needs the package .*: pip install 'meshway\[{of.extra}\]'"):
        of()


def test_a_damaged_state_file_is_one_message(tmp_path):
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match="trackers.json cannot be read: .*; remove it to report to new runs"):
        attempt(tmp_path, 0, [], Kept({}))


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="WeightsAndBiases.mode = 'of': it is 'online' or 'offline', or 'disabled'"):
        trackers.WeightsAndBiases(mode="of")
