"""Evaluation of parameters on tasks: teacher-forced losses, predictions and scores, on the mesh of the parameters."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.data.source import EvalTask, Merging
from meshway.framework.errors import described
from meshway.framework.inference.decoding import FREE, Decoder, Stop, decoding_model, one_ahead
from meshway.framework.inference.sampling import Sampling
from meshway.framework.interfaces import Batch, Metrics, Params
from meshway.framework.partitioning.sharded_model import ProgramCache, ShardedModel

# The result of one task, as it is written to files: `metrics` by name; `counts` of the rows, tokens and examples behind
# them; some `predictions` as text, and on request all of them, `kept`; and if any, `values` of metrics besides numbers,
# and `failed`: function of the task -> what it raised.
Report = dict[str, Any]

# Called with the progress of one task: (task, what it does, done, of how many).
Observer = Callable[[str, str, int, int], None]


_NO_PREDICTIONS = "set Evaluation.max_predictions to 0 to leave out metrics of predictions and scores"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The settings of evaluation in a recipe.

    Attributes:
      max_batches: of the teacher-forced pass; None reads the whole split.
      max_predictions: examples that are decoded, or scored, for tasks with metrics of predictions or of scores; None
        takes all, 0 none.
      num_samples: predictions that are kept as text.
      keep_predictions: whether all of them are kept, in `eval/<task>.predictions/<step>.jsonl`.
      all_decodes: whether metrics get all decodes of an example, the likeliest last, and their scores; else the
        likeliest alone.
      return_intermediates: whether metrics of scores get (scores, intermediates): the scores, weights and ids of the
        target tokens, and what `intermediates` names, each [examples, length, ...].
      intermediates: names of values of the model, as `Model.observe` has them.
      prompt_with_targets: whether predictions begin with the targets of their examples, without what ends them.
      decoder: how predictions are made; each task says what ends them.
      by_layer: whether predictions are decoded with weights taken apart by layer, once for each evaluation, as
        `ShardedModel.by_layer` has it: these are then there twice until it ends. False decodes with them as they are
        stored, and copies each layer's in every step.
    """

    max_batches: int | None = None
    max_predictions: int | None = 64
    num_samples: int = 8
    keep_predictions: bool = False
    all_decodes: bool = False
    return_intermediates: bool = False
    intermediates: Sequence[str] = ()
    prompt_with_targets: bool = False
    decoder: Decoder = Sampling(temperature=0.0)
    by_layer: bool = True


class TaskResult(NamedTuple):
    """The result of one task.

    Attributes:
      name: of the task.
      report: what was found.
      loss: its summed loss, and weight; None where nothing was run teacher-forced.
      note: what is to be said of it, once; "" for nothing.
    """

    name: str
    report: Report
    loss: np.ndarray | None
    note: str = ""


class Evaluator:
    """Evaluates parameters on tasks; programs are compiled by the first evaluation and kept."""

    def __init__(
        self,
        sharded: ShardedModel,
        tasks: Sequence[EvalTask],
        settings: Evaluation,
        losses: bool = True,
        metrics: bool = True,
    ):
        """Compiles nothing yet.

        Args:
          sharded: the model; one in another form than the stored one (`ShardedModel.in_form`) is decoded in it.
          tasks: what is evaluated.
          settings: how.
          losses: whether the loss and the model's own metrics are found, teacher-forced.
          metrics: whether the tasks' metrics of predictions and of scores are; without `losses` tasks that have none
            are left out.

        Raises:
          UserError: a task's batch size is not divisible over the mesh; tasks have metrics of predictions, and the
            model does not decode.
        """
        asks = settings.max_predictions != 0
        kept = [task for task in tasks if losses or (asks and (task.has_metrics or task.has_score_metrics))]
        self._sharded, self._tasks, self._settings = sharded, kept, settings
        self._losses, self._metrics = losses, metrics
        self._specs = {task.name: sharded.batch(task.batch_size, task.lengths).spec for task in tasks}
        self._programs = {task.batch_size: ProgramCache(sharded, task.batch_size) for task in tasks}
        self._decoding: dict[int, ProgramCache] = {}  # those that predict, by batch size
        if metrics and asks and any(task.has_metrics for task in tasks):
            decoding_model(sharded.model, _NO_PREDICTIONS)  # now, not after the steps before the first evaluation

    @functools.cached_property
    def _by_layer(self) -> ShardedModel:
        """The model as predictions read it."""
        return self._sharded.by_layer() if self._settings.by_layer else self._sharded

    @property
    def task_names(self) -> list[str]:
        """The tasks it evaluates, in order."""
        return [task.name for task in self._tasks]

    @property
    def left_out(self) -> list[str]:
        """Which of the tasks' metrics cannot be run, a line each."""
        tasks = self._tasks if self._metrics else []
        return [f"{task.name}: evaluated without {what}" for task in tasks for what in task.left_out]

    def results(self, params: Params, observe: Observer = lambda *_: None) -> Iterator[TaskResult]:
        """Yields each task's result as soon as it is computed; every process must consume all of them."""
        layers: Params | None = None
        for task in self._tasks:
            report: Report = {"metrics": {}, "counts": {}, "predictions": []}
            loss, rows, examples = None, 0, 0
            if self._losses:
                sums, rows = self._teacher_forced(params, task, observe)
                report["metrics"] |= {name: float(total / max(weight, 1e-9)) for name, (total, weight) in sums.items()}
                loss = sums["loss"]
                report["counts"] |= {"rows": rows, "tokens": float(loss[1])}
            if self._metrics and (examples := self._limit(task)):
                if task.has_metrics and layers is None:
                    layers = self._by_layer.split(params)
                found = self._own_metrics(params, layers, task, examples, observe)
                report["metrics"] |= found.pop("metrics")
                report["counts"] |= found.pop("counts")
                report |= found
            overlong = task.overlong(rows, examples)
            report["counts"] |= {"truncated": overlong.truncated}
            report["counts"] |= {"skipped": overlong.skipped} if overlong.skipped else {}
            yield TaskResult(task.name, report, loss, truncation(task.name, report["counts"], task.lengths))

    def _teacher_forced(self, params: Params, task: EvalTask, observe: Observer) -> tuple[dict[str, np.ndarray], int]:
        """Returns (sum and weight of each metric, how many rows were read)."""
        model = self._sharded.model

        def loss(params: Params, batch: Batch) -> Metrics:
            loss, weight, metrics = model.loss(params, batch, None)
            return metrics | {"loss": (loss, weight)}

        sums: dict[str, np.ndarray] = {"loss": np.zeros(2)}
        rows = 0
        batches = itertools.islice(task.batches(), self._settings.max_batches)
        run = functools.partial(self._run, task, "loss", loss, params, spec=self._specs[task.name])
        started = ((real, run(batch)) for batch, real in batches)
        for real, metrics in one_ahead(started):
            for name, pair in jax.device_get(metrics).items():
                sums[name] = sums.get(name, np.zeros(2)) + np.array(pair, np.float64)
            rows += real
            observe(task.name, "loss", rows, task.num_rows)
        return sums, rows

    def _run(self, task: EvalTask, *arguments: Any, **options: Any) -> Any:
        """Runs a program on a batch of a task, as `ProgramCache.run`."""
        return self._programs[task.batch_size].run(*arguments, **options)

    def _run_decoding(self, task: EvalTask, *arguments: Any, **options: Any) -> Any:
        """Runs one that predicts, of parameters by layer."""
        made = self._decoding.setdefault(task.batch_size, ProgramCache(self._by_layer, task.batch_size))
        return made.run(*arguments, **options)

    def _limit(self, task: EvalTask) -> int:
        """Returns of how many of a task's first examples its own metrics are."""
        if not (task.has_metrics or task.has_score_metrics):
            return 0
        limit = self._settings.max_predictions
        return task.num_examples if limit is None else min(limit, task.num_examples)

    def _own_metrics(
        self, params: Params, layers: Params | None, task: EvalTask, limit: int, observe: Observer
    ) -> Report:
        """Returns what the task's own metrics of predictions and scores find, of its first `limit` examples; `layers`
        are the parameters as predictions read them."""
        counts: dict[str, int] = {}
        found: Report = {"counts": counts, "metrics": {}}
        failed: dict[str, str] = {}
        merging = task.merging(self._settings.return_intermediates)
        given: dict[str, Any] = {"merged": merging, "paired": self._settings.return_intermediates}
        if layers is not None and task.has_metrics:
            predicted = self._predictions(layers, task, limit, merging, observe)
            found["predictions"] = predicted.samples[: self._settings.num_samples]
            failed |= predicted.failed
            if self._settings.keep_predictions:
                numbered = enumerate(zip(predicted.samples, predicted.scores, strict=False))
                found["kept"] = [{"example": index, **texts, "score": score} for index, (texts, score) in numbered]
            counts["predictions"] = predicted.count
            given["aux_values"] = {"scores": predicted.scores}
            given["tokens"] = np.stack(predicted.tokens) if merging.needs_tokens else None
            given["predictions"] = predicted.values if merging.needs_predictions and not failed else None
        if task.has_score_metrics:
            given["scores"], given["intermediates"] = self._scores(params, task, limit, merging, observe)
            counts["scores"] = len(given["scores"])
        try:
            measured = task.metrics(**given)
        except Exception as error:  # a target's postprocessing: the task's own code, like that of predictions
            failed |= {"postprocess_fn": described(error)}
        else:
            found["metrics"] = measured.values
            found |= {"values": measured.shown} if measured.shown else {}
            failed |= measured.failures
        return found | ({"failed": failed} if failed else {})

    def _predictions(
        self, params: Params, task: EvalTask, limit: int, merging: Merging, observe: Observer
    ) -> "_Predicted":
        """Returns the predictions of the first `limit` examples, as far as metrics need them of all at once."""
        found, settings = _Predicted(), self._settings
        batches = _until(task.prompt_batches(), limit)
        for indices, decoded in one_ahead((each[1], self._decode(params, task, *each)) for each in batches):
            tokens, scores = (np.asarray(each)[: len(indices)] for each in decoded)
            merging.predicted(indices.tolist(), tokens, scores.tolist())
            found.scores += scores.tolist()
            found.tokens += list(tokens) if merging.needs_tokens else []
            for index, row in zip(indices.tolist(), tokens, strict=True):
                if found.failed:
                    break  # not the loop over batches: other processes are part of their programs
                as_text = settings.keep_predictions or len(found.samples) < settings.num_samples
                try:
                    prediction = task.postprocess(index, row) if as_text or merging.needs_predictions else None
                    if as_text:
                        texts = {"input": task.inputs_text(index), "target": str(task.target(index))}
                        found.samples.append(texts | {"prediction": str(prediction)})
                except Exception as error:
                    found.failed["postprocess_fn"] = f"on example {index}: {described(error)}"
                    break
                found.count += 1
                found.values += [prediction] if merging.needs_predictions else []
            observe(task.name, "predictions", min(int(indices[-1]) + 1, limit), limit)
        return found

    def _decode(self, params: Params, task: EvalTask, batch: Batch, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Returns the best prediction of each row, int32 [batch, length], and its score, float32 [batch]; of all
        decodes [batch, decodes, length] and [batch, decodes], in increasing order of the scores."""
        model = decoding_model(self._sharded.model, _NO_PREDICTIONS)
        decoder, stop, length = self._settings.decoder, Stop(tuple(task.stop_ids)), task.lengths["targets"]

        def predict(
            params: Params, batch: Batch, ids: jax.Array, forced: jax.Array | None = None
        ) -> tuple[jax.Array, jax.Array]:
            decoded = decoder(model, params, batch, length, stop, ids, jax.random.key(0), forced)
            if self._settings.all_decodes:
                order = jnp.argsort(decoded.scores, axis=1)
                scores = jnp.take_along_axis(decoded.scores, order, axis=1)
                return jnp.take_along_axis(decoded.tokens, order[:, :, None], axis=1), scores
            best = jnp.argmax(decoded.scores, axis=1)[:, None, None]
            tokens = jnp.take_along_axis(decoded.tokens, best, axis=1)[:, 0]
            return tokens, jnp.max(decoded.scores, axis=1)

        rows = next(iter(batch.values())).shape[0]
        ids = np.resize(indices, rows).astype(np.int32)  # rows past the examples are repetitions, not read
        found: tuple[jax.Array, jax.Array]
        static = (tuple(task.stop_ids), length)
        begun = [_begun(task, ids, length)] if self._settings.prompt_with_targets else []
        found = self._run_decoding(task, "predictions", predict, params, batch, ids, *begun, static=static)
        return found

    def _scores(
        self, params: Params, task: EvalTask, limit: int, merging: Merging, observe: Observer
    ) -> tuple[dict[int, float], dict[str, Any] | None]:
        """Returns (example -> log-probability of its targets, what the model computed beside these if metrics need it
        of all at once), of those of the first `limit` examples that have a row."""
        model, settings = self._sharded.model, self._settings
        beside = settings.return_intermediates or task.needs_intermediates

        def scored(params: Params, batch: Batch) -> dict[str, jax.Array]:
            scores = model.score(params, batch)
            found = {"sum": jnp.sum(scores.reshape(scores.shape[0], -1), axis=1)}
            if beside:
                kept = {name.removeprefix("decoder_"): batch[name] for name in _KEPT if name in batch}
                observed = model.observe(params, batch, settings.intermediates) if settings.intermediates else {}
                found |= {"token_scores": scores} | kept | observed
            return found

        scores = _Scores(merging, beside)
        started = (
            (indices, self._run(task, "scores", scored, params, batch, spec=self._specs[task.name], static=beside))
            for batch, indices in _until(task.score_batches(), limit)
        )
        for indices, found in one_ahead(started):
            scores.add(indices.tolist(), {name: np.asarray(array) for name, array in found.items()})
            observe(task.name, "scores", min(int(indices[-1]) + 1, limit), limit)
        scores.merge()
        return scores.values, _intermediates(scores.rows) if merging.needs_intermediates else None


_KEPT = ("decoder_target_tokens", "decoder_loss_weights")  # of a batch, beside the scores of its tokens


def _intermediates(rows: Mapping[int, Sequence[Mapping[str, np.ndarray]]]) -> dict[str, Any]:
    """Returns values [examples, length, ...] as T5X's models have them, {'decoder': {name: (array,)}}, of each
    example's rows, which are joined; shorter ones end in zeros."""
    names = [name for name in next(iter(rows.values()))[0] if name != "sum"] if rows else []
    arrays = {}
    for name in names:
        joined = [np.concatenate([row[name] for row in rows[index]]) for index in sorted(rows)]
        longest = max(map(len, joined))
        padded = [np.pad(each, [(0, longest - len(each))] + [(0, 0)] * (each.ndim - 1)) for each in joined]
        arrays[name] = (np.stack(padded),)
    return {"decoder": arrays}


def _begun(task: EvalTask, indices: np.ndarray, length: int) -> np.ndarray:
    """Returns the targets of examples as tokens that predictions begin with, int32 [examples, length], FREE after them
    and in place of what ends them."""
    forced = np.full((len(indices), length), FREE, np.int32)
    for row, example in zip(forced, task.read(indices.tolist()), strict=True):
        targets = np.asarray(example["targets"])[:length]
        row[: len(targets)] = np.where(np.isin(targets, list(task.stop_ids)), FREE, targets)
    return forced


class _Scores:
    """The scores of examples by index, as their rows come, which follow each other; and, if anything needs what the
    model computed beside them, that of each row."""

    def __init__(self, merging: Merging, beside: bool) -> None:
        self._merging, self._beside = merging, beside
        self._waiting: list[int] = []  # examples that metrics which merge have not had
        self.values: dict[int, float] = {}
        self.rows: dict[int, list[dict[str, np.ndarray]]] = {}

    def add(self, indices: Sequence[int], arrays: Mapping[str, np.ndarray]) -> None:
        """Takes the rows of a batch: the example of each, and name -> [rows, ...]."""
        for row, index in enumerate(indices):
            if index not in self.values:
                self._waiting.append(index)
            self.values[index] = self.values.get(index, 0.0) + float(arrays["sum"][row])
            if self._beside:
                self.rows.setdefault(index, []).append({name: each[row] for name, each in arrays.items()})
        self.merge(all_but=1)  # whose next row may be in the next batch

    def merge(self, all_but: int = 0) -> None:
        """Gives the metrics that merge the examples that they have not had, without the last `all_but`."""
        whole = self._waiting[: len(self._waiting) - all_but]
        self._waiting = self._waiting[len(whole) :]
        if whole and self._merging.takes_scores:
            beside = _intermediates({index: self.rows[index] for index in whole}) if self._beside else None
            self._merging.scored(whole, [self.values[index] for index in whole], beside)
        if not self._merging.needs_intermediates:
            for index in whole:
                self.rows.pop(index, None)


@dataclasses.dataclass
class _Predicted:
    """Predictions of the first examples: how many could be postprocessed, these and their token ids as far as metrics
    need them, all scores, some or all as text, and which functions failed."""

    count: int = 0
    values: list[Any] = dataclasses.field(default_factory=list)
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    scores: list[Any] = dataclasses.field(default_factory=list)
    samples: list[dict[str, str]] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def truncation(task: str, counts: Mapping[str, Any], lengths: Mapping[str, int]) -> str:
    """Returns a line that says how many examples of a task were too long for their lengths; "" for none."""
    truncated, skipped = counts.get("truncated", 0), counts.get("skipped", 0)
    parts = [
        f"{count:,} example{' was' if count == 1 else 's were'} {what}"
        for count, what in ((truncated, "truncated"), (skipped, "left out"))
        if count
    ]
    if not parts:
        return ""
    return f"{task}: {' and '.join(parts)}, longer than {dict(lengths)}; EVAL_FEATURE_LENGTHS=None has room for all"


def _until(batches: Iterator[tuple[Batch, np.ndarray]], limit: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields batches with the indices, ascending, of their examples before number `limit`."""
    for batch, indices in batches:
        if indices[0] >= limit:
            return
        yield batch, indices[indices < limit]
