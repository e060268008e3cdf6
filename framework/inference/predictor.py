"""A run's checkpoint as an object: predictions, scores and streamed text, without a recipe at hand."""

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.inference.buckets import Buckets, doubling
from meshway.framework.inference.bulk.reader import Example, Reader
from meshway.framework.inference.bulk.record import Record
from meshway.framework.inference.bulk.work import Predict, Score, Work, compute
from meshway.framework.inference.decoding import Decoder
from meshway.framework.inference.sampling import Sampling
from meshway.framework.inference.session import OpenRecipe, open_session

_GROUP, _NAME = "meshway.recipes", "open"  # who reads recipes says so by an entry point of this group


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model predicts of one input: the best decode, and all of them.

    Attributes:
      text: of the best decode.
      tokens: its ids, the stop token included.
      score: its sum of log-probabilities, or what beam search made of it.
      token_scores: the log-probability of each token.
      texts, scores: of all decodes, the best first.
    """

    text: str
    tokens: list[int]
    score: float
    token_scores: list[float]
    texts: list[str]
    scores: list[float]


@dataclasses.dataclass(frozen=True)
class Scored:
    """The log-probability of a target, and of each of its tokens."""

    score: float
    token_scores: list[float]


class Predictor:
    """Predicts and scores with a checkpoint, whose run holds recipe, weights and vocabulary.

        predictor = Predictor("runs/quickstart")
        predictor.predict(["Friday, 3rd of July 1987"])[0].text

    Inputs go into few shapes of batches, compiled on first use. Several predictors may live in one process.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        step: int | None = None,
        layout: str | None = None,
        bindings: Sequence[str] = (),
        decoder: Decoder = Sampling(temperature=0.0),
        stop: str | Sequence[str] = (),
        batch_size: int = 8,
        max_input_length: int | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
    ):
        """Opens a checkpoint.

        Args:
          checkpoint: a run directory, or one of its checkpoints.
          step: which checkpoint of the run; None for the latest that can be read (the others are warned of).
          layout: a shipped layout or a gin file; None for the recipe's own.
          bindings: more of the recipe, as after `--gin.`: 'DTYPE=bfloat16'.
          decoder: how predictions are made; greedily by default.
          stop: texts that end a prediction, beside EOS.
          batch_size: rows of a batch.
          max_input_length, max_new_tokens: None goes by the recipe's TASK_FEATURE_LENGTHS.
          seed: of sampling.

        Raises:
          UserError: anything the user can mend.
        """
        path = local_path(checkpoint)
        changes = [*bindings, *([f"LAYOUT={layout!r}"] if layout is not None else [])]
        opened = _recipe_reader()(path, changes)
        self._session = open_session(opened.model, opened.layout, path, step, stop=stop)
        self._engine = self._session.engine(decoder, batch_size, seed)
        self._longest = opened.limits(max_input_length, max_new_tokens)
        self._batch_size = batch_size

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self._session.step

    def predict(
        self, inputs: Sequence[str], ids: Sequence[int] | None = None, begun: Sequence[str] | None = None
    ) -> list[Prediction]:
        """Returns a prediction for each input.

        Args:
          inputs: texts.
          ids: a number that tells each input from all others, of which its randomness is made; None numbers them.
          begun: what each prediction must begin with; "" leaves it free.

        Raises:
          UserError: an input is longer than `max_input_length`, or there are not as many of each.
        """
        for name, given in (("ids", ids), ("begun", begun)):
            if given is not None and len(given) != len(_listed(inputs)):
                raise UserError(f"predict: {len(inputs)} inputs and {len(given)} {name}")
        longest = self._limits(scores=False)
        buckets = doubling({"inputs": longest["inputs"]})
        begins = begun is not None
        work = Predict(self._engine, self._session.text, buckets, longest["targets"], begins=begins)
        beginnings = [""] * len(inputs) if begun is None else begun
        records = [{"inputs": each, "begun": first} for each, first in zip(_listed(inputs), beginnings)]
        rows = self._run(work, longest, records, False, ids)
        return [
            Prediction(
                row["prediction"],
                row["tokens"],
                row["score"],
                row["token_scores"],
                row.get("predictions", [row["prediction"]]),
                row.get("scores", [row["score"]]),
            )
            for row in rows
        ]

    def score(self, inputs: Sequence[str], targets: Sequence[str]) -> list[Scored]:
        """Returns the log-probability of each target after its input.

        Raises:
          UserError: they are not as many, or one is longer than there is room for.
        """
        if len(_listed(inputs)) != len(_listed(targets)):
            raise UserError(f"score: {len(inputs)} inputs and {len(targets)} targets")
        longest = self._limits(scores=True)
        pairs = [{"inputs": known, "targets": new} for known, new in zip(inputs, targets)]
        rows = self._run(Score(self._engine, doubling(longest)), longest, pairs, True)
        return [Scored(row["score"], row["token_scores"]) for row in rows]

    def generate(self, text: str, id: int = 0) -> Iterator[str]:
        """Yields the prediction of one input piece by piece, as it is made; joined they are what `predict` returns.

        Raises:
          UserError: the input is longer than `max_input_length`, or the decoder searches.
        """
        limits = self._limits(scores=False)
        example = self._read(limits, [{"inputs": text}], False, [id])[0]
        buckets = doubling({"inputs": limits["inputs"]})
        length = buckets.shapes[_bucket(buckets, example)]["inputs"]
        written = self._session.text.stream()
        for token in self._engine.stream(example.inputs, id, length, limits["targets"]):
            if piece := written.feed(token):
                yield piece
            if written.ended:
                return
        if piece := written.finish():
            yield piece

    def _limits(self, scores: bool) -> Mapping[str, int]:
        return self._session.row_format.room(self._longest["inputs"], self._longest["targets"], scores)

    def _run(
        self,
        work: Work,
        limits: Mapping[str, int],
        values: Sequence[Mapping[str, str]],
        scores: bool,
        ids: Sequence[int] | None = None,
    ) -> list[dict]:
        """Returns the new fields of each example, in their order."""
        examples = self._read(limits, values, scores, range(len(values)) if ids is None else ids)
        found: dict[int, dict] = {}
        for places, done in compute(work, examples, self._batch_size):
            found |= dict(zip(places, done.rows, strict=True))
        return [found[place] for place in range(len(examples))]

    def _read(
        self, limits: Mapping[str, int], values: Sequence[Mapping[str, str]], scores: bool, ids: Sequence[int]
    ) -> list[Example]:
        reader = Reader(self._session.text, self._session.row_format, limits, scores, begin_field="begun")
        records = [Record(n, each, f"input {place}", b"") for place, (n, each) in enumerate(zip(ids, values))]
        examples, problems = reader.read(records)
        if problems:
            raise UserError(problems[0])
        return examples


def _bucket(buckets: Buckets, example: Example) -> int:
    found = buckets.of(example.sizes)
    assert found is not None, "the reader lets through only what fits"
    return found


def _listed(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise UserError(f"give a list of texts: [{texts[:40]!r}]")
    return texts


def _recipe_reader() -> OpenRecipe:
    """Returns who reads recipes: the framework does not."""
    for entry in importlib.metadata.entry_points(group=_GROUP, name=_NAME):
        reader: OpenRecipe = entry.load()
        return reader
    raise UserError(f"no installed package reads recipes (entry point {_NAME!r} of {_GROUP!r}): install meshway whole")
