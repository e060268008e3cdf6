import json
import math
import re
import subprocess
import sys

import pytest

from meshway.framework.errors import UserError
from meshway.framework.evaluation.records import Records


def steps(records, name="task"):
    return {step: record["loss"] for step, record in records.read(name).items()}


def test_records_of_a_step_in_the_order_of_steps(tmp_path):
    records = Records(tmp_path / "eval")
    assert records.read("task") == {}
    for step, loss in ((20, 2.0), (10, 1.0), (30, 3.0), (20, 2.5)):
        records.add(step, {"task": {"loss": loss}, "other": {"loss": -loss}}, "print")
    assert list(records.read("task")) == [10, 20, 30]
    assert steps(records) == {10: 1.0, 20: 2.5, 30: 3.0} and steps(records, "other") == {10: -1.0, 20: -2.5, 30: -3.0}
    first = (tmp_path / "eval" / "task.jsonl").read_text().splitlines()[0]
    assert first == '{"step": 10, "fingerprint": "print", "loss": 1.0}'
    assert sorted(path.name for path in (tmp_path / "eval").iterdir()) == [".lock", "other.jsonl", "task.jsonl"]


def test_a_program_s_record_stands_whoever_comes_first(tmp_path):
    records = Records(tmp_path)
    records.add(5, {"task": {"loss": 1.0}})
    records.add(5, {"task": {"loss": 2.0}}, "program")
    records.add(5, {"task": {"loss": 3.0}})
    assert records.read("task") == {5: {"step": 5, "loss": 2.0, "fingerprint": "program"}}
    records.add(6, {"task": {"loss": 4.0}})
    records.add(6, {"task": {"loss": 5.0}})
    assert steps(records) == {5: 2.0, 6: 5.0}


def test_a_run_that_goes_on_removes_what_it_repeats(tmp_path):
    records = Records(tmp_path)
    for step in (0, 10, 20, 30):
        records.add(step, {"task": {"loss": step}}, "program" if step % 20 else None)
    records.add(40, {"another": {"loss": 0}})
    records.keep_up_to(20)
    assert list(records.read("task")) == [0, 10, 20] and records.read("another") == {}
    records.keep_up_to(0)
    assert records.read("task") == {}


def test_numbers_that_json_lacks_stay_told_when_other_lines_change(tmp_path):
    records = Records(tmp_path)
    records.add(1, {"task": {"z": 1, "metrics": {"loss": math.nan}, "predictions": [{"input": "é"}]}})
    line = (tmp_path / "task.jsonl").read_text()
    assert json.loads(line)["nonfinite"] == {"metrics.loss": "nan"}
    records.add(2, {"task": {}})
    assert (tmp_path / "task.jsonl").read_text() == line + '{"step": 2}\n'


WRITER = """
import pathlib, sys
from meshway.framework.evaluation.records import Records
records, name = Records(pathlib.Path(sys.argv[1])), sys.argv[2]
for step in range(40):
    records.add(2 * step + (name == "b"), {"task": {"loss": step, "by": name}}, name)
"""


def test_no_record_is_lost_between_processes(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name]) for name in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    assert [record["by"] for record in Records(tmp_path).read("task").values()] == ["a", "b"] * 40


def test_a_line_that_was_cut_off_is_written_anew_and_something_else_is_refused(tmp_path):
    records, path = Records(tmp_path), tmp_path / "task.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert steps(records) == {1: 1}
    records.add(2, {"task": {"loss": 2}})
    assert steps(records) == {1: 1, 2: 2}
    path.write_text('{"step": 1}\nmy notes\n{"step": 2}\n')
    for use in (lambda: records.read("task"), lambda: records.add(3, {"task": {}}), lambda: records.keep_up_to(1)):
        with pytest.raises(UserError, match=re.escape("task.jsonl, line 2: not a record of an evaluation")):
            use()
    assert path.read_text() == '{"step": 1}\nmy notes\n{"step": 2}\n'


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"):
        Records(tmp_path / "file").prepare()
