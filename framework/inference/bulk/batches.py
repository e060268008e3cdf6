"""Computes batches of examples (predictions or scores), and encodes rows of results as JSON lines or text."""

import base64
import collections
import dataclasses
import datetime
import decimal
import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from meshway.framework.errors import UserError, described
from meshway.framework.inference.beam_search import best_first
from meshway.framework.inference.bulk.inputs import Example
from meshway.framework.inference.decoding import one_ahead
from meshway.framework.inference.engine import Engine
from meshway.framework.inference.rows import Buckets, Text

PREDICTION = "prediction"
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})
_COMPACT = (",", ":")
_PLAIN = {int, str, bool, type(None)}  # not converted: lists of tokens are long

# Types that Parquet has and JSON lacks.
_AS_JSON: dict[Any, Callable[[Any], Any]] = {
    datetime.date | datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: datetime.timedelta.total_seconds,
    decimal.Decimal | uuid.UUID: str,
    bytes: lambda value: base64.b64encode(value).decode(),
}


@dataclasses.dataclass(frozen=True)
class Done:
    """The results of a batch.

    Attributes:
      rows: the new fields of each example.
      read_tokens, made_tokens: tokens of inputs and targets, and of predictions, without padding.
      padded_tokens: positions of the batch that are padding.
    """

    rows: list[dict[str, Any]]
    read_tokens: int
    made_tokens: int
    padded_tokens: int


class Work(Protocol):
    """What is computed for each batch: `start` dispatches it to the devices, `finish` waits for the results."""

    buckets: Buckets

    def start(self, examples: Sequence[Example], bucket: int) -> Any: ...

    def finish(self, examples: Sequence[Example], bucket: int, started: Any) -> Done: ...


def compute(work: Work, examples: Sequence[Example], batch_size: int) -> Iterator[tuple[list[int], Done]]:
    """Yields (indices into `examples`, their results), a batch of one bucket at a time, the longest first: a batch that
    is too large for memory fails at once."""
    by_bucket: dict[int, list[int]] = collections.defaultdict(list)
    for index, each in enumerate(examples):
        bucket = work.buckets.of(each.sizes)
        assert bucket is not None, "the reader refuses examples that do not fit"
        by_bucket[bucket].append(index)

    def start() -> Iterator[tuple[int, list[int], Any]]:
        for bucket in sorted(by_bucket, reverse=True):
            for first in range(0, len(by_bucket[bucket]), batch_size):
                indices = by_bucket[bucket][first : first + batch_size]
                yield bucket, indices, work.start([examples[index] for index in indices], bucket)

    for bucket, indices, started in one_ahead(start()):
        yield indices, work.finish([examples[index] for index in indices], bucket, started)


class Predict:
    """Predictions, with their tokens and scores; with `aux`, intermediate values of the model too.

    A row gets `prediction`, `tokens`, `score` (the sum of log-probabilities, or beam search's length-normalised score)
    and `token_scores` of the best decode; if several decodes are returned, `predictions` and `scores` of all, the best
    first (beam search returns only hypotheses that ended, if some did); and `aux`, by name, [inputs and prediction,
    ...] or, for names of an encoder or decoder, [inputs, ...] or [prediction, ...].

    With `begins`, examples may have tokens that their predictions begin with. It holds for all examples of a job, since
    another program for some could change the results of others.
    """

    def __init__(
        self,
        engine: Engine,
        text: Text,
        buckets: Buckets,
        max_length: int,
        aux: Collection[str] = (),
        begins: bool = False,
    ) -> None:
        self.buckets, self._begins = buckets, begins
        self._engine, self._text, self._max_length, self._aux = engine, text, max_length, list(aux)

    def start(self, examples: Sequence[Example], bucket: int) -> Any:
        length = self.buckets.shapes[bucket]["inputs"]
        inputs, ids = [each.inputs for each in examples], [each.index for each in examples]
        begun = [each.begun for each in examples] if self._begins else ()
        return self._engine.predict(inputs, ids, length, self._max_length, begun)

    def finish(self, examples: Sequence[Example], bucket: int, started: Any) -> Done:
        tokens, lengths = np.asarray(started.tokens), np.asarray(started.lengths)
        log_probs, scores = np.asarray(started.log_probs), np.asarray(started.scores)
        rows = []
        for row in range(len(examples)):
            decodes = [
                self._decode(*each) for each in zip(tokens[row], lengths[row], log_probs[row], scores[row], strict=True)
            ]
            decodes = [decodes[place] for place in best_first([float(each.score) for each in decodes])]
            best = decodes[0]
            found: dict[str, Any] = {
                "prediction": best.text,
                "tokens": best.tokens,
                "score": number(best.score),
                "token_scores": numbers(best.log_probs),
            }
            if len(scores[row]) > 1:
                found["predictions"] = [decode.text for decode in decodes]
                found["scores"] = [number(decode.score) for decode in decodes]
            rows.append(found)
        if self._aux:
            for fields, aux in zip(
                rows, self._observed(examples, bucket, [each["tokens"] for each in rows]), strict=True
            ):
                fields["aux"] = aux
        read = sum(each.sizes["inputs"] for each in examples)
        length = self.buckets.shapes[bucket]["inputs"]
        return Done(rows, read, int(lengths[: len(examples)].sum()), self._engine.batch_size * length - read)

    def _decode(self, tokens: np.ndarray, length: int, log_probs: np.ndarray, score: np.float32) -> "_Decode":
        """Returns a prediction up to the token or text that ends it."""
        count, text = self._text.ended(tokens[:length])
        if count < length:  # tokens after the text that ends it do not count
            score = log_probs[:count].sum(dtype=np.float32)
        return _Decode(text, tokens[:count].tolist(), score, log_probs[:count])

    def _observed(
        self, examples: Sequence[Example], bucket: int, predicted: Sequence[list[int]]
    ) -> list[dict[str, list[Any]]]:
        """Returns the intermediate values of each example, of its inputs followed by its prediction."""
        length, row_format = self.buckets.shapes[bucket]["inputs"], self._engine.format
        lengths = {"inputs": length, "targets": self._max_length}
        if not row_format.has_encoder:
            lengths = {"targets": length + self._max_length}
        inputs = [each.inputs for each in examples]
        found = self._engine.observe(inputs, predicted, lengths, self._aux)
        arrays = {name: np.asarray(value) for name, value in found.items()}
        observed = []
        for row, (known, new) in enumerate(zip(inputs, predicted)):
            sizes = row_format.scored_size(known, new)
            observed.append({name: _of_row(name, value[row], sizes) for name, value in arrays.items()})
        return observed


class _Decode(NamedTuple):
    """One prediction: its text, ids, score, and the log-probability of each id."""

    text: str
    tokens: list[int]
    score: np.float32
    log_probs: np.ndarray


class Score:
    """The log-probability of given targets: `score`, their sum, and `token_scores`."""

    def __init__(self, engine: Engine, buckets: Buckets) -> None:
        self.buckets, self._engine = buckets, engine

    def start(self, examples: Sequence[Example], bucket: int) -> Any:
        inputs, targets = [each.inputs for each in examples], [each.targets for each in examples]
        return self._engine.score(inputs, targets, self.buckets.shapes[bucket])

    def finish(self, examples: Sequence[Example], bucket: int, started: Any) -> Done:
        inputs, targets = [each.inputs for each in examples], [each.targets for each in examples]
        each_row = self._engine.format.of_targets(np.asarray(started), inputs, targets)
        rows = [{"score": number(row.sum(dtype=np.float32)), "token_scores": numbers(row)} for row in each_row]
        read = sum(sum(each.sizes.values()) for each in examples)
        room = self._engine.batch_size * sum(self.buckets.shapes[bucket].values())
        return Done(rows, read, 0, room - read)


def number(value: Any) -> float:
    """Returns the float with the shortest decimal that rounds to this float32."""
    return float(str(np.float32(value)))


def numbers(values: np.ndarray) -> Any:
    """Returns `number` of each, in lists as the array has dimensions."""
    return np.vectorize(number, otypes=[float])(values).tolist()


def _of_row(name: str, value: np.ndarray, sizes: Mapping[str, int]) -> Any:
    """Returns one example's intermediate value without its padding."""
    size = sizes["inputs"] if name.startswith("encoder") else sizes["targets"]
    return numbers(value[:size])


class Encoding(Protocol):
    """An output format: encodes chunks and merges their files."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        """Returns a file of these rows. Raises UserError, naming the chunk `name`, if the format cannot hold them."""
        ...

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        """Writes the rows of all files, in order, to `file`; holds one chunk in memory at a time."""
        ...

    def is_final(self, path: Path) -> bool:
        """Returns whether a chunk's file can be a shard of the result without change."""
        ...


class Writer(Protocol):
    """A format of one's own: what `infer.Output.writer` names, met by shape. The job does the rest: chunks are
    committed and merged as those of other formats are, whenever it is killed.

    A class that also has `merge(paths, file)`, as `Encoding`, says how files of chunks become one; without it they are
    put one behind the other, in order.

    Attributes:
      suffix: of its files, such as '.csv'.
    """

    suffix: str

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes | str:
        """Returns the content of a file of these rows: a chunk of results, in the order of the input.

        A row has what a line of a .jsonl output has: `index`, the fields of the record, and what was computed:
        `prediction`, `tokens`, `score`, `token_scores`, and others by mode (see `Predict`, `Score`), as text, numbers,
        lists and dicts. `name` is the chunk's, for messages.
        """
        ...


class OwnFormat:
    """A `Writer` as an `Encoding`."""

    def __init__(self, writer: Writer) -> None:
        """Raises UserError unless it has `suffix` and `encode`."""
        kind = self._kind = type(writer).__name__
        suffix = getattr(writer, "suffix", None)
        if not callable(getattr(writer, "encode", None)) or not isinstance(suffix, str):
            raise UserError(
                f"writer {kind}: it needs an attribute suffix, such as '.csv', and a method encode(rows, name) that "
                "returns the content of a file"
            )
        if not re.fullmatch(r"\.\w+", suffix) or suffix == ".json":
            more = ": .json is taken by files beside those of chunks, .jsonl is not" if suffix == ".json" else ""
            raise UserError(f"writer {kind}: its suffix {suffix!r} cannot be one, as '.csv' is{more}")
        self._writer, self.suffix = writer, suffix

    @property
    def description(self) -> str:
        """The class and its plain attributes: files of writers that differ in these are not mixed."""
        kind = type(self._writer)
        given = {name: each for name, each in vars(self._writer).items() if type(each) in _PLAIN | {float}}
        return (
            f"{kind.__module__}.{kind.__qualname__}({', '.join(f'{name}={given[name]!r}' for name in sorted(given))})"
        )

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        try:
            content = self._writer.encode([plain(row, strict=False) for row in rows], name)
        except Exception as error:
            raise UserError(f"{name}: {self._raised('encode', error)}") from error
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        if not isinstance(content, bytes):
            raise UserError(f"{name}: encode of {self._kind} returned {type(content).__name__}, not bytes or str")
        return content

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        merge = getattr(self._writer, "merge", _concatenate)
        try:
            merge(paths, file)
        except OSError:
            raise
        except Exception as error:
            raise UserError(self._raised("merge", error)) from error

    def _raised(self, method: str, error: Exception) -> str:
        return f"{method} of writer {self._kind} raised {described(error)}"

    def is_final(self, path: Path) -> bool:
        return True


class JsonLines:
    """A compact JSON object on each line, keys in the order given; strict, so NaN and infinities are null."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        lines = [
            json.dumps(plain(row, strict=True), allow_nan=False, ensure_ascii=False, separators=_COMPACT)
            for row in rows
        ]
        # Half of a surrogate pair is not a character: JSON's escape of it is kept.
        return "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        _concatenate(paths, file)

    def is_final(self, path: Path) -> bool:
        return True


class TextLines:
    r"""A prediction on each line, empty for None; `\`, newline and carriage return are escaped: `\\`, `\n`, `\r`."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        return "".join(self._line(row) for row in rows).encode("utf-8", "backslashreplace")

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        _concatenate(paths, file)

    def is_final(self, path: Path) -> bool:
        return True

    def _line(self, row: Mapping[str, Any]) -> str:
        if PREDICTION not in row:
            raise UserError(f"a .txt output holds predictions, these results have none ({', '.join(row)}): use .jsonl")
        text = row[PREDICTION]
        if not isinstance(text, str | None):
            raise UserError(
                f"a .txt output holds one text for each input, these results have {type(text).__name__}: use .jsonl"
            )
        return (text or "").translate(_ESCAPES) + "\n"


def plain(value: Any, strict: bool) -> Any:
    """Converts numpy's numbers and arrays to Python's, in dicts and lists too.

    Args:
      value: any value.
      strict: whether it is for JSON: floats that are not finite become None, dates and times ISO 8601, durations
        seconds, decimals text, bytes base64.

    Raises:
      TypeError: a value is of another type.
    """
    if hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) or not strict else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, strict) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [item if type(item) in _PLAIN else plain(item, strict) for item in value]
    for types, as_json in _AS_JSON.items():
        if isinstance(value, types):
            return as_json(value) if strict else value
    raise TypeError(f"a result cannot hold a {type(value).__name__}: {value!r}")


def _concatenate(paths: Sequence[Path], file: BinaryIO) -> None:
    for path in paths:
        with open(path, "rb") as chunk:
            shutil.copyfileobj(chunk, file, 1 << 20)
