import contextlib
import json
import os
import re
import signal
import time
from inspect import signature
from types import SimpleNamespace

import bigram_table
import numpy as np
import pytest

from meshway.framework.data.vocabularies import Bytes, load
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import TaskResult
from meshway.framework.evaluation.records import Records
from meshway.framework.evaluation.schedule import EvaluationLog, Pass
from meshway.framework.optimizers import optimizers
from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout
from meshway.framework.training.hooks import EarlyStopping
from meshway.framework.training.loop import Periods
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import dry_run, train
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config


class Stopped(Exception):
    pass


def resume(tmp_path, vocabulary):
    """Resumes the run in `tmp_path` at step 3 with `vocabulary`, as far as the restore of its state."""
    partitioner = SimpleNamespace(process_rows=lambda size: slice(0, size))
    program = SimpleNamespace(
        explain=list,
        partitioner=partitioner,
        batch_size=2,
        batch_spec={},
        axes={},
        param_shapes={},
        abstract_state=None,
        of_size=lambda size: program,
    )
    dataset = SimpleNamespace(spec=dict)
    data = SimpleNamespace(train=lambda rows: dataset, vocabularies=lambda: {"targets": vocabulary})
    train.train(program, data, str(tmp_path), Periods(total=5))


def test_the_verb_passes_on_every_argument_that_a_recipe_may_bind(monkeypatch):
    """By its own name: `run` spells each out."""
    names, seen = signature(train.train).parameters.keys() - {"resolved", "began"}, {}
    parts = contextlib.nullcontext(lambda name: f"its {name}")
    recipe = SimpleNamespace(resolved="text", parts=lambda root, given: parts)
    monkeypatch.setattr(config, "load", lambda invocation: recipe)
    monkeypatch.setattr(train, "train", lambda **arguments: seen.update(arguments))
    monkeypatch.setattr(train.processes, "joined", lambda *_: contextlib.nullcontext())
    train.run(Invocation("train"))
    assert seen.pop("began") and seen.pop("resolved") == "text"
    assert seen == {name: f"its {name}" for name in names}


def test_a_run_resumes_with_its_own_vocabulary_only(tmp_path, monkeypatch):
    def restore(step, state):
        raise Stopped

    checkpoints = SimpleNamespace(steps=lambda: [3], restore=restore, read_first_step=lambda: 0)
    monkeypatch.setattr(train, "Checkpoints", lambda *_: checkpoints)
    monkeypatch.setattr(train, "_progress", lambda *_: None)
    with pytest.raises(Stopped):
        resume(tmp_path, Bytes(10))
    saved = (tmp_path / "vocabularies.json").read_bytes()
    assert load(tmp_path / "vocabularies", "targets") == Bytes(10), "a run of before is given its list"
    with pytest.raises(UserError, match=re.escape(f"its task now has a {Bytes(11)}")):
        resume(tmp_path, Bytes(11))
    assert (tmp_path / "vocabularies.json").read_bytes() == saved
    with pytest.raises(Stopped):
        resume(tmp_path, Bytes(10))


def test_the_run_s_own_evaluations_stand_beside_those_of_other_programs(tmp_path):
    """It removes what it repeats, leaves what another program found, and says what failed or cannot be run."""

    def results(params):
        report = {"metrics": {"loss": params}, "counts": {}, "predictions": [], "failed": {"f1": "KeyError: 3"}}
        yield TaskResult("ids", report, np.array([params, 1.0]), "ids: 1 example was truncated")

    evaluator = SimpleNamespace(left_out=["ids: evaluated without scores"], task_names=["ids"], results=results)
    passes = [Pass(evaluator, 5, None)]
    directory, said = RunDirectory(tmp_path), []
    records = Records(directory.evaluations)
    for step in (10, 20, 30):
        records.add(step, {"ids": {"metrics": {"loss": 0.5}}}, "another program")
    log = EvaluationLog(passes, 100, directory, 20, True, said.append)
    assert list(records.read("ids")) == [10, 20]
    for step in (20, 25):
        scalars = {"validation/ids/loss": float(step), "validation/loss": float(step)}
        assert log.due(step) and log(SimpleNamespace(params=float(step)), step) == scalars
    assert {step: record["metrics"]["loss"] for step, record in records.read("ids").items()} == {
        10: 0.5,
        20: 0.5,
        25: 25,
    }
    assert said == [
        "ids: evaluated without scores",
        "ids: 1 example was truncated",
        "evaluation at step 20: task 'ids', f1 raised KeyError: 3",
        "evaluation at step 25: task 'ids', f1 raised KeyError: 3",
    ]
    EvaluationLog(passes, 100, directory, 0, False, said.append)(SimpleNamespace(params=1.0), 0)
    assert list(records.read("ids")) == [10, 20, 25], "of several processes one writes"


class Ones:
    """Batches of ones for `BigramTable`: a data source, and its dataset."""

    def __init__(self, program):
        self._spec = {name: (spec.shape, spec.dtype) for name, spec in program.batch_spec.items()}
        self._position = 0
        self.spec, self.vocabularies, self.eval_tasks = lambda: self._spec, dict, list
        self.train = lambda rows: self

    def __iter__(self):
        return self

    def __next__(self):
        self._position += 1
        return {name: np.ones(shape, dtype) for name, (shape, dtype) in self._spec.items()}

    def state(self):
        return {"position": self._position}

    def restore(self, state):
        self._position = state["position"]


@pytest.fixture(scope="module")
def program():
    activations = [("batch", "data"), ("length", None), ("vocab", None)]
    layout = Layout(MeshShape(ici={"data": 1}), [("vocab", None), ("embed", None)], activations)
    sgd = optimizers.Optimizer(optimizers.sgd, learning_rate=0.1)
    return TrainProgram(bigram_table.BigramTable(), sgd, layout, 4, bigram_table.LENGTHS)


@pytest.mark.parametrize(
    ("number", "at", "ends"),
    [(signal.SIGINT, 2, KeyboardInterrupt), (signal.SIGTERM, 2, None), (signal.SIGINT, 4, None)],
)
def test_a_run_that_ctrl_c_stops_is_saved_and_interrupted(tmp_path, capsys, program, number, at, ends):
    hook = SimpleNamespace(close=lambda: None)
    hook.after_step = lambda step: os.kill(os.getpid(), number) if step == at else None

    def run():
        train.train(program, Ones(program), str(tmp_path), Periods(total=5), hooks=[hook])

    if ends is None:
        run()
    else:
        with pytest.raises(ends):
            run()
    last = at + 1  # it is heard after the next step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(last)]
    said = capsys.readouterr().out
    assert (f"stopped after step {last} of 5, saved" in said) == (last < 5)
    assert timeline(tmp_path)[-1]["outcome"] == ("stopped" if last < 5 else "done")


def timeline(folder):
    return [json.loads(line) for line in (folder / "timeline.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_its_data_and_ends_once(tmp_path, capsys, program, monkeypatch):
    def run(total):
        data = Ones(program)
        train.train(program, data, str(tmp_path), Periods(total=total))
        return capsys.readouterr().out

    def slow(checkpoints, step, abstract):
        time.sleep(0.3)
        return restore(checkpoints, step, abstract)

    restore = train.Checkpoints.restore
    monkeypatch.setattr(train.Checkpoints, "restore", slow)
    run(3)
    assert "resuming from" in run(5)
    assert json.loads((tmp_path / "checkpoints" / "5" / "data" / "metadata").read_text()) == {"position": 5}
    resumed = [line for line in timeline(tmp_path) if line["start_step"] == 3 and line["event"] == "compiled"]
    assert resumed[0]["seconds"]["checkpoint"] >= 0.3, "reading a checkpoint is no start-up"
    before = timeline(tmp_path)
    assert "step 5 of 5 is already reached" in run(5) and "step 5 of 4 is already reached" in run(4)
    assert timeline(tmp_path) == before


class Numbered(Ones):
    """The same, with a position that says how many batches came before."""

    def state(self):
        return {"batches": self._position}

    def restore(self, state):
        self._position = state["batches"]


def test_batches_are_left_out_once_and_those_that_were_trained_are_refused(tmp_path, program):
    def run(total, *skipped):
        train.train(program, Numbered(program), str(tmp_path), Periods(total=total), skip_batches=skipped)
        return json.loads((tmp_path / "checkpoints" / str(total) / "data" / "metadata").read_text())

    assert run(2, (2, 3)) == {"batches": 4, "skipped.2": 3}
    assert run(3, (2, 3)) == {"batches": 5, "skipped.2": 3} and run(4) == {"batches": 6, "skipped.2": 3}
    message = r"SKIP_BATCHES: batches 4 to 6 were trained already, in steps 2 to 4, .* from checkpoint 4: begin anew"
    with pytest.raises(UserError, match=message):
        run(5, (2, 6))
    with pytest.raises(UserError, match=message):
        dry_run.check(program, Numbered(program), str(tmp_path), Periods(total=5), skip_batches=[(2, 6)])
    assert run(5, (7, 7))["batches"] == 8


class Evaluated(Ones):
    """The same, with tasks to evaluate: the tokens that it trains on, so that their loss falls."""

    eval_split = "validation"

    def __init__(self, program):
        super().__init__(program)
        self.eval_tasks = lambda split=None: [bigram_table.task([([1], [1, 1, 1])], name="ones")]


def early(**arguments):
    return EarlyStopping(("ones", "loss"), **{"mode": "min", "atol": 1e3} | arguments)


def test_a_run_that_does_not_improve_is_saved_and_stops_and_says_why(tmp_path, capsys, program):
    data, periods = Evaluated(program), Periods(total=9, evaluate=2)
    train.train(program, data, str(tmp_path), periods, hooks=[early(atol=0.0), early()])  # the loss falls, by less
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert "stopped after step 4 of 9, saved. EarlyStopping: loss of ones has not improved in the last 3 eval" in said
    assert timeline(tmp_path)[-1]["outcome"] == "stopped"
    train.train(program, Evaluated(program), str(tmp_path), periods, hooks=[early(patience=4)])
    assert "stopped after step 6 of 9, saved." in capsys.readouterr().out, "those of before count on: 0, 2, 4, 6"


def test_a_hook_sees_what_is_reported_of_training_and_stops_the_run(tmp_path, capsys, program):
    seen = {}
    watching = SimpleNamespace(after_step=lambda step: None, close=lambda: None, after_report=seen.__setitem__)
    hooks = [watching, EarlyStopping(("train", "loss"), "min", atol=1e3)]  # the loss falls, by less
    train.train(program, Evaluated(program), str(tmp_path), Periods(total=9, report=2, evaluate=3), hooks=hooks)
    assert "step 5 of 9, saved. EarlyStopping: loss of train has not improved in the last 3 reports" in (
        capsys.readouterr().out
    )
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    reports = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {step: metrics["loss"] for step, metrics in seen.items()} == {step: reports[step] for step in (2, 3, 4)}
    wrong = EarlyStopping(("train", "lost"), "min")
    with pytest.raises(UserError, match="'train' has no metric 'lost'; .*; did you mean 'loss'"):
        train.train(program, Evaluated(program), str(tmp_path), Periods(total=9, report=1), hooks=[wrong])


def test_a_hook_that_asks_for_what_is_not_evaluated_is_told_before_anything_is_compiled(tmp_path, program, monkeypatch):
    monkeypatch.setattr(type(program), "compile_step", lambda self: pytest.fail("compiled"))
    hooks = [EarlyStopping(("one", "loss"), "min")]
    with pytest.raises(UserError, match="nothing called 'one' is .*; it is one of ones, train; did you mean 'ones'"):
        train.train(program, Evaluated(program), str(tmp_path), Periods(total=9, evaluate=2), hooks=hooks)


def test_own_loggers_get_every_report_and_values_besides_numbers(tmp_path, program):
    """They are called as TensorBoard is, and closed at the end."""

    def shown(targets, predictions):
        return {"count": len(predictions), "note": SimpleNamespace(textdata="as it is")}

    class Own:
        def __init__(self):
            self.scalars, self.values, self.closed = {}, {}, 0

        def write(self, step, scalars):
            self.scalars[step] = dict(scalars)

        def write_values(self, step, values):
            self.values[step] = dict(values)

        def close(self):
            self.closed += 1

    data, own = Evaluated(program), Own()
    data.eval_tasks = lambda split=None: [bigram_table.task([([1], [2, 1])], name="ids", predict_metric_fns=[shown])]
    plain = SimpleNamespace(write=lambda step, scalars: None, close=lambda: None)
    train.train(program, data, str(tmp_path), Periods(total=3, report=1, evaluate=2), loggers=[own, plain])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": step, **scalars} for step, scalars in own.scalars.items()] == lines and own.closed == 1
    note = {"validation/ids/note": {"kind": "text", "text": "as it is"}}
    assert own.values == dict.fromkeys((0, 2, 3), note)
    assert "as it is" in (tmp_path / "report.html").read_text()
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("*tfevents*"))
    assert events.count(b"validation/ids/note") == 3
