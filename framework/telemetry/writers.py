"""Writers of a run's reports: JSON lines, TensorBoard, several at once. Only one process of a run writes."""

import base64
import contextlib
import json
import math
import os
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshway.framework.errors import UserError
from meshway.framework.files import in_bucket, io_errors, open_path, open_to_append, replace_file

if TYPE_CHECKING:
    from meshway.framework.interfaces import Attempt, Writer


class JsonlWriter:
    """A line with a JSON object for each step: `step` first, then the other keys sorted.

    Strict JSON: a NaN or an infinity becomes null, and the line's key `nonfinite` has the original, by the path of the
    value (`{"loss": null, "nonfinite": {"loss": "nan"}}`).

    Each line reaches the operating system in one write, so kill -9 leaves at most one incomplete line, the last. A run
    that resumes at `start_step` first removes that line and all of later steps, in one atomic replacement, so that each
    step appears once.

    Attributes:
      last_step: the step of the last line, None while there is none.
      reported: the last step that was there when it was opened, before lines were removed; -1 for none.
    """

    def __init__(self, path: str | os.PathLike[str], start_step: int = 0) -> None:
        """Opens `path`; creates it and its folder if they do not exist.

        Args:
          path: the file, such as `MODEL_DIR/metrics.jsonl`.
          start_step: the step of the checkpoint this run resumes from: lines up to it are kept. 0, a fresh run,
            keeps none.

        Raises:
          UserError: the file cannot be read or written, or holds something else than reports.
        """
        self._path = open_path(os.fspath(path))
        with io_errors(self._path):
            self.last_step, self.reported = _keep_up_to(self._path, start_step)
            # Unbuffered: after a failed write, a buffer would be written again at close.
            self._file = open_to_append(self._path)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one report.

        Raises:
          UserError: the file cannot be written.
          ValueError: `step` is not later than the last.
        """
        self.write_record(step, {name: _number(value) for name, value in scalars.items()})

    def write_record(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes one line of nested dicts, lists, strings and numbers; raises as `write` does."""
        if self.last_step is not None and step <= self.last_step:
            raise ValueError(f"{self._path}: step {step} after {self.last_step}: each step is written once")
        data = memoryview(json_line(step, record))
        with io_errors(self._path):
            while data:
                data = data[self._file.write(data) :]
        self.last_step = step

    def flush(self) -> None:
        """Returns once what was written is where a crash of this process leaves it; raises as `write` does."""
        with io_errors(self._path):
            self._file.flush()

    def close(self) -> None:
        with io_errors(self._path):
            self._file.close()


class TensorBoardWriter:
    """Event files for TensorBoard, written without TensorFlow; a restart marks repeated steps, which TensorBoard drops.

    Events are written and flushed at once, in the caller's thread: the library's usual writer queues them for its own
    thread, so that kill -9 loses half a minute of them, and a full disk makes the caller hang.
    """

    def __init__(self, folder: str | os.PathLike[str], start_step: int | None = 0) -> None:
        """Opens a new event file in `folder`. Raises UserError.

        Args:
          folder: created if it does not exist.
          start_step: as for `JsonlWriter`; None marks nothing, for points in any order.
        """
        from tensorboardX.event_file_writer import EventsWriter  # lazy: only one process of a run writes
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder, self._copy = open_path(os.fspath(folder)), None
        with io_errors(self._folder):
            local = Path(tempfile.mkdtemp(prefix="meshway-events-")) if in_bucket(self._folder) else self._folder
            local.mkdir(parents=True, exist_ok=True)
            # A file of its own, also for a second run within the same second, of which files are named.
            self._writer = EventsWriter(str(local / "events"), filename_suffix=f".{time.time_ns()}")
            if in_bucket(self._folder):
                self._copy = _Copy(local, self._folder)
        if start_step is not None:
            self._add(start_step + 1 if start_step else 0, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one point for each scalar. Raises UserError if the file cannot be written."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(scalars[name])) for name in sorted(scalars)]
        self._add(step, summary=Summary(value=values))

    def write_values(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Adds texts, images, sounds, histograms and tensors, as `task_metrics.plain_values` has them. Raises UserError
        if the file cannot be written."""
        from tensorboardX.proto.summary_pb2 import Summary

        self._add(step, summary=Summary(value=[_summary_value(name, values[name]) for name in sorted(values)]))

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Adds a text, such as the recipe, shown verbatim. Raises UserError if the file cannot be written."""
        from tensorboardX import summary

        indented = "\n".join("    " + line for line in text.splitlines())  # Markdown for verbatim text
        self._add(step, summary=summary.text(name, indented))

    def flush(self) -> None:
        """Returns once what was written is where a crash of this process leaves it. Raises as `write` does."""
        with io_errors(self._folder):
            if self._copy is not None:
                self._copy.log.flush()

    def close(self) -> None:
        with io_errors(self._folder):
            self._writer.close()
            if self._copy is not None:
                self._copy.close()

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with io_errors(self._folder):
            self._writer.write_event(Event(step=step, wall_time=time.time(), **what))
            self._writer.flush()
            if self._copy is not None:
                self._copy.take()


class _Copy:
    """A local event file, copied to a bucket as it grows; the library writes to local files alone."""

    def __init__(self, local: Path, folder: Path) -> None:
        (path,) = local.iterdir()
        self._local = path.open("rb")
        path.unlink()  # the open file remains until both have closed it
        local.rmdir()
        self.log = open_to_append(folder / path.name)

    def take(self) -> None:
        """Copies what has been added."""
        self.log.write(self._local.read())

    def close(self) -> None:
        self.take()
        self._local.close()
        self.log.close()


class Writers:
    """Several writers as one."""

    def __init__(self, writers: "Sequence[Writer]") -> None:
        self._writers = list(writers)

    def begin(self, attempt: "Attempt") -> None:
        """Tells the writers that want to know it what they will write of."""
        for writer in self._writers:
            if hasattr(writer, "begin"):
                writer.begin(attempt)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def write_values(self, step: int, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Gives values other than numbers to the writers that take them."""
        for writer in self._writers if values else ():
            if hasattr(writer, "write_values"):
                writer.write_values(step, values)

    def flush(self) -> None:
        """Lets the writers that keep something back write it."""
        for writer in self._writers:
            if hasattr(writer, "flush"):
                writer.flush()

    def close(self) -> None:
        """Closes every writer, even if one of them fails, and then raises its error."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)


_NUMPY_TYPES = {  # numpy's name -> TensorFlow's number of a dtype
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "int64": 9, "bool": 10, "uint16": 17,
    "float16": 19, "uint32": 22, "uint64": 23,
}  # fmt: skip
_STRING, _DOUBLE = 7, 2


def _summary_value(name: str, value: Mapping[str, Any]) -> Any:
    """Returns a value as TensorFlow's summaries of version 2 have it."""
    from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboardX.proto.tensor_pb2 import TensorProto
    from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto

    def tensor(dtype: int, shape: Sequence[int], **content: Any) -> Any:
        dims = [TensorShapeProto.Dim(size=size) for size in shape]
        return TensorProto(dtype=dtype, tensor_shape=TensorShapeProto(dim=dims), **content)

    def plugin(name: str, content: bytes = b"") -> Any:
        return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=name, content=content))

    kind = value["kind"]
    if kind == "text":
        metadata, data = plugin("text"), tensor(_STRING, (), string_val=[value["text"].encode("utf-8", "replace")])
    elif kind == "image":
        images = [base64.b64decode(each) for each in value["png"]]
        sizes = [str(size).encode() for size in struct.unpack(">II", images[0][16:24])] if images else [b"0", b"0"]
        metadata, data = plugin("images"), tensor(_STRING, (2 + len(images),), string_val=[*sizes, *images])
    elif kind == "audio":
        sounds = [part for each in value["wav"] for part in (base64.b64decode(each), b"")]
        # AudioPluginData: its field 2, the encoding, is 11, WAV.
        metadata, data = plugin("audio", b"\x10\x0b"), tensor(_STRING, (len(value["wav"]), 2), string_val=sounds)
    elif kind == "histogram":
        edges, counts = value["edges"], value["counts"]
        rows = [number for row in zip(edges[:-1], edges[1:], counts, strict=True) for number in row]
        metadata, data = plugin("histograms"), tensor(_DOUBLE, (len(counts), 3), double_val=rows)
    else:
        metadata = SummaryMetadata.FromString(base64.b64decode(value["metadata"]))
        content = base64.b64decode(value["data"])
        data = tensor(_NUMPY_TYPES[value["dtype"]], value["shape"], tensor_content=content)
    return Summary.Value(tag=name, tensor=data, metadata=metadata)


def json_line(step: int, record: Mapping[str, Any]) -> bytes:
    """Returns a record as a line of `JsonlWriter`'s format, with its newline.

    A record read from such a line gives the same line again.
    """
    values = strict({name: record[name] for name in sorted(record)})
    line = json.dumps({"step": step, **values}, allow_nan=False, ensure_ascii=False)
    return line.encode("utf-8", "backslashreplace") + b"\n"


def strict(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record as strict JSON can hold it: see `JsonlWriter` for its key `nonfinite`, the last where there is
    any."""
    nonfinite: dict[str, str] = dict(record.get("nonfinite", {}))
    values = {name: _strict(value, name, nonfinite) for name, value in record.items() if name != "nonfinite"}
    return values | ({"nonfinite": nonfinite} if nonfinite else {})


def _keep_up_to(path: Path, start_step: int) -> tuple[int | None, int]:
    """Removes from the file what a run resuming at `start_step` writes again; returns the last step kept, and the last
    that was there, -1 for none."""
    if not path.exists():
        return None, -1
    before = path.read_bytes()
    lines = before.split(b"\n")
    steps = [_step_of(line) for line in lines]
    while steps and steps[-1] is None:  # the empty piece after the last newline, or an incomplete line
        steps.pop()
    last, kept, previous = None, 0, -1
    for number, step in enumerate(steps, 1):
        if step is None or step <= previous:
            raise UserError(
                f"{path}, line {number}: not a report of a later step than the line before. Only meshway "
                "writes this file: repair the line, or move the file away to continue without the earlier reports"
            )
        previous = step
        if start_step and step <= start_step:
            last, kept = step, number
    after = b"".join(line + b"\n" for line in lines[:kept])
    if after != before:
        replace_file(path, after)
    return last, previous


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _number(value: Any) -> float | int:
    return value if isinstance(value, int) else float(value)


def _strict(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """Returns `value` as strict JSON can hold it; adds each float that it cannot to `nonfinite`, by its path."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item, f"{path}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item, f"{path}.{index}", nonfinite) for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    nonfinite[path] = str(value)
    return None
