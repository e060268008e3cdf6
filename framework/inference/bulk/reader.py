"""Records as examples: which fields are what, their token ids, and whether there is room for them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from meshway.framework.data.vocabulary import after_start
from meshway.framework.errors import did_you_mean
from meshway.framework.inference.bulk.record import Record
from meshway.framework.inference.rows import RowFormat
from meshway.framework.inference.text import Text

# Turns the fields of records into those of examples, one each; raises ValueError where it cannot.
Preprocess = Callable[[Sequence[Mapping[str, Any]]], list[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Example:
    """What is computed of one record.

    Attributes:
      index: place in the whole input.
      values: the record's fields, as they were read.
      inputs, targets: token ids; no targets where none are asked for.
      sizes: tokens that it takes, by feature of a batch.
      begun: ids that its prediction must begin with.
    """

    index: int
    values: Mapping[str, Any]
    inputs: list[int]
    targets: list[int]
    sizes: Mapping[str, int]
    begun: Sequence[int] = ()


class Reader:
    """Makes examples of records.

    Args:
      text: turns text into token ids.
      row_format: how the model reads them.
      limits: the most tokens of an example, by feature of a batch.
      scores: whether targets are read, to be scored.
      inputs_field, targets_field: the fields of a record that hold them, text or token ids.
      truncate: cut inputs that are too long, at the end for an encoder and else at the beginning, instead of refusing.
      preprocess: a task's preprocessors; None takes fields as they are.
      begin_field: the field with what a prediction must begin with, which records may lack; None for none.
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
        """Returns the examples of records in their order, and what is wrong with the other records, each with its
        place."""
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
        """Returns the fields of each record after the task's preprocessors, or what they say against it."""
        assert self._preprocess is not None
        try:
            return [*self._preprocess([record.values for record in records])]
        except ValueError as error:
            if len(records) == 1:
                return [str(error)]
        return [each for record in records for each in self._preprocessed([record])]  # to find whose fault it is

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
        if over and self._truncate and (cut := self._cut(inputs, targets)) is not None:
            inputs, sizes, over = cut, self._sizes(cut, targets), {}
        for name, size in over.items():
            raise ValueError(f"{size:,} tokens of {name}, and there is room for {self._limits[name]:,}")
        if not self._scores and not self._sizes(inputs, targets)["inputs"]:
            raise ValueError(f"field {inputs_field!r} is empty, and without a start token nothing can follow it")
        begun = values.get(self._begin_field, "") if self._begin_field is not None else ""
        begun = self._text.read_begun(begun)
        if self._format.has_encoder or not after_start(inputs, self._format.bos):
            begun = after_start(begun, self._format.bos)
        return Example(record.index, record.values, inputs, targets, sizes, begun)

    def _sizes(self, inputs: list[int], targets: list[int]) -> dict[str, int]:
        if self._scores:
            return self._format.scored_size(inputs, targets)
        return {"inputs": self._format.prompt_size(inputs)}

    def _cut(self, inputs: list[int], targets: list[int]) -> list[int] | None:
        """Returns as much of `inputs` as there is room for, None where they are not what is too long."""
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
