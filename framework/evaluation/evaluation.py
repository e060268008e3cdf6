"""Evaluation of parameters on tasks: teacher-forced losses, predictions and scores, on the mesh of the parameters."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.data.source import EvalTask
from meshway.framework.errors import first_line
from meshway.framework.evaluation.records import record_name
from meshway.framework.inference.decoding import Decoder, Stop, decoding_model, one_ahead
from meshway.framework.inference.sampling import Sampling
from meshway.framework.interfaces import Batch, Metrics, Params
from meshway.framework.partitioning.program_cache import ProgramCache
from meshway.framework.partitioning.sharded_model import ShardedModel

# The result of one task, as it is written to files: `metrics` by name; `counts` of the rows, tokens and examples behind
# them; some `predictions` as text; `failed`, if any: function of the task -> what it raised.
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
      decoder: how predictions are made; each task says what ends them.
    """

    max_batches: int | None = None
    max_predictions: int | None = 64
    num_samples: int = 8
    decoder: Decoder = Sampling(temperature=0.0)


class TaskResult(NamedTuple):
    """The result of one task.

    Attributes:
      name: of the task.
      report: what was found.
      loss: its summed loss, and weight.
      note: what is to be said of it, once; "" for nothing.
    """

    name: str
    report: Report
    loss: np.ndarray
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
          sharded: the model.
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
        if metrics and asks and any(task.has_metrics for task in tasks):
            decoding_model(sharded.model, _NO_PREDICTIONS)  # now, not after the steps before the first evaluation

    @property
    def task_names(self) -> list[str]:
        """The tasks it evaluates, in order."""
        return [task.name for task in self._tasks]

    @property
    def left_out(self) -> list[str]:
        """Which of the tasks' metrics cannot be run, a line each."""
        tasks = self._tasks if self._metrics else []
        return [f"{task.name}: evaluated without {what}" for task in tasks for what in task.left_out]

    def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Report]]:
        """Returns (scalars, reports by task).

        Scalars are `validation/<task>/<metric>`, and `validation/loss` over the tokens of all tasks. Every process
        must call it at the same step.
        """
        scalars, reports, _ = collected(("validation", None, result) for result in self.results(params))
        return scalars, reports

    def results(self, params: Params, observe: Observer = lambda *_: None) -> Iterator[TaskResult]:
        """Yields each task's result as soon as it is computed; every process must consume all of them."""
        for task in self._tasks:
            report: Report = {"metrics": {}, "counts": {}, "predictions": []}
            loss, rows, examples = np.zeros(2), 0, 0
            if self._losses:
                sums, rows = self._teacher_forced(params, task, observe)
                report["metrics"] |= {name: float(total / max(weight, 1e-9)) for name, (total, weight) in sums.items()}
                loss = sums["loss"]
                report["counts"] |= {"rows": rows, "tokens": float(loss[1])}
            if self._metrics:
                examples = self._add_metrics(report, params, task, observe)
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

    def _add_metrics(self, report: Report, params: Params, task: EvalTask, observe: Observer) -> int:
        """Adds the results of the task's own metric functions on predictions and scores; returns of how many of its
        first examples they are."""
        limit = self._settings.max_predictions
        limit = task.num_examples if limit is None else min(limit, task.num_examples)
        predictions: list[Any] | None = None
        aux: dict[str, list[float]] | None = None
        scores: dict[int, float] | None = None
        failed: dict[str, str] = {}
        if task.has_metrics and limit:
            predicted = self._predictions(params, task, limit, observe)
            report["predictions"], failed = predicted.samples, predicted.failed
            report["counts"]["predictions"] = len(predicted.values)
            if not failed:
                predictions, aux = predicted.values, {"scores": predicted.scores}
        if task.has_score_metrics and limit:
            scores = self._scores(params, task, limit, observe)
            report["counts"]["scores"] = len(scores)
        if predictions is not None or scores is not None:
            try:
                measured = task.metrics(predictions, aux, scores)
            except Exception as error:  # a target's postprocessing: the task's own code, like that of predictions
                failed |= {"postprocess_fn": described(error)}
            else:
                report["metrics"] |= measured.values
                failed |= measured.failures
        if failed:
            report["failed"] = failed
        return limit if task.has_metrics or task.has_score_metrics else 0

    def _predictions(self, params: Params, task: EvalTask, limit: int, observe: Observer) -> "_Predicted":
        found = _Predicted([], [], [], {})
        batches = _until(task.prompt_batches(), limit)
        for indices, decoded in one_ahead((each[1], self._decode(params, task, *each)) for each in batches):
            tokens, scores = map(np.asarray, decoded)
            for index, row, score in zip(indices.tolist(), tokens, scores.tolist(), strict=False):
                if found.failed:
                    break  # but go on with the programs, which other processes are part of
                try:
                    prediction = task.postprocess(index, row)
                    if len(found.samples) < self._settings.num_samples:
                        texts = {"input": task.inputs_text(index), "target": str(task.target(index))}
                        found.samples.append(texts | {"prediction": str(prediction)})
                except Exception as error:
                    found.failed["postprocess_fn"] = f"on example {index}: {described(error)}"
                    break
                found.values.append(prediction)
                found.scores.append(score)
            observe(task.name, "predictions", min(int(indices[-1]) + 1, limit), limit)
        return found

    def _decode(self, params: Params, task: EvalTask, batch: Batch, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Returns the best prediction of each row, int32 [batch, length], and its score, float32 [batch]."""
        model = decoding_model(self._sharded.model, _NO_PREDICTIONS)
        decoder, stop, length = self._settings.decoder, Stop(tuple(task.stop_ids)), task.lengths["targets"]

        def predict(params: Params, batch: Batch, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            decoded = decoder(model, params, batch, length, stop, ids, jax.random.key(0))
            best = jnp.argmax(decoded.scores, axis=1)[:, None, None]
            tokens = jnp.take_along_axis(decoded.tokens, best, axis=1)[:, 0]
            return tokens, jnp.max(decoded.scores, axis=1)

        rows = next(iter(batch.values())).shape[0]
        ids = np.resize(indices, rows).astype(np.int32)  # rows past the examples are repetitions, not read
        found: tuple[jax.Array, jax.Array]
        static = (tuple(task.stop_ids), length)
        found = self._run(task, "predictions", predict, params, batch, ids, static=static)
        return found

    def _scores(self, params: Params, task: EvalTask, limit: int, observe: Observer) -> dict[int, float]:
        """Returns example -> log-probability of its targets, of those of the first `limit` that have a row."""
        model = self._sharded.model

        def summed(params: Params, batch: Batch) -> jax.Array:
            scores = model.score(params, batch)
            return jnp.sum(scores.reshape(scores.shape[0], -1), axis=1)

        scores: dict[int, float] = {}
        batches = _until(task.score_batches(), limit)
        started = (
            (indices, self._run(task, "scores", summed, params, batch, spec=self._specs[task.name]))
            for batch, indices in batches
        )
        for indices, found in one_ahead(started):
            for index, score in zip(indices.tolist(), np.asarray(found, np.float64).tolist(), strict=False):
                scores[index] = scores.get(index, 0.0) + score
            observe(task.name, "scores", min(int(indices[-1]) + 1, limit), limit)
        return scores


class _Predicted(NamedTuple):
    """Postprocessed predictions of the first examples, their scores, some as text, and which functions failed."""

    values: list[Any]
    scores: list[float]
    samples: list[dict[str, str]]
    failed: dict[str, str]


def collected(
    found: Iterable[tuple[str, str | None, TaskResult]],
) -> tuple[dict[str, float], dict[str, Report], list[str]]:
    """Returns (scalars, reports by name of the record, what is to be said) of one step's evaluations.

    Scalars are `<label>/<task>/<metric>`, and `<label>/loss` over the tokens of all tasks of which a loss was found.

    Args:
      found: (label, split, result); a task's split is None for the usual one. Results of one task are joined.
    """
    scalars: dict[str, float] = {}
    reports: dict[str, Report] = {}
    totals: dict[str, np.ndarray] = {}
    notes: list[str] = []
    for label, split, (name, report, loss, note) in found:
        if "loss" in report["metrics"] or loss[1]:
            totals[label] = totals.get(label, np.zeros(2)) + loss
        scalars |= {f"{label}/{name}/{metric}": value for metric, value in report["metrics"].items()}
        record = record_name(name, split)
        report = report | ({"split": split} if split else {})
        reports[record] = _joined(reports[record], report) if record in reports else report
        notes += [note] if note else []
    scalars |= {f"{label}/loss": float(total / max(weight, 1e-9)) for label, (total, weight) in totals.items()}
    return scalars, reports, notes


def _joined(one: Report, other: Report) -> Report:
    """Returns two results of a task as one; of examples that were too long those of the pass that had more."""
    counts = one["counts"] | other["counts"]
    counts |= {
        name: max(each["counts"].get(name, 0) for each in (one, other))
        for name in ("truncated", "skipped")
        if name in counts
    }
    joined = one | other | {"metrics": one["metrics"] | other["metrics"], "counts": counts}
    failed = one.get("failed", {}) | other.get("failed", {})
    joined["predictions"] = one["predictions"] + other["predictions"]
    return joined | ({"failed": failed} if failed else {})


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


def described(error: Exception) -> str:
    """Returns an error of a task's own code in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def _until(batches: Iterator[tuple[Batch, np.ndarray]], limit: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields batches with the indices, ascending, of their examples before number `limit`."""
    for batch, indices in batches:
        if indices[0] >= limit:
            return
        yield batch, indices[indices < limit]
