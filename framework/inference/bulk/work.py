"""What is computed of a batch of examples, and the fields that an output row gets: predictions, or scores."""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from meshway.framework.inference.ahead import one_ahead
from meshway.framework.inference.beam_search import NEVER
from meshway.framework.inference.buckets import Buckets
from meshway.framework.inference.bulk.reader import Example
from meshway.framework.inference.engine import Engine
from meshway.framework.inference.text import Text


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
