"""Runs reported to Weights & Biases (offline), MLflow (a folder) and clu, killed and resumed: the series of
metrics.jsonl, each step once. Needs the extras `wandb`, `mlflow` and `board`."""

import json

import pytest
from running import copy_lab, lines, meshway

from meshway.framework.telemetry.trackers import wandb_records

pytestmark = pytest.mark.proofs

pytest.importorskip("wandb")
mlflow = pytest.importorskip("mlflow")
pytest.importorskip("tensorboard")

KILLING = """
import os, pathlib, signal

class KillsAt:
    '''Kills its process after some steps, each time that it reaches one of them for the first time.'''
    def __init__(self, steps, folder):
        self.steps, self.folder = steps, pathlib.Path(folder)

    def after_step(self, step, *_):
        marker = self.folder / f'killed-{step}'
        if step in self.steps and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self):
        pass
"""

RECIPE = """
from __gin__ import dynamic_registration
include 'bigram.gin'
import killing
from meshway.framework.telemetry import trackers
from meshway.launch import evaluate
from meshway.launch import train

train.train.hooks = [@killing.KillsAt()]
killing.KillsAt.steps = (17, 15)
killing.KillsAt.folder = %MODEL_DIR
train.train.loggers = [@trackers.WeightsAndBiases(), @trackers.MLflow(), @trackers.Clu()]
evaluate.evaluate.loggers = [@trackers.WeightsAndBiases(), @trackers.MLflow()]
trackers.WeightsAndBiases.mode = 'offline'
trackers.WeightsAndBiases.project = 'lab'
TRAIN_STEPS = 24
REPORT_PERIOD = 2
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    lab = copy_lab(tmp_path_factory.mktemp("trackers"))
    (lab / "killing.py").write_text(KILLING)
    (lab / "reported.gin").write_text(RECIPE)
    words = ("train", "--gin_file=reported.gin", "--gin.MODEL_DIR=run", "--simulated_devices=4")
    # Killed at 17, from 10 on again at 15, which was reported before; then to its end.
    codes = [(done := meshway(*words, cwd=lab)).returncode for _ in range(3)]
    assert codes == [-9, -9, 0], done.stdout + done.stderr
    done = meshway("eval", "--model_dir=run", "--steps=all", "--simulated_devices=4", cwd=lab)
    assert done.returncode == 0, done.stdout + done.stderr
    return lab / "run"


def wandb_series(folder):
    """Returns run id -> [(step, scalars)] of all attempts, in order."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values = {name: json.loads(text) for name, text in items.items() if not name.startswith("_")}
                found.setdefault(path.stem, []).append((record.history.step.num, values))
    return found


def scalars_of(record):
    return {name: value for name, value in record.items() if isinstance(value, float) and name != "step"}


def test_wandb_has_the_series_of_metrics_jsonl(run):
    state = json.loads((run / "trackers.json").read_text())
    series = wandb_series(run)
    own = series[f"run-{state['wandb']['id']}"]
    expected = {line["step"]: scalars_of(line) for line in lines(run / "metrics.jsonl")}
    assert [step for step, _ in own] == sorted(expected)
    assert {step: values["loss"] for step, values in own if "loss" in values} == pytest.approx(
        {step: values["loss"] for step, values in expected.items() if "loss" in values}
    )
    assert all(set(expected[step]) <= set(values) for step, values in own)
    assert [values["step"] for _, values in series[f"run-{state['wandb-evaluations']['id']}"]] == [10, 20, 24]


def test_mlflow_has_the_series_of_metrics_jsonl(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient((run / "mlruns").as_uri())
    state = json.loads((run / "trackers.json").read_text())
    expected = {line["step"]: scalars_of(line) for line in lines(run / "metrics.jsonl")}
    for name in ("loss", "learning_rate", "validation/lab_lines/loss"):
        history = client.get_metric_history(state["mlflow"]["id"], name)
        found = [(point.step, point.value) for point in history]
        assert found == [(step, values[name]) for step, values in sorted(expected.items()) if name in values], name
    kept = client.get_run(state["mlflow"]["id"])
    assert kept.info.status == "FINISHED" and kept.data.params["BATCH_SIZE"] == "8"
    experiment = client.get_experiment_by_name("meshway").experiment_id
    assert len(client.search_runs([experiment])) == 2  # training, and evaluations


def test_clu_writes_event_files(run):
    assert list((run / "clu").glob("*tfevents*"))
