import re
from types import SimpleNamespace

import pytest

from meshway.framework.data.vocabularies import Bytes, load
from meshway.framework.errors import UserError
from meshway.framework.training.loop import Periods
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
