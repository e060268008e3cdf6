"""What is computed of a batch of examples, and the rows of results that become of it."""

import base64
import collections
import dataclasses
import datetime
import decimal
import json
import math
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from meshway.framework.errors import UserError
from meshway.framework.inference.beam_search import NEVER
from meshway.framework.inference.bulk.inputs import Example
from meshway.framework.inference.decoding import one_ahead
from meshway.framework.inference.engine import Engine
from meshway.framework.inference.rows import Buckets, Text

PREDICTION = "prediction"
_ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


class Encoding(Protocol):
    """The files of one format: chunks, and what they make together."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        """Returns a file of these rows. Raises UserError, naming the chunk `name`, if the format cannot hold them."""
        ...

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        """Writes the rows of all files, one after the other, as one; holds one chunk at a time."""
        ...

    def is_final(self, path: Path) -> bool:
        """Returns whether a chunk's file can be a shard of the result as it is."""
        ...


class JsonLines:
    """One compact JSON object a line, keys in the order given; strict, so NaN and infinities are null."""

    def encode(self, rows: Sequence[Mapping[str, Any]], name: str) -> bytes:
        lines = [
            json.dumps(plain(row, strict=True), allow_nan=False, ensure_ascii=False, separators=_COMPACT)
            for row in rows
        ]
        # What is no character (half of a surrogate pair) is left as JSON's own escape.
        return "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")

    def merge(self, paths: Sequence[Path], file: BinaryIO) -> None:
        _concatenate(paths, file)

    def is_final(self, path: Path) -> bool:
        return True


class TextLines:
    r"""One prediction a line, None an empty one; `\`, newline and carriage return are written `\\`, `\n`, `\r`."""

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
                f"a .txt output holds one text an input, these results have {type(text).__name__}: use .jsonl"
            )
        return (text or "").translate(_ESCAPES) + "\n"


_COMPACT = (",", ":")
_PLAIN = {int, str, bool, type(None)}  # as they are: lists of tokens are long

# What Parquet holds and JSON has no word for.
_AS_JSON: dict[Any, Callable[[Any], Any]] = {
    datetime.date | datetime.time: lambda value: value.isoformat(),
    datetime.timedelta: datetime.timedelta.total_seconds,
    decimal.Decimal | uuid.UUID: str,
    bytes: lambda value: base64.b64encode(value).decode(),
}


def plain(value: Any, strict: bool) -> Any:
    """Returns numpy's numbers and arrays as Python's, in dicts and lists too; `strict` is for JSON: what is not finite
    is None, dates and times are ISO 8601, durations seconds, decimals text, bytes base64.

    Raises:
      TypeError: a value is of a type that JSON has no word for.
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


@dataclasses.dataclass(frozen=True)
class Done:
    """What came of a batch.

    Attributes:
      rows: the new fields of each example.
      read_tokens, made_tokens: tokens of inputs and targets, and of predictions, of real examples.
      padded_tokens: places of the batch that hold none.
    """

    rows: list[dict[str, Any]]
    read_tokens: int
    made_tokens: int
    padded_tokens: int


class Work(Protocol):
    """A kind of work: `start` hands a batch to the devices, `finish` waits for what comes back."""

    buckets: Buckets

    def start(self, examples: Sequence[Example], bucket: int) -> Any: ...

    def finish(self, examples: Sequence[Example], bucket: int, started: Any) -> Done: ...


def compute(work: Work, examples: Sequence[Example], batch_size: int) -> Iterator[tuple[list[int], Done]]:
    """Yields (places of examples among those given, what came of them), a batch of one bucket at a time, the longest
    first: what is too large for memory fails at once."""
    places: dict[int, list[int]] = collections.defaultdict(list)
    for place, each in enumerate(examples):
        bucket = work.buckets.of(each.sizes)
        assert bucket is not None, "the reader lets through only what fits"
        places[bucket].append(place)

    def start() -> Iterator[tuple[int, list[int], Any]]:
        for bucket in sorted(places, reverse=True):
            for first in range(0, len(places[bucket]), batch_size):
                at = places[bucket][first : first + batch_size]
                yield bucket, at, work.start([examples[place] for place in at], bucket)

    for bucket, at, started in one_ahead(start()):
        yield at, work.finish([examples[place] for place in at], bucket, started)


class Predict:
    """Predictions, with their tokens and scores; with `aux`, intermediate values of the model too.

    A row gets `prediction`, `tokens`, `score` (the sum of log-probabilities, or what beam search made of it) and
    `token_scores` of the best decode; `predictions` and `scores` of all, the best first, where several are asked for
    (a beam search returns as many as ended, where these are fewer); and `aux`, by name, [inputs and prediction, ...] or
    of the side of the model that the name says.

    With `begins` examples may say what their predictions begin with. It is so for all of a job or for none, since
    examples of one program are what does not depend on neighbours.
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
            # A search in which fewer hypotheses ended than it has beams fills up with what was never found.
            decodes = [each for each in decodes if each.score > NEVER / 2] or decodes[-1:]
            decodes.sort(key=lambda decode: -decode.score)
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
        """Returns a prediction up to where it ended, by a token or by a text."""
        count, text = self._text.ended(tokens[:length])
        if count < length:  # what was drawn after the text that stopped it is no part of it
            score = log_probs[:count].sum(dtype=np.float32)
        return _Decode(text, tokens[:count].tolist(), score, log_probs[:count])

    def _observed(
        self, examples: Sequence[Example], bucket: int, predicted: Sequence[list[int]]
    ) -> list[dict[str, list[Any]]]:
        """Returns intermediate values of each example, where its prediction follows its inputs."""
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
    """Returns a float32 as the shortest decimal that is this float32."""
    return float(str(np.float32(value)))


def numbers(values: np.ndarray) -> list[float]:
    """Returns `number` of each."""
    return [number(value) for value in values]


def _of_row(name: str, value: np.ndarray, sizes: Mapping[str, int]) -> list[Any]:
    """Returns one example's intermediate value without its padding."""
    size = sizes["inputs"] if name.startswith("encoder") else sizes["targets"]
    kept = value[:size].astype(np.float32)
    return np.vectorize(number, otypes=[float])(kept).tolist() if kept.size else kept.tolist()
