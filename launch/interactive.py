"""A recipe's model at hand: steps of training, predictions, scores and metrics of examples in memory, for notebooks.

    model = InteractiveModel("mine.gin", bindings=["BATCH_SIZE=8"])
    model.train_steps([{"inputs": "two and two", "targets": "four"}, ...], 100)
    model.predict([{"inputs": "two and two"}])[0].text

It is what T5X calls by this name. What it does is done by the parts that commands are made of: `TrainProgram`,
`Predictor` and `Evaluator`; with one process, on any number of devices.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from meshway.framework.checkpoints import continuation
from meshway.framework.checkpoints.manager import Checkpoints, find_checkpoint
from meshway.framework.checkpoints.mapping import Initial
from meshway.framework.data import vocabularies as saved_vocabularies
from meshway.framework.data.eval_task import TaskEvaluation
from meshway.framework.data.objective import Converter, FeatureInfo, TaskInfo
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.data.source import DataSource
from meshway.framework.data.task_data import say_cut
from meshway.framework.data.vocabulary import Framing, Vocabulary, source_framing, vocabulary_sizes
from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator
from meshway.framework.files import local_path
from meshway.framework.inference.decoding import Decoder
from meshway.framework.inference.predictor import Prediction, Predictor, Scored, Session
from meshway.framework.inference.recipe_model import limits_of
from meshway.framework.inference.rows import RowFormat, Text, text_of
from meshway.framework.inference.sampling import Sampling
from meshway.framework.interfaces import Batch
from meshway.framework.training.loop import Periods
from meshway.framework.training.program import TrainProgram, check_vocabularies
from meshway.framework.training.run_directory import RunDirectory, summarize
from meshway.framework.training.step import TrainState
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config, files

_NAME = "examples in memory"  # as gin/data/in_memory.gin has it
_METRICS = {  # arguments of a metric function, as seqio tells its kinds, to the list of a task that holds it
    ("targets", "predictions"): "predict_metric_fns",
    ("targets", "predictions", "aux_values"): "predict_with_aux_metric_fns",
    ("targets", "scores"): "score_metric_fns",
}

# A dict of task features: text, or token ids; other fields go to postprocessors. A text alone is `inputs`.
Example = str | Mapping[str, Any]


class InteractiveModel:
    """A model with its optimizer: its state changes by `train_step` and `train_steps`, and all else uses it as it is.

    Attributes:
      program: model, optimizer, layout, batch size and lengths, as the recipe has them.
      state: parameters and optimizer state, and how many steps were taken.
    """

    def __init__(
        self,
        recipe: str | None = None,
        *,
        model_dir: str | Path | None = None,
        step: int | None = None,
        bindings: Sequence[str] = (),
        vocabularies: Mapping[str, Any] | Any | None = None,
        decoder: Decoder = Sampling(temperature=0.0),
        seed: int = 0,
    ):
        """Builds what a recipe says, and starts from a checkpoint, or fresh.

        Args:
          recipe: a gin file or the name of a shipped one, as for `meshway train`; None for that of `model_dir`.
          model_dir: a run, or one of its checkpoints, to start from: with its optimizer, if it was saved.
          step: which checkpoint; None for the latest.
          bindings: more of the recipe, as after `--gin.`: 'BATCH_SIZE=8'.
          vocabularies: of each feature, or one for all: meshway's, seqio's, or any object with `encode`, `decode`,
            `vocab_size` and `eos_id`; None for those of the run, else of the recipe's task.
          decoder: how predictions are made; greedily by default.
          seed: of sampling, and of the order of `train_steps`.

        Raises:
          UserError: anything the user can mend.
        """
        if jax.process_count() > 1:
            raise UserError("InteractiveModel is for one process; several train by meshway train")
        directory = None if model_dir is None else local_path(model_dir)
        found = None if directory is None else find_checkpoint(directory, step, "model_dir")
        if directory is not None and found is None:
            raise UserError(
                f"model_dir={model_dir} is neither a run directory nor a checkpoint (no checkpoints/ in it)"
            )
        if step is not None and directory is None:
            raise UserError(f"step={step} names a checkpoint of a run: give its model_dir=")
        if recipe is None and directory is None:
            raise UserError("InteractiveModel needs a recipe (a gin file), or model_dir=, a run that has one")
        loaded = _load(recipe, directory, bindings)
        self._resolved = loaded.resolved
        with loaded.parts("train.train", given=["resolved", "began"]) as part:
            self.program: TrainProgram = part("program")
            data: DataSource = part("data")
            initial: Initial | None = part("initial")
            periods: Periods = part("periods")
            part.rest()
        self._converter: Converter = data.converter  # type: ignore[attr-defined]
        self._vocabularies, framing = _vocabularies(vocabularies, found[0].parent if found else None, data)
        self._framing = framing or Framing(())
        check_vocabularies(self.program, self._vocabularies)
        self.state = _restored(self.program, *found) if found else _fresh(self.program, initial, periods.relative)
        self._decoder, self._seed = decoder, seed
        self._evaluated = _Current(self.program.batch_size, self.program.lengths)
        self._is_at_hand = False  # whether the predictor has the parameters of the state

    @property
    def step(self) -> int:
        """How many steps of training the parameters have had, those before it was opened too."""
        return int(self.state.step)

    def train_step(self, examples: Sequence[Example]) -> dict[str, float]:
        """Takes one step on a batch of examples; returns its metrics, `loss` among them.

        Args:
          examples: at most as many as fit into a batch of BATCH_SIZE rows; rows that are left are empty.

        Raises:
          UserError: they do not fit, or one lacks a feature or is too long.
        """
        size = self.program.batch_size
        source = self._source(self._read(examples), shuffle=False)
        if (rows := source.rows_in_round(0)) > size:
            raise UserError(f"{len(examples)} examples make {rows} rows, and a batch has {size}: use train_steps")
        return self._take(next(self._stream(source, limit=rows)))

    def train_steps(self, examples: Sequence[Example], steps: int) -> list[dict[str, float]]:
        """Takes so many steps, over and over through the examples in a fresh order each time; returns their metrics."""
        stream = self._stream(self._source(self._read(examples), shuffle=True), limit=None)
        return [self._take(next(stream)) for _ in range(steps)]

    def predict(self, examples: Sequence[Example], aux: Collection[str] = ()) -> list[Prediction]:
        """Returns a prediction of each example's `inputs`; with `aux`, also intermediate values of the model."""
        return self._at_hand().predict([_field(n, each, "inputs") for n, each in _listed(examples)], aux=aux)

    def predict_with_aux(
        self, examples: Sequence[Example], names: Collection[str] = ()
    ) -> tuple[list[str], dict[str, list[Any]]]:
        """Returns (texts, auxiliary values by name), as T5X: 'scores' of the predictions, and intermediate values."""
        found = self.predict(examples, names)
        aux = {name: [each.aux[name] for each in found] for name in names}
        return [each.text for each in found], {"scores": [each.score for each in found], **aux}

    def score(self, examples: Sequence[Example]) -> list[Scored]:
        """Returns the log-probability of each example's `targets` after its `inputs` (none where it has none)."""
        listed = _listed(examples)
        inputs = [each.get("inputs", "") for _, each in listed]
        return self._at_hand().score(inputs, [_field(n, each, "targets") for n, each in listed])

    def evaluate(
        self,
        examples: Sequence[Example],
        metric_fns: Sequence[Callable[..., Mapping[str, Any]]] = (),
        postprocess_fn: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """Returns the teacher-forced loss and the model's own metrics, and those of metric functions, by name.

        Args:
          examples: with targets.
          metric_fns: as seqio's tasks have them: of (targets, predictions), of these and aux_values, or of (targets,
            scores).
          postprocess_fn: seqio's: (text, example=..., is_target=...) -> what metric functions compare; None leaves
            text as it is.

        Raises:
          UserError: an example cannot be used, a metric function takes other arguments, or one raised.
        """
        read = self._read(examples)
        program, objective = self.program, self._objective(read)
        say_cut(_NAME, InMemory(read), objective, list(program.lengths))
        task = _as_task(metric_fns, postprocess_fn, self._vocabularies)
        arguments = (self._converter, program.lengths, program.batch_size, self._vocabularies, task, self._framing.stop)
        self._evaluated.task = TaskEvaluation(_NAME, InMemory(read), objective, *arguments)
        report = next(self._evaluator.results(self.program.evaluated(self.state))).report
        for function, message in report.get("failed", {}).items():
            raise UserError(f"evaluate: {function} raised {message}")
        return dict(report["metrics"])

    def save(self, model_dir: str | Path) -> Path:
        """Saves a checkpoint of the step in a run directory, with recipe and vocabularies; returns its folder.

        `meshway eval` and `infer` take it as any run's, and so does `InteractiveModel(model_dir=...)`. A
        training on a task starts from it by `Initial.path`.

        Raises:
          UserError: it cannot be written.
        """
        directory = RunDirectory(local_path(model_dir))
        rows = self.program.explain()
        with directory.held():
            directory.prepare(rows)
            directory.save_vocabularies(self._vocabularies, self._framing if "targets" in self._vocabularies else None)
            directory.describe(self._resolved, rows, summarize(self.program, rows))
            checkpoints = Checkpoints(directory.checkpoints, recipe=self._resolved)
            checkpoints.save(self.state, self.step, {}, {})
            checkpoints.close()
        return directory.checkpoints / str(self.step)

    @functools.cached_property
    def _compiled(self) -> jax.stages.Compiled:
        return self.program.compile_step()

    @functools.cached_property
    def _text(self) -> Text:
        targets = self._vocabularies["targets"]
        has_encoder = RowFormat.of(self.program.model).has_encoder
        return text_of(self._vocabularies.get("inputs", targets), targets, self._framing, has_encoder)

    @functools.cached_property
    def _predictor(self) -> Predictor:
        program, text = self.program, self._text
        row_format = RowFormat.of(program.model, text.start, text.bos)
        sharded = program.sharded.by_layer()
        session = Session(sharded, sharded.param_shapes, text, row_format, Path(), self.step)
        limits = limits_of(program.lengths)
        return Predictor.of(session, limits, self._decoder, program.batch_size, self._seed)

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        """Evaluates what `_evaluated` holds: its programs are compiled once."""
        program = self.program
        settings = Evaluation(max_predictions=None, num_samples=0, decoder=self._decoder)
        tasks: Any = [self._evaluated]
        return Evaluator(program.sharded, tasks, settings)

    def _at_hand(self) -> Predictor:
        if not self._is_at_hand:
            self._predictor.use(self.state.params)
            self._is_at_hand = True
        return self._predictor

    def _take(self, batch: Batch) -> dict[str, float]:
        if self._is_at_hand:  # by layer they are a copy, for which a step may have no room
            self._predictor.release()
            self._is_at_hand = False
        self.state, metrics = self._compiled(self.state, self.program.shard_batch(batch))
        found = jax.device_get(metrics)
        return {name: float(total / weight) for name, (total, weight) in found.items() if weight}

    def _stream(self, source: RowSource, limit: int | None) -> Iterator[Batch]:
        program = self.program
        spec, rows = self._converter.spec(program.lengths, program.batch_size), slice(0, program.batch_size)
        return RowStream(_NAME, [source], {_NAME: 1.0}, [], spec, program.batch_size, rows, self._seed, limit)

    def _source(self, read: list[dict[str, Any]], shuffle: bool) -> RowSource:
        sizes = vocabulary_sizes(self._vocabularies, self.program.lengths)
        objective, seed = self._objective(read), self._seed
        say_cut(_NAME, InMemory(read), objective, list(self.program.lengths))
        return RowSource(_NAME, InMemory(read), objective, self._converter.pack, shuffle, seed, sizes)

    def _objective(self, read: Sequence[Mapping[str, Any]]) -> Any:
        features = {}
        for name, value in read[0].items():
            if name in self._converter.task_features:
                known = self._vocabularies.get(name)
                array = np.asarray(value)
                shape = (None, *array.shape[1:]) if known else array.shape
                features[name] = FeatureInfo(str(array.dtype), shape, known.info if known else None)
        framing = self._framing
        return self._converter.bind(TaskInfo(_NAME, features, framing.start, bos=framing.bos), self.program.lengths)

    def _read(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Returns examples as a task has them: token ids, the text that was given, and other fields as they are."""
        found = []
        for number, each in _listed(examples):
            fields = dict(each)
            for name in self._converter.task_features:
                if name not in self._vocabularies:
                    continue
                value = fields[name] = _field(number, each, name)
                if isinstance(value, str):
                    fields[f"{name}_pretokenized"] = value
                fields[name] = np.asarray(self._ids(number, name, value), np.int32)
            found.append(fields)
        if not found:
            raise UserError("there are no examples: give at least one")
        return found

    def _ids(self, number: int, name: str, value: Any) -> list[int]:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        read = {"inputs": self._text.read_inputs, "targets": self._text.read_targets}.get(name)
        try:
            return read(value) if read else self._vocabularies[name].encode(value) if isinstance(value, str) else value
        except ValueError as error:
            raise UserError(f"example {number}, field {name!r}: {error}") from error


class _Current:
    """Stands for the examples that are evaluated just now, as a task of an `Evaluator`."""

    def __init__(self, batch_size: int, lengths: Mapping[str, int]):
        nothing = {"has_metrics": False, "has_score_metrics": False, "left_out": ()}
        self.task: Any = SimpleNamespace(name=_NAME, batch_size=batch_size, lengths=lengths, **nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


def _load(recipe: str | None, directory: Path | None, bindings: Sequence[str]) -> config.Recipe:
    """Returns the recipe, read behind the defaults that stand for a task."""
    given = (*bindings, f"MODEL_DIR={str(directory)!r}") if directory is not None else tuple(bindings)
    invocation = Invocation("train", gin_files=(recipe,) if recipe else (), bindings=given)
    invocation = invocation if recipe else files.of_run(invocation)
    return config.load(dataclasses.replace(invocation, gin_files=("data/in_memory.gin", *invocation.gin_files)))


def _vocabularies(
    given: Mapping[str, Any] | Any | None, run: Path | None, data: Any
) -> tuple[dict[str, Vocabulary], Framing | None]:
    """Returns the vocabulary of each feature, and what stands around text."""
    if given is not None and not isinstance(given, Mapping):
        given = dict.fromkeys(data.converter.task_features, given)
    if given is not None:
        given = {name: saved_vocabularies.of_seqio(each) for name, each in given.items()}
        return given, Framing.of(given["targets"]) if "targets" in given else None
    if run is not None and (run / "vocabularies.json").is_file():
        names = [path.stem for path in sorted((run / "vocabularies").glob("*.json")) if "." not in path.stem]
        found = {name: saved_vocabularies.load(run / "vocabularies", name) for name in names}
        return saved_vocabularies.with_their_code(found, data.vocabularies), saved_vocabularies.read_framing(run)
    if data.name == _NAME:
        raise UserError(
            "there is no vocabulary: give vocabularies=, or a recipe with the MIXTURE_OR_TASK_NAME that has them"
        )
    return data.vocabularies(), source_framing(data)


def _fresh(program: TrainProgram, initial: Initial | None, relative: int | None) -> TrainState:
    if initial is None or initial.path is None:
        return program.init()
    return continuation.begin(initial, program, continuation.first_step(initial, relative))


def _restored(program: TrainProgram, folder: Path, step: int) -> TrainState:
    """Returns the state of a checkpoint; with a fresh optimizer where it has only parameters, as converted runs do."""
    checkpoints = Checkpoints(folder, read_only=True)
    schema = checkpoints.recipe(step)["schema"]
    if "skipped" in schema:  # what `convert` writes has parameters, and an optimizer's state on request
        return checkpoints.restore(step, program.abstract_state)[0]
    with_optimizer = any(name.startswith("opt_state/") for name in schema)
    initial = Initial(str(folder / str(step)), optimizer_state=with_optimizer, count_on=True)
    return continuation.begin(initial, program, step)


def _as_task(
    metric_fns: Sequence[Callable[..., Any]],
    postprocess_fn: Callable[..., Any] | None,
    vocabularies: Mapping[str, Vocabulary],
) -> Any:
    """Returns what an evaluation asks of a seqio task."""
    kinds: dict[str, list[Any]] = {kind: [] for kind in _METRICS.values()}
    for function in metric_fns:
        parameters = inspect.signature(function).parameters.values()
        names = tuple(each.name for each in parameters if each.default is inspect.Parameter.empty)
        if names not in _METRICS:
            known = " or ".join(f"({', '.join(each)})" for each in _METRICS)
            raise UserError(f"metric function {getattr(function, '__name__', function)} takes {names}, not {known}")
        kinds[_METRICS[names]].append(function)
    features = {name: SimpleNamespace(vocabulary=each) for name, each in vocabularies.items()}
    post = postprocess_fn or (lambda text, **_: text)
    return SimpleNamespace(
        name=_NAME, output_features=features, postprocess_fn=post, metric_fns=list(metric_fns), metric_objs=(), **kinds
    )


def _field(number: int, fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        near = did_you_mean(name, fields)
        raise UserError(f"example {number} has no {name!r}, only {sorted(fields)}{near}")
    return fields[name]


def _listed(examples: Sequence[Example]) -> list[tuple[int, Mapping[str, Any]]]:
    """Returns (number, fields) of each example; a text alone is its `inputs`."""
    if isinstance(examples, str | Mapping):
        raise UserError("give a list of examples, each a dict such as {'inputs': ..., 'targets': ...}, or a text")
    for number, each in enumerate(examples):
        if not isinstance(each, str | Mapping):
            raise UserError(f"example {number} is neither a dict nor a text, but {type(each).__name__}")
    return list(enumerate({"inputs": each} if isinstance(each, str) else each for each in examples))
