"""A run's checkpoint as an object: predictions, scores and streamed text, without a recipe at hand."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from meshway.framework import terminal
from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint, read_last
from meshway.framework.errors import UserError
from meshway.framework.files import no_directory, open_path
from meshway.framework.inference.beam_search import BeamSearch
from meshway.framework.inference.bulk.batches import Predict, Score, Work, compute
from meshway.framework.inference.bulk.inputs import Example, Reader, Record
from meshway.framework.inference.decoding import Decoder, Stop
from meshway.framework.inference.engine import Engine
from meshway.framework.inference.recipe_model import RecipeModel, recipe_reader
from meshway.framework.inference.rows import Buckets, RowFormat, Text, doubling, load_text, stop_texts
from meshway.framework.inference.sampling import Sampling
from meshway.framework.inference.weights import check_weights, is_quantized, prepared
from meshway.framework.interfaces import Params
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.trees import axis_sizes


@dataclasses.dataclass(frozen=True)
class Session:
    """A checkpoint of a run on the mesh.

    Attributes:
      sharded: the model, by layer where it is to decode.
      params: its parameters, in their shards.
      text: what it reads and writes.
      row_format: how its batches hold that.
      run, step: which checkpoint it is.
    """

    sharded: ShardedModel
    params: Params
    text: Text
    row_format: RowFormat
    run: Path
    step: int

    def engine(self, decoder: Decoder, batch_size: int, seed: int = 0) -> Engine:
        """Returns what computes batches.

        Args:
          decoder: how predictions are made.
          batch_size: rows of a batch, over all processes.
          seed: of sampling.

        Raises:
          UserError: a batch does not divide over the mesh; a text should stop a search; a search has more beams than
            there are tokens.
        """
        if self.text.stops and isinstance(decoder, BeamSearch):
            raise UserError(
                "stop: beam search compares hypotheses that end by a token, and cannot end them by a text: leave out "
                "either"
            )
        tokens = _vocabulary_size(self.sharded)
        if isinstance(decoder, BeamSearch) and decoder.num_beams > tokens > 0:
            raise UserError(
                f"beams: {decoder.num_beams:,} are more than the {tokens:,} tokens there are to begin with: give fewer"
            )
        ends = Stop(self.text.stop)
        return Engine(self.sharded, self.params, self.row_format, decoder, ends, batch_size, seed)


def open_session(
    opened: RecipeModel,
    path: str | Path,
    step: int | None = None,
    append_eos: bool | None = None,
    stop: str | Sequence[str] = (),
    say: Callable[[str], object] = warnings.warn,
    averaged: bool = False,
    by_layer: bool = True,
) -> Session:
    """Opens a checkpoint under a layout, whatever it was trained under.

    Args:
      opened: of the run's recipe; its layout may be any.
      path: the run directory, or one of its checkpoints.
      step: which checkpoint; None for the latest that can be read.
      append_eos: see `load_text`.
      stop: text, or texts, that end a prediction; see `Text.stops`.
      say: is told of later checkpoints that cannot be read.
      averaged: whether to read the averages of parameters that the run kept (EMA_DECAY).
      by_layer: see `prepared`; programs that only score compile in less time without.

    Raises:
      UserError: there is no such run, step or dtype of weights; it holds another model; its vocabularies cannot be
        read; the layout does not fit; a text of `stop` is empty.
      DamagedCheckpoint: the checkpoint asked for, or every one of the run, cannot be read.
    """
    check_weights(opened.weights, "--weights")
    stops = stop_texts(stop)
    directory = open_path(path)
    if not directory.is_dir():
        raise UserError(f"--model_dir={path}: {no_directory(directory)}")
    found = find_checkpoint(directory, step, "--model_dir")
    if found is None:
        raise UserError(f"--model_dir={path} is neither a run directory nor a checkpoint (no checkpoints/ in it)")
    folder, last = found
    asked_for = step is not None or directory.absolute() == (folder / str(last)).absolute()
    model, sharded = opened.model, ShardedModel(opened.model, opened.layout)
    has_encoder, size = RowFormat.of(model).has_encoder, _vocabulary_size(sharded)
    text = load_text(folder.parent, has_encoder, append_eos, size, opened.vocabularies)
    text = dataclasses.replace(text, stops=stops)
    if why := getattr(text.targets, "why", ""):
        say(f"predictions are written as ids, for the run's vocabulary holds no text{why}")
    checkpoints = Checkpoints(folder, read_only=True, averaged=averaged)

    def read(step: int) -> Params:
        with terminal.stage(f"reading checkpoint {step}"):
            return checkpoints.load_params(step, sharded.abstract_params)

    step, params = (last, read(last)) if asked_for else read_last(checkpoints, last, read, say)
    sharded, params = prepared(sharded, params, by_layer, opened.weights)
    return Session(sharded, params, text, RowFormat.of(model, text.start, text.bos), folder.parent, step)


def _vocabulary_size(sharded: ShardedModel) -> int:
    """Returns how many token ids the model has, by its parameters; 0 where none has such an axis."""
    return max(axis_sizes(sharded.axes, sharded.param_shapes, "vocab"), default=0)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model predicts of one input: the best decode, and all of them.

    Attributes:
      text: of the best decode.
      tokens: its ids, the stop token included.
      score: its sum of log-probabilities, or what beam search made of it.
      token_scores: the log-probability of each token.
      texts, scores: of all decodes, the best first.
      aux: intermediate values by name, where they were asked for: nested lists [inputs and prediction, ...] or, of an
        encoder or decoder, [inputs, ...] or [prediction, ...].
    """

    text: str
    tokens: list[int]
    score: float
    token_scores: list[float]
    texts: list[str]
    scores: list[float]
    aux: Mapping[str, list] = dataclasses.field(default_factory=dict)


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
          layout: a shipped layout or a gin file; None for the recipe's own; 'auto' chooses one of inference's by cost
            (docs/planning.md).
          bindings: more of the recipe, as after `--gin.`: 'DTYPE=bfloat16'.
          decoder: how predictions are made; greedily by default.
          stop: texts that end a prediction, beside EOS.
          batch_size: rows of a batch.
          max_input_length, max_new_tokens: None goes by the recipe's TASK_FEATURE_LENGTHS.
          seed: of sampling.

        Raises:
          UserError: anything the user can mend.
        """
        path = open_path(checkpoint)
        changes = [*bindings, *([f"LAYOUT={layout!r}"] if layout is not None else [])]
        lengths = (max_input_length, max_new_tokens)
        opened = recipe_reader()(path, changes, lambda opened: opened.largest(decoder, batch_size, *lengths))
        session = open_session(opened, path, step, stop=stop)
        self._open(session, opened.limits(max_input_length, max_new_tokens), decoder, batch_size, seed)

    @classmethod
    def of(
        cls, session: Session, longest: Mapping[str, int], decoder: Decoder, batch_size: int, seed: int = 0
    ) -> "Predictor":
        """Returns a predictor with a model that is on its mesh already; `longest` in tokens of inputs and targets.

        Raises:
          UserError: a batch does not divide over the mesh, or the decoder does not fit.
        """
        made = cls.__new__(cls)
        made._open(session, longest, decoder, batch_size, seed)
        return made

    def _open(self, session: Session, longest: Mapping[str, int], decoder: Decoder, batch_size: int, seed: int) -> None:
        self._session, self._longest, self._batch_size = session, longest, batch_size
        self._engine = session.engine(decoder, batch_size, seed)

    def use(self, params: Params) -> None:
        """Goes on with other parameters of the same model, in the same shards; nothing is compiled anew.

        Raises:
          UserError: this predictor keeps its weights in fewer bits.
        """
        if is_quantized(self._session.sharded):
            raise UserError(
                "use: this predictor keeps its weights in fewer bits, which are made when a checkpoint is read: open "
                "another one for other parameters, or leave out infer.opened.weights"
            )
        self._engine.params = self._session.sharded.split(params)

    def release(self) -> None:
        """Lets go of its parameters, so that their memory is free, until others are given to `use`."""
        self._engine.params = {}

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return self._session.step

    def predict(
        self,
        inputs: Sequence[str],
        ids: Sequence[int] | None = None,
        begun: Sequence[str] | None = None,
        aux: Collection[str] = (),
    ) -> list[Prediction]:
        """Returns a prediction for each input.

        Args:
          inputs: texts.
          ids: a number that tells each input from all others, of which its randomness is made; None numbers them.
          begun: what each prediction must begin with; "" leaves it free.
          aux: names of intermediate values of the model, such as 'decoder_output'.

        Raises:
          UserError: an input is longer than `max_input_length`, there are not as many of each, or a name of `aux` is
            unknown.
        """
        for name, given in (("ids", ids), ("begun", begun)):
            if given is not None and len(given) != len(_listed(inputs)):
                raise UserError(f"predict: {len(inputs)} inputs and {len(given)} {name}")
        longest = self._limits(scores=False)
        buckets = doubling({"inputs": longest["inputs"]})
        begins = begun is not None
        work = Predict(self._engine, self._session.text, buckets, longest["targets"], aux, begins)
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
                row.get("aux", {}),
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
