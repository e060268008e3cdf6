import errno
import json
import os
import platform
from pathlib import Path

import pytest

from meshway.framework.data.vocabularies import Bytes, Opaque, load
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.training.run_directory import RunDirectory


def test_the_vocabularies_lie_beside_the_checkpoints(tmp_path):
    directory = RunDirectory(tmp_path)
    vocabularies = {"inputs": Bytes(10), "targets": Opaque("mylab.Codes", 40, eos_id=3)}
    directory.save_vocabularies(vocabularies)
    assert {feature: load(directory.vocabularies, feature) for feature in vocabularies} == vocabularies
    index = json.loads((tmp_path / "vocabularies.json").read_text())
    assert index["features"]["inputs"]["kind"] == "bytes"
    assert index["features"]["inputs"]["fingerprint"] == Bytes(10).fingerprint
    first = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    directory.save_vocabularies(vocabularies)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == first


def test_the_same_vocabularies_pass(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.check_vocabularies({"targets": Bytes()})
    directory.save_vocabularies({"inputs": Bytes(10), "targets": Bytes()})
    directory.check_vocabularies({"inputs": Bytes(10), "targets": Bytes()})
    directory.check_vocabularies({"targets": Bytes(), "more": Bytes(3)})


def test_another_vocabulary_is_refused_with_both_named(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.save_vocabularies({"inputs": Bytes(10), "targets": Opaque("mylab.Codes", 40)})
    with pytest.raises(UserError) as caught:
        directory.check_vocabularies({"inputs": Bytes(10), "targets": Opaque("mylab.Codes", 40, sample=[1])})
    message = str(caught.value)
    assert message.startswith(f"feature 'targets': this run has been trained with a {Opaque('mylab.Codes', 40)}, and")
    assert str(Opaque("mylab.Codes", 40, sample=[1])) in message
    assert f"{tmp_path}/vocabularies/targets.*, or take another MODEL_DIR" in message
    assert f"{platform.python_version()} then, {platform.python_version()} now" in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"python": "3", "features": {"targets": {}}}'])
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "vocabularies.json").write_text(content)
    with pytest.raises(UserError, match="vocabularies.json cannot be read: .*; remove it to go on without this check"):
        RunDirectory(tmp_path).check_vocabularies({"targets": Bytes()})


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "vocabularies").write_text("")
    with pytest.raises(UserError, match="cannot write .*/vocabularies/targets.json"):
        RunDirectory(tmp_path).save_vocabularies({"targets": Bytes()})


def test_a_full_disk_is_no_mistake_of_the_users(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a write has no name of its file

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EnvironmentFailure, match="cannot be written: No space left on device; make room there"):
        RunDirectory(tmp_path / "run").prepare([])
