"""Sources of records for a job: files, globs, standard input, prompts of the command line, tasks."""

import contextlib
import functools
import gzip
import json
import os
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from meshway.framework.errors import UserError, did_you_mean, first_line
from meshway.framework.files import local_path
from meshway.framework.inference.bulk.batches import numbers
from meshway.framework.inference.bulk.inputs import Record, Wanted, check_format, every, find_files, format_of
from meshway.framework.inference.bulk.lines import INPUTS, STDIN, LineSource, read_again
from meshway.framework.inference.bulk.parquet import ParquetSource
from meshway.framework.terminal import count_of

_READ_AHEAD = 64  # examples
ALL_FIELDS = "all"


class Source(Protocol):
    """Records in a fixed order, which can be read any number of times (standard input: once)."""

    @property
    def description(self) -> str:
        """What is read, for messages and to distinguish inputs: names, format, number of files, bytes."""
        ...

    @property
    def total(self) -> int | None:
        """The approximate number of records, for an estimate of the time; None if unknown."""
        ...

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on, with few of them in memory at a time. Those that are not `wanted`
        need not be parsed: they may have their index, place and raw bytes alone.

        Raises:
          UserError: the input cannot be read, or has no record at all.
        """
        ...


def open_source(where: str, format: str | None = None, columns: Sequence[str] = ()) -> Source:
    """Opens an input.

    Formats: 'jsonl', on each line a JSON object, or a string, which becomes the field `inputs`; 'tsv', cells of text
    separated by tabs, without quoting, under a header line; 'text', each line the field `inputs`; 'parquet';
    'tfrecord', of tf.train.Examples. A problem of a single record is its `problem`; one of the whole input is raised
    here, if the first lines of files show it.

    Args:
      where: a file, a glob (its files sorted by name) or "-" for standard input. Lines and TFRecord files may be
        compressed (`.gz`).
      format: the format; None chooses by the suffix (`.jsonl`, `.json`, `.ndjson`, `.tsv`, `.txt`, `.text`,
        `.parquet`, `.tfrecord`, `.tfrecord-00000-of-00008`), and JSON lines for standard input.
      columns: the names of TSV columns, in files without a header; or which columns of Parquet files to read.

    Raises:
      UserError: there is no such file or format, a file cannot be read or is of another kind, headers differ.
    """
    if where == STDIN:
        format = format or "jsonl"
        check_format(format)
        if format in (no_stream := {"parquet": "Parquet", "tfrecord": "TFRecord"}):
            raise UserError(f"{no_stream[format]} cannot be read from standard input: give the file's name")
        return LineSource([STDIN], format, columns, f"standard input ({format})")
    paths = find_files(str(local_path(where)))
    format = format_of(paths, format)
    size = sum(os.path.getsize(path) for path in paths if read_again(path))
    files = "" if paths == [where] else f"{count_of(len(paths), 'file')}, "
    description = f"{where} ({files}{format}, {size:,} bytes)"
    if format == "parquet":
        return ParquetSource(paths, columns, description)
    if format == "tfrecord":
        if columns:
            raise UserError("columns name the cells of tsv files, and choose those of parquet; tfrecord has none")
        return TFRecordSource(paths, description)
    return LineSource(paths, format, columns, description)


class PromptSource:
    """A `Source` of texts, each a record with the field `field`."""

    def __init__(self, prompts: Sequence[str], field: str = INPUTS) -> None:
        self._prompts, self._field = list(prompts), field
        self.description = f"{len(self._prompts)} given prompts"

    @property
    def total(self) -> int:
        """The number of records."""
        return len(self._prompts)

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on."""
        for index, text in enumerate(self._prompts[start:], start):
            yield Record(index, {self._field: text}, f"prompt {index + 1}", json.dumps(text).encode())


class TFRecordSource:
    """TFRecord files of tf.train.Examples, one after the other; read without TensorFlow.

    A record has the features by name: text where bytes are UTF-8, numbers, and lists where there is not exactly one
    value, as the format does not tell one value from a list of one.

    Attributes:
      description: what is read, for messages.
    """

    def __init__(self, paths: Sequence[str], description: str) -> None:
        """Reads the beginning of each file. Raises UserError if it cannot be read or is no TFRecord file."""
        self.description = description
        self._paths = list(paths)
        for path in self._paths:
            next(_framed(path), None)

    @property
    def total(self) -> int | None:
        """None: only reading them all would tell."""
        return None

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on; those before, and those not `wanted`, are not parsed.

        Raises:
          UserError: there is no record at all (also before `start`), or a file cannot be read, or is damaged where it
            says how long a record is.
        """
        index = 0
        for path in self._paths:
            for place, (content, checksum) in enumerate(_framed(path), 1):
                where = f"{path} record {place}"
                if index >= start and wanted(index):
                    yield _example(index, content, checksum, where)
                elif index >= start:
                    yield Record(index, {}, where, content)
                index += 1
        if not index:
            raise UserError(f"the input is empty: {self.description}")


def _framed(path: str) -> Iterator[tuple[bytes, int]]:
    """Yields (content, its masked CRC-32C) of each record: its length (uint64) and the CRC of that stand before it,
    its own CRC after it, all little-endian."""
    count = 0
    try:
        with open(path, "rb") as raw:
            head = raw.read(12)
            is_packed = head.startswith(b"\x1f\x8b") and not _is_length(head)
            raw.seek(0)
            with gzip.open(raw) if is_packed else contextlib.nullcontext(raw) as file:
                while head := file.read(12):
                    count += 1
                    length = int.from_bytes(head[:8], "little")
                    if not _is_length(head):
                        what = "is not a TFRecord file" if count == 1 else f"is damaged at record {count}"
                        raise UserError(f"{path} {what}: no length of a record with its checksum stands there")
                    rest = file.read(length + 4)
                    if len(rest) < length + 4:
                        raise UserError(f"{path} is cut off: record {count} has {len(rest):,} of {length + 4:,} bytes")
                    yield rest[:-4], int.from_bytes(rest[-4:], "little")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"cannot read {path}, after record {count}: {getattr(error, 'strerror', None) or error}"
        ) from error


def _is_length(head: bytes) -> bool:
    return len(head) == 12 and _masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little")


def _masked_crc32c(content: bytes) -> int:
    """Returns the CRC-32C (Castagnoli), rotated and shifted as TFRecord files have it."""
    crc = google_crc32c.value(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _example(index: int, content: bytes, checksum: int, place: str) -> Record:
    """Returns the record of a tf.train.Example, features by name."""
    if _masked_crc32c(content) != checksum:
        return Record(index, {}, place, content, "it is damaged: its checksum is another one")
    try:
        features = _example_class().FromString(content).features.feature
    except DecodeError as error:
        return Record(index, {}, place, content, f"not a tf.train.Example: {first_line(error)}")
    values: dict[str, Any] = {}
    ids: dict[str, list[int]] = {}
    for name in sorted(features):  # a protobuf map has no order
        kind = features[name].WhichOneof("kind")
        found = list(getattr(features[name], kind).value) if kind else []
        if kind == "bytes_list":
            found = [_text(each) for each in found]
        elif kind == "float_list":
            found = numbers(np.array(found, np.float32))
        elif found:
            ids[name] = found
        values[name] = found[0] if len(found) == 1 else found
    return Record(index, values, place, content, ids=ids)


@functools.cache
def _example_class() -> Any:
    """Returns the message class of tf.train.Example, as tensorflow/core/example's example.proto and feature.proto
    declare it; in a pool of its own, beside which TensorFlow may be imported."""
    field, package = descriptor_pb2.FieldDescriptorProto, "meshway"
    file = descriptor_pb2.FileDescriptorProto(name="meshway/example.proto", package=package, syntax="proto3")

    def message(name: str, *fields: tuple[str, int, str | int], label: int, within: Any = file.message_type) -> Any:
        made = within.add(name=name)
        for called, number, kind in fields:
            known = {"type": kind} if isinstance(kind, int) else {"type": field.TYPE_MESSAGE, "type_name": kind}
            made.field.add(name=called, number=number, label=label, **known)
        return made

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", ("value", 1, field.TYPE_BYTES), label=many)
    message("FloatList", ("value", 1, field.TYPE_FLOAT), label=many)
    message("Int64List", ("value", 1, field.TYPE_INT64), label=many)
    lists = (("bytes_list", 1, "BytesList"), ("float_list", 2, "FloatList"), ("int64_list", 3, "Int64List"))
    feature = message("Feature", *[(name, number, f".{package}.{kind}") for name, number, kind in lists], label=one)
    feature.oneof_decl.add(name="kind")
    for each in feature.field:
        each.oneof_index = 0
    features = message("Features", ("feature", 1, f".{package}.Features.FeatureEntry"), label=many)
    pair = ("key", 1, field.TYPE_STRING), ("value", 2, f".{package}.Feature")
    message("FeatureEntry", *pair, label=one, within=features.nested_type).options.map_entry = True
    message("Example", ("features", 1, f".{package}.Features"), label=one)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Example"))


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


class ReadableTask(Protocol):
    """A split of a task; `data.eval_task.TaskEvaluation` is one."""

    name: str

    @property
    def num_examples(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]: ...

    def text(self, feature: str, index: int) -> str: ...


class TaskSource:
    """A `Source` of the examples of tasks, one task after the other.

    A record has the task's name, the example's index in it, `inputs` and `targets` as text, and the token ids that the
    task made, from which predictions and scores are computed; and other features of the example.
    """

    def __init__(
        self, tasks: Sequence[ReadableTask], split: str, needed: Collection[str], fields: Collection[str] | None = None
    ):
        """Opens a split of tasks; prints which are left out for lack of the `needed` features.

        Args:
          tasks, split: what is read.
          needed: features of token ids that an example must have.
          fields: further features that records get: names, of which those of token ids that are there as text are
            called `inputs_tokens`; ['all']; None for those called `*_pretokenized`, as T5X keeps them.

        Raises:
          UserError: no task has the needed features, or one of the fields.
        """
        self._fields, self._keeps_all = fields, list(fields or ()) == [ALL_FIELDS]
        self._tasks = [task for task in tasks if task.num_examples and set(needed) <= _features(task)]
        self.description = f"split {split!r} of {', '.join(task.name for task in self._tasks)}"
        lacking = ", ".join(task.name for task in tasks if task not in self._tasks)
        what = " and ".join(repr(name) for name in needed)
        if not self._tasks:
            raise UserError(f"split {split!r}: no task has examples with {what}: {lacking}")
        if lacking:
            print(f"data: {lacking} left out: no examples with {what}", file=sys.stderr)
        there = {name for task in self._tasks for name in task.read([0])[0]}
        for name in () if self._keeps_all else fields or ():
            if name not in there:
                near = did_you_mean(name, there)
                raise UserError(f"no task has a feature {name!r} to keep{near}; there are {', '.join(sorted(there))}")

    @property
    def total(self) -> int:
        """The number of records."""
        return sum(task.num_examples for task in self._tasks)

    def records(self, start: int = 0, wanted: Wanted = every) -> Iterator[Record]:
        """Yields the records from index `start` on; the text of those not `wanted` is not made."""
        first = 0
        for task in self._tasks:
            for begin in range(max(0, start - first), task.num_examples, _READ_AHEAD):
                places = range(begin, min(begin + _READ_AHEAD, task.num_examples))
                for place, example in zip(places, task.read(places)):
                    yield self._record(task, first + place, place, example, wanted(first + place))
            first += task.num_examples

    def _record(
        self, task: ReadableTask, index: int, place: int, example: Mapping[str, Any], is_wanted: bool
    ) -> Record:
        ids = {name: [int(t) for t in example[name]] for name in ("inputs", "targets") if _is_tokens(example.get(name))}
        values: dict[str, Any] = {"task": task.name, "example": place}
        values |= {name: task.text(name, place) for name in ids if is_wanted}
        kept = {f"{name}_tokens" if name in ids else name: _kept(example[name]) for name in self._named(example)}
        raw = json.dumps([task.name, place, ids, kept], sort_keys=True, default=repr).encode()
        return Record(index, values | kept, f"task {task.name!r} example {place}", raw, ids=ids)

    def _named(self, example: Mapping[str, Any]) -> list[str]:
        """Returns which features of an example a record gets beside its text, in their order."""
        if self._fields is None:
            return [name for name in example if name.endswith("_pretokenized")]
        return [name for name in example if self._keeps_all or name in self._fields]


def _features(task: ReadableTask) -> set[str]:
    return {name for name, value in task.read([0])[0].items() if _is_tokens(value) and len(value)}


def _kept(value: Any) -> Any:
    """Returns a feature as text, numbers, and lists of them."""
    value = np.asarray(value)
    if value.dtype == np.float32:
        return numbers(value)
    return _decoded(value.tolist())


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return _text(value) if isinstance(value, bytes) else value


def _is_tokens(value: Any) -> bool:
    return value is not None and np.ndim(value) == 1 and np.asarray(value).dtype.kind in "iu"
