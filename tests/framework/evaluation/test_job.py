import json
import re
import shutil
from types import SimpleNamespace

import bigram_table
import jax
import pytest

from meshway.framework.checkpoints.manager import Checkpoints, DamagedCheckpoint
from meshway.framework.errors import UserError
from meshway.framework.evaluation import job as job_module
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.evaluation.job import EvaluationDisplay, EvaluationJob, is_done
from meshway.framework.evaluation.records import Claims, Records, StepQueue, Wanted, record_name
from meshway.framework.telemetry.writers import Writers
from meshway.framework.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with checkpoints of steps 1, 2 and 3, of parameters that differ."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder / "checkpoints")
    model = bigram_table.BigramTable()
    for step in (1, 2, 3):
        checkpoints.save_params(model.init(jax.random.key(step)), step)
    checkpoints.close()
    return folder


def length(targets, predictions):
    return {"length": sum(map(len, predictions)) / len(predictions)}


class Work:
    """One evaluation of a copy of that run."""

    def __init__(self, saved, folder, metric_fns=(length,), split=None, steps="all"):
        self.root = folder
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        self.said = []
        task = bigram_table.task([([2], [3, 1]), ([4], [5, 1])], predict_metric_fns=list(metric_fns))
        sharded = bigram_table.sharded()
        evaluator = Evaluator(sharded, [task], Evaluation())
        directory = RunDirectory(folder)
        self.records = Records(directory.evaluations)
        done = is_done(self.records, [record_name("ids", split)], "print")
        wanted = Wanted.parse(steps).fixed(directory.checkpoints)
        claims = Claims(folder / "eval" / ".claims")
        self.queue = StepQueue(directory.checkpoints, wanted, done, claims, self.said.append)
        display = SimpleNamespace(
            begin=lambda step: None,
            observe=lambda *_: None,
            found=lambda task, report: None,
            say=self.said.append,
        )
        given = (directory, evaluator, sharded.abstract_params, self.queue, self.records, "print", split, display)
        self.job = EvaluationJob(*given, skip_removed=True)


def test_own_loggers_get_each_step_s_scalars(saved, tmp_path):
    written, closed = {}, []
    work = Work(saved, tmp_path)
    work.job._loggers = Writers([SimpleNamespace(write=written.__setitem__, close=lambda: closed.append(1))])
    assert work.job.run() == 3
    assert list(written) == [1, 2, 3] and "validation/ids/length" in written[1] and closed == [1]
    assert written[1]["validation/loss"] == written[1]["validation/ids/loss"]  # over all tasks: there is one


def test_every_step_is_evaluated_written_and_passed_over_the_next_time(saved, tmp_path):
    work = Work(saved, tmp_path)
    assert work.job.run() == 3
    records = work.records.read("ids")
    assert list(records) == [1, 2, 3] and len({record["metrics"]["loss"] for record in records.values()}) == 3
    assert all(record["fingerprint"] == "print" and record["counts"]["predictions"] == 2 for record in records.values())
    assert len(list((tmp_path / "tensorboard" / "eval").glob("*tfevents*"))) == 3
    assert "length" in (tmp_path / "report.html").read_text()
    again = Work(saved, tmp_path)
    assert again.job.run() == 0 and again.queue.skipped == 3


def test_another_split_has_files_of_its_own(saved, tmp_path, monkeypatch):
    written = {}
    writer = SimpleNamespace(write=lambda step, scalars: written.update(scalars), close=lambda: None)
    monkeypatch.setattr(job_module, "TensorBoardWriter", lambda *_, **__: writer)
    assert Work(saved, tmp_path, split="test[:50%]", steps="2").job.run() == 1
    assert "test[:50%]/ids/length" in written and not any(name.startswith("validation/") for name in written)
    (path,) = (tmp_path / "eval").glob("*.jsonl")
    assert path.name == "ids.test[:50%].jsonl" and json.loads(path.read_text())["split"] == "test[:50%]"
    assert record_name("ids", None) == "ids" and record_name("ids", "train") == "ids.train"


def test_a_metric_that_raises_is_told_at_the_end_and_tried_again(saved, tmp_path):
    def bad(targets, predictions):
        raise ZeroDivisionError("of none")

    work = Work(saved, tmp_path, (bad, length))
    with pytest.raises(UserError, match=r"3 times:\n  task 'ids', bad: ZeroDivisionError: of none$"):
        work.job.run()
    records = work.records.read("ids")
    assert list(records) == [1, 2, 3]
    assert all(record["failed"] == {"bad": "ZeroDivisionError: of none"} for record in records.values())
    assert all("length" in record["metrics"] for record in records.values())
    assert "step 1  ids  bad raised ZeroDivisionError: of none" in work.said
    assert Work(saved, tmp_path).job.run() == 3
    assert not any("failed" in record for record in Records(tmp_path / "eval").read("ids").values())


def test_a_checkpoint_removed_while_it_is_read_is_passed_over(saved, tmp_path, monkeypatch):
    """As `manager.Keep` does beside a watcher: first its files go, then the folder."""
    work = Work(saved, tmp_path)
    folder = tmp_path / "checkpoints" / "2"
    shutil.rmtree(folder / "state")
    monkeypatch.setattr(job_module.time, "sleep", lambda seconds: shutil.rmtree(folder, ignore_errors=True))
    assert work.job.run() == 2
    assert list(work.records.read("ids")) == [1, 3]
    assert work.said == ["step 2: its checkpoint was removed before it could be read; passed over"]


def test_a_damaged_checkpoint_and_one_of_another_model_are_errors(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "_REMOVAL", 0.0)
    work = Work(saved, tmp_path / "damaged", steps="2")
    shutil.rmtree(tmp_path / "damaged" / "checkpoints" / "2" / "state")
    work.job._skip_removed = False
    with pytest.raises(DamagedCheckpoint, match="cannot be read: it is truncated, damaged or not meshway's"):
        work.job.run()
    work = Work(saved, tmp_path / "other", steps="2")
    abstract = {"table": jax.ShapeDtypeStruct((3, 3), "float32")}
    work.job._params = abstract
    with pytest.raises(UserError, match=re.escape("table is float32[12,12] there and float32[3,3] here")):
        work.job.run()
    assert work.records.read("ids") == {}


@pytest.mark.parametrize("bad", [[2], [1, 3]])
def test_all_but_the_damaged_are_evaluated(saved, tmp_path, monkeypatch, bad):
    monkeypatch.setattr(job_module, "_REMOVAL", 0.0)
    work = Work(saved, tmp_path)
    for step in bad:
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(DamagedCheckpoint, match="all else was evaluated and written") as error:
        work.job.run()
    assert str(error.value).count("\n") == len(bad) == sum("; passed over" in line for line in work.said)
    assert list(work.records.read("ids")) == [step for step in (1, 2, 3) if step not in bad]


@pytest.mark.parametrize("bad", [[3], *(pytest.param(bad, marks=pytest.mark.slow) for bad in ([2, 3], [1, 2, 3]))])
def test_the_latest_is_the_last_that_can_be_read(saved, tmp_path, bad):
    work = Work(saved, tmp_path, steps="latest")
    for step in bad:
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "recipe")
    if len(bad) == 3:
        with pytest.raises(DamagedCheckpoint, match="checkpoints/1 cannot be read"):
            work.job.run()
        return
    assert work.job.run() == 1
    assert list(work.records.read("ids")) == [3 - len(bad)]
    assert [line[-13:] for line in work.said[: len(bad)]] == [f"taking step {step}" for step in (2, 1)[: len(bad)]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


class Screen:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_a_task_and_step_with_its_speed(terminal):
    screen = Screen()
    report = {"metrics": {"loss": 2.5, "f1": 40.0}, "counts": {"rows": 3, "tokens": 9.0, "predictions": 1200}}
    with EvaluationDisplay(stream=screen, terminal=terminal) as display:
        display.begin(100)
        display.observe("summary", "predictions", 40, 1200)
        display.found("summary", report)
        display.say("waiting for [a checkpoint]")
    line = re.search(r"step 100  summary  loss 2.5  f1 40  \(1,200 examples, [\d,.]+ examples/s\)", screen.text)
    assert line and "waiting for [a checkpoint]" in screen.text
    assert terminal == ("step 100  summary  predictions" in screen.text)
    with EvaluationDisplay(silent=True, stream=screen, terminal=terminal) as display:
        before = screen.text
        display.say("nothing")
    assert screen.text == before
