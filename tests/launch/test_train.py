import re
from types import SimpleNamespace

import pytest

from meshway.framework.data.vocabularies import Bytes, load
from meshway.framework.errors import UserError
from meshway.framework.results.records import Records
from meshway.framework.training.loop import Periods
from meshway.framework.training.run_directory import RunDirectory
from meshway.launch import train


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
    )
    dataset = SimpleNamespace(spec=dict)
    data = SimpleNamespace(train=lambda rows: dataset, vocabularies=lambda: {"targets": vocabulary})
    train.train(program, data, str(tmp_path), Periods(total=5))


def test_a_run_resumes_with_its_own_vocabulary_only(tmp_path, monkeypatch):
    def restore(step, state):
        raise Stopped

    checkpoints = SimpleNamespace(steps=lambda: [3], restore=restore)
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
    evaluator = SimpleNamespace(left_out=["ids: evaluated without scores"])
    evaluator.evaluate = lambda params: (
        {"validation/loss": params},
        {"ids": {"metrics": {"loss": params}, "predictions": [], "failed": {"f1": "KeyError: 3"}}},
    )
    directory, said = RunDirectory(tmp_path), []
    records = Records(directory.evaluations)
    for step in (10, 20, 30):
        records.add(step, {"ids": {"metrics": {"loss": 0.5}}}, "another program")
    log = train.EvaluationLog(evaluator, directory, 20, True, said.append)
    assert list(records.read("ids")) == [10, 20]
    for step in (20, 25):
        assert log(SimpleNamespace(params=float(step)), step) == {"validation/loss": float(step)}
    assert {step: record["metrics"]["loss"] for step, record in records.read("ids").items()} == {
        10: 0.5,
        20: 0.5,
        25: 25,
    }
    assert said == [
        "ids: evaluated without scores",
        "evaluation at step 20: task 'ids', f1 raised KeyError: 3",
        "evaluation at step 25: task 'ids', f1 raised KeyError: 3",
    ]
    train.EvaluationLog(evaluator, directory, 0, False, said.append)(SimpleNamespace(params=1.0), 0)
    assert list(records.read("ids")) == [10, 20, 25], "of several processes one writes"
