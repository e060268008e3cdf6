"""Inputs of a job: its share of them, their files and formats, records, and the examples made of them."""

import dataclasses
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from meshway.framework.data.vocabulary import after_start
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.inference.rows import RowFormat, Text


@dataclasses.dataclass(frozen=True)
class Record:
    """One line of a file, or one row of a table.

    Attributes:
      index: its index in the whole input, from 0; records with a problem count.
      values: its fields by name, {} if it has a problem.
      place: where it was read, for messages: `questions.jsonl:17` (lines from 1), `x.parquet row 3` (rows from 1).
      raw: the bytes that were read, without the end of the line, for digests. A TSV line is preceded by the names of
        its columns, which change its meaning, and a newline; a Parquet row is its JSON, keys sorted.
      ids: token ids of fields, where they are known: of a task's examples, and integers of TFRecord files.
      problem: why it cannot be used, such as `not JSON: Expecting value at column 5`; "" if it can.
    """

    index: int
    values: Mapping[str, Any]
    place: str
    raw: bytes
    problem: str = ""
    ids: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Share:
    """The chunks of a job that one of `count` independent processes computes: each `count`-th, from `index` on.

    Shares do not overlap, and together are the whole; a chunk is the same whoever computes it.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"num_shards={self.count} must be at least 1")
        if not 0 <= self.index < self.count:
            raise UserError(f"shard_id={self.index} is not one of {self.count} shards, which are 0 to {self.count - 1}")

    @property
    def name(self) -> str:
        return f"{self.index:05d}-of-{self.count:05d}"

    @property
    def is_whole(self) -> bool:
        return self.count == 1

    def owns(self, chunk: int) -> bool:
        """Returns whether chunk number `chunk` is one of these."""
        return chunk % self.count == self.index


Wanted = Callable[[int], bool]  # whether the record of an index is to be parsed


def every(index: int) -> bool:
    """Wants all records."""
    return True


FORMATS = ("jsonl", "tsv", "parquet", "text", "tfrecord")
COMPRESSED = ".gz"  # of lines and TFRecord; Parquet has its own compression
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
}
_SHARD = re.compile(r"-\d+-of-\d+$")  # behind the suffix, as writers of TFRecord files name shards


def find_files(where: str) -> list[str]:
    """Returns the files of a path: one file, or all that match a glob (`**` for any folders), sorted by name.

    Raises:
      UserError: there is no file, or the path is a folder.
    """
    if os.path.isdir(where):
        raise UserError(f"input {where!r} is a folder; name its files, such as {os.path.join(where, '*.jsonl')!r}")
    if os.path.exists(where):
        return [where]
    if glob.has_magic(where):
        found = sorted(path for path in glob.glob(where, recursive=True) if not os.path.isdir(path))
        if not found:
            raise UserError(f"input {where!r} matches no file")
        return found
    folder, name = os.path.split(where)
    if not os.path.isdir(folder or "."):
        raise UserError(f"no input file {where!r}: there is no folder {folder!r}")
    raise UserError(f"no input file {where!r}{nearest(name, folder or '.')}")


def nearest(name: str, folder: str | os.PathLike[str]) -> str:
    """Returns "; did you mean ...?" with names in a folder, "" if it cannot be read."""
    try:
        return did_you_mean(name, os.listdir(folder))
    except OSError:
        return ""


def format_of(paths: Sequence[str], format: str | None) -> str:
    """Returns the one format of all files: `format`, or by their suffixes if it is None.

    Raises:
      UserError: a suffix is unknown, files differ, or there is no such format.
    """
    if format is not None:
        check_format(format)
    found = {path: format or _by_suffix(path) for path in paths}
    first = found[paths[0]]
    for path in paths:
        if found[path] != first:
            raise UserError(f"the files of one input have one format: {paths[0]} is {first}, {path} is {found[path]}")
        if first == "parquet" and path.endswith(COMPRESSED):
            raise UserError(f"{path}: Parquet is not read from {COMPRESSED} files; decompress it (gunzip)")
    return first


def check_format(format: str) -> None:
    """Raises UserError unless there is such a format."""
    if format not in FORMATS:
        raise UserError(f"no input format {format!r}{did_you_mean(format, FORMATS)}; there are {', '.join(FORMATS)}")


def _by_suffix(path: str) -> str:
    suffix = Path(_SHARD.sub("", path.removesuffix(COMPRESSED))).suffix
    if suffix.lower() not in _SUFFIXES:
        what = f"its suffix {suffix!r} is of" if suffix else "a name without suffix has"
        raise UserError(f"{path}: {what} no known format; give one (--format): {', '.join(FORMATS)}")
    return _SUFFIXES[suffix.lower()]


# Converts the fields of records to those of examples, one for each; raises ValueError if it cannot.
Preprocess = Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Example:
    """The tokens of one record.

    Attributes:
      index: that of the record.
      values: the record's fields, as they were read.
      inputs, targets: token ids; no targets unless they are scored.
      sizes: the tokens that it takes in a batch, by feature.
      begun: ids that its prediction must begin with.
      truncated: whether its inputs are only a part of the record's.
    """

    index: int
    values: Mapping[str, Any]
    inputs: list[int]
    targets: list[int]
    sizes: Mapping[str, int]
    begun: Sequence[int] = ()
    truncated: bool = False


class Reader:
    """Makes examples of records.

    Args:
      text: converts text to token ids.
      row_format: how the model arranges them in rows.
      limits: the most tokens of an example, by feature of a batch.
      scores: whether targets are read, to be scored.
      inputs_field, targets_field: the fields of a record that hold them, as text or token ids.
      truncate: truncate inputs that are too long, at the end for an encoder and else at the beginning, instead of
        refusing them.
      preprocess: a task's preprocessors; None uses fields as they are.
      begin_field: the optional field with the text that a prediction must begin with; None for none.
    """

    def __init__(
        self,
        text: Text,
        row_format: RowFormat,
        limits: Mapping[str, int],
        scores: bool = False,
        inputs_field: str = "inputs",
        targets_field: str = "targets",
        truncate: bool = False,
        preprocess: Preprocess | None = None,
        begin_field: str | None = None,
    ):
        self._text, self._format, self._limits = text, row_format, dict(limits)
        self._scores, self._truncate, self._preprocess = scores, truncate, preprocess
        self._fields, self._begin_field = (inputs_field, targets_field), begin_field

    @property
    def inputs_field(self) -> str:
        """The field that holds inputs."""
        return self._fields[0]

    def read(self, records: Sequence[Record]) -> tuple[list[Example], list[str]]:
        """Returns the examples of usable records, in order, and for each other record its place and problem."""
        problems = [f"{record.place}: {record.problem}" for record in records if record.problem]
        good = [record for record in records if not record.problem]
        fields: list[Mapping[str, Any] | str] = []
        if self._preprocess is not None and good:
            fields = self._preprocessed(good)
        elif good:
            fields = [{**record.values, **record.ids} for record in good]
        examples = []
        for record, values in zip(good, fields, strict=True):
            try:
                if isinstance(values, str):
                    raise ValueError(values)
                examples.append(self._example(record, values))
            except ValueError as error:
                problems.append(f"{record.place}: {error}")
        return examples, problems

    def _preprocessed(self, records: Sequence[Record]) -> list[Mapping[str, Any] | str]:
        """Returns the fields of each record after the task's preprocessors, or the error that they raise."""
        assert self._preprocess is not None
        try:
            return [*self._preprocess([record.values for record in records])]
        except ValueError as error:
            if len(records) == 1:
                return [str(error)]
        return [each for record in records for each in self._preprocessed([record])]  # one by one, to find which fail

    def _example(self, record: Record, values: Mapping[str, Any]) -> Example:
        inputs_field, targets_field = self._fields
        needs_inputs = self._format.has_encoder or not self._scores
        inputs = targets = []
        if inputs_field in values or needs_inputs:
            inputs = _tokens(self._text.read_inputs, values, inputs_field)
        if self._scores:
            targets = _tokens(self._text.read_targets, values, targets_field)
            if not targets:
                raise ValueError(f"field {targets_field!r} holds nothing to score")
        sizes = self._sizes(inputs, targets)
        over = {name: size for name, size in sizes.items() if size > self._limits[name]}
        truncated = False
        if over and self._truncate and (shorter := self._truncated(inputs, targets)) is not None:
            inputs, sizes, over, truncated = shorter, self._sizes(shorter, targets), {}, True
        for name, size in over.items():
            raise ValueError(f"{size:,} tokens of {name}, and there is room for {self._limits[name]:,}")
        if not self._scores and not self._sizes(inputs, targets)["inputs"]:
            raise ValueError(f"field {inputs_field!r} is empty, and without a start token nothing can follow it")
        begun = values.get(self._begin_field, "") if self._begin_field is not None else ""
        begun = self._text.read_begun(begun)
        if self._format.has_encoder or not after_start(inputs, self._format.bos):
            begun = after_start(begun, self._format.bos)
        return Example(record.index, record.values, inputs, targets, sizes, begun, truncated)

    def _sizes(self, inputs: list[int], targets: list[int]) -> dict[str, int]:
        if self._scores:
            return self._format.scored_size(inputs, targets)
        return {"inputs": self._format.prompt_size(inputs)}

    def _truncated(self, inputs: list[int], targets: list[int]) -> list[int] | None:
        """Returns as much of `inputs` as fits, None if the example would be too long even without them."""
        inputs = inputs if self._format.has_encoder else list(after_start(inputs, self._format.bos))
        sizes, name = (
            self._sizes(inputs, targets),
            "inputs" if self._format.has_encoder or not self._scores else "targets",
        )
        kept = len(inputs) - (sizes[name] - self._limits[name])
        if kept < len(self._text.end) or self._sizes([], targets).get("targets", 0) > self._limits.get("targets", 0):
            return None
        if self._format.has_encoder:
            return inputs[: kept - len(self._text.end)] + list(self._text.end)
        return inputs[len(inputs) - kept :]


def _tokens(read: Callable[[Any], list[int]], values: Mapping[str, Any], name: str) -> list[int]:
    value = _field(values, name)
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"field {name!r}: {error}") from error


def _field(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ValueError(f"there is no field {name!r}, only {sorted(values)}{did_you_mean(name, values)}")
    return values[name]
