import io
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.telemetry.writers import JsonlWriter, TensorBoardWriter, Writers


def _write(path: Path, steps: range, start_step: int = 0) -> None:
    writer = JsonlWriter(path, start_step)
    for step in steps:
        writer.write(step, {"loss": 5.0 / (step + 1), "accuracy": step / 100})
    writer.close()


def _steps(path: Path) -> list[int]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse)["step"] for line in text.splitlines()]


@pytest.mark.parametrize("start_step", [0, 20, 25, 40])
def test_after_a_crash_at_any_byte_each_step_appears_once(tmp_path: Path, start_step: int) -> None:
    whole = tmp_path / "whole.jsonl"
    _write(whole, range(10, 60, 10))
    content = whole.read_bytes()
    crashed = tmp_path / "crashed.jsonl"
    for size in range(len(content) + 1):
        crashed.write_bytes(content[:size])
        reached = [step for step in range(10, 60, 10) if _ends_at(content, step) <= size]
        kept = [step for step in reached if step <= start_step]
        first = 10 * (start_step // 10) + 10
        _write(crashed, range(first, 60, 10), start_step)
        assert _steps(crashed) == kept + list(range(first, 60, 10)), size
        if kept == [step for step in range(10, 60, 10) if step <= start_step]:
            assert crashed.read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crashed.jsonl", "whole.jsonl"]


def _ends_at(content: bytes, step: int) -> int:
    """Returns where the object of `step` ends, its newline not counted."""
    start = content.index(b'{"step": %d,' % step)
    return content.index(b"}", start) + 1


def test_keys_are_sorted_after_step_and_last_step_is_known(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonlWriter(path)
    assert writer.last_step is None
    writer.write(3, {"b": np.float32(0.5), "a": 2, "c": np.float64(1.0)})
    assert path.read_text() == '{"step": 3, "a": 2, "b": 0.5, "c": 1.0}\n'  # flushed: not closed yet
    writer.close()
    assert JsonlWriter(path, 3).last_step == 3
    assert JsonlWriter(path, 2).last_step is None


def test_a_fresh_run_begins_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(0, 20, 10))
    _write(path, range(0, 10, 10), start_step=0)
    assert _steps(path) == [0]


def test_a_crash_while_later_steps_are_removed_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(10, 50, 10))
    content = path.read_bytes()

    def crash(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meshway.framework.telemetry.writers.os.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonlWriter(path, 20)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_cuts_short_is_finished(tmp_path: Path) -> None:
    class Short(io.BytesIO):
        def write(self, data: memoryview) -> int:
            return super().write(data[:7])

    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer._file = Short()
    writer.write(1, {"loss": 1.0})
    assert writer._file.getvalue() == b'{"step": 1, "loss": 1.0}\n'


def test_a_step_is_written_once(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(3, {})
    with pytest.raises(ValueError, match="step 3 after 3"):
        writer.write(3, {})


def test_nonfinite_numbers_are_null_and_named(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    writer = JsonlWriter(path)
    writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    writer.write_record(2, {"metrics": {"loss": -math.inf}, "predictions": [{"input": "é\ud800\n"}]})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == {
        "step": 1,
        "grad_norm": None,
        "loss": None,
        "lr": 0.1,
        "nonfinite": {"grad_norm": "inf", "loss": "nan"},
    }
    assert lines[1]["metrics"] == {"loss": None}
    assert lines[1]["nonfinite"] == {"metrics.loss": "-inf"}
    assert _steps(path) == [1, 2]


def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\nmy notes\n{"step": 2}\n'
    path.write_bytes(content)
    with pytest.raises(UserError, match="metrics.jsonl, line 2"):
        JsonlWriter(path, 2)
    assert path.read_bytes() == content


def test_unwritable_folders_are_user_errors_and_a_full_disk_the_environments(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for writer_class in (JsonlWriter, TensorBoardWriter):
        with pytest.raises(UserError, match="cannot write .*file/below"):
            writer_class(tmp_path / "file" / "below")
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    board = TensorBoardWriter(tmp_path / "tensorboard")
    with open("/dev/full", "wb", buffering=0) as full:
        writer._file = full
        with pytest.raises(EnvironmentFailure, match="metrics.jsonl: No space left on device"):
            writer.write(1, {"loss": 1.0})
        board._writer._py_recordio_writer._writer = full
        with pytest.raises(EnvironmentFailure, match="tensorboard: No space left on device"):
            board.write(1, {"loss": 1.0})


def _events(folder: Path) -> list:
    """Reads event files by the TFRecord format: length (8 bytes), checksum (4), data, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_holds_scalars_text_and_where_a_restart_begins(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path)
    board.text("config.gin", "a = 1\nb = 2")
    board.write(10, {"loss": 2.5, "accuracy": 0.5})
    board.write(20, {"loss": math.nan})
    first = _events(tmp_path)  # on disk before close: kill -9 loses nothing
    board.close()
    assert [(event.step, [(v.tag, v.simple_value) for v in event.summary.value]) for event in first[3:4]] == [
        (10, [("accuracy", 0.5), ("loss", 2.5)])
    ]
    assert first[2].summary.value[0].tensor.string_val == [b"    a = 1\n    b = 2"]
    assert math.isnan(first[4].summary.value[0].simple_value)
    TensorBoardWriter(tmp_path, start_step=10).close()
    restarts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert restarts == [0, 11]


def test_writers_fan_out_and_close_all(tmp_path: Path) -> None:
    closed = []

    class Failing:
        def write(self, step: int, scalars: dict[str, float]) -> None:
            raise UserError("full")

        def close(self) -> None:
            closed.append(True)
            raise UserError("full at close")

    jsonl = JsonlWriter(tmp_path / "metrics.jsonl")
    copy = JsonlWriter(tmp_path / "copy.jsonl")
    both = Writers([jsonl, Failing(), copy])
    with pytest.raises(UserError, match="full"):
        both.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match="full at close"):
        both.close()
    assert closed == [True]
    assert jsonl._file.closed and copy._file.closed
    assert _steps(tmp_path / "metrics.jsonl") == [1]
