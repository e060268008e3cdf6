"""Evaluation inside a training run: teacher-forced losses and predictions, on the training mesh."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.inference.decoding import Decoder, Stop
from meshway.framework.inference.sampling import Sampling
from meshway.framework.interfaces import ArraySpec, Batch, EvalTask, Metrics, Params
from meshway.framework.partitioning.placed_model import PlacedModel

# What one task's evaluation found: metrics by name, and some predictions for people to read.
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a recipe says of evaluation.

    `max_batches` bounds the teacher-forced pass (None reads the whole split); `max_predictions` examples are
    decoded by `decoder`, greedily unless another is bound, for the tasks that have metrics (0 decodes none), and
    `num_samples` of them are kept as text. `eos_id` ends a prediction.
    """

    max_batches: int | None = None
    max_predictions: int = 64
    num_samples: int = 8
    eos_id: int = 1
    decoder: Decoder = Sampling(temperature=0.0)


class Evaluator:
    """Evaluates parameters on tasks; the programs are compiled once, by the first evaluation."""

    def __init__(
        self,
        placed: PlacedModel,
        batch_size: int,
        lengths: Mapping[str, int],
        tasks: Sequence[EvalTask],
        settings: Evaluation,
    ):
        """`batch_size` counts examples over all processes; `lengths` are tokens by task feature."""
        self._placed, self._lengths, self._tasks, self._settings = placed, lengths, list(tasks), settings
        self._batch = placed.batch(batch_size, lengths)
        self._loss: Callable[..., Metrics] | None = None
        self._predict: dict[tuple, Callable[..., jax.Array]] = {}
        self._rows = placed.partitioner.process_rows(batch_size)

    @property
    def task_names(self) -> list[str]:
        """The tasks it evaluates, in order."""
        return [task.name for task in self._tasks]

    def evaluate(self, params: Params) -> tuple[dict[str, float], dict[str, Report]]:
        """Returns (scalars, reports by task).

        Scalars are `validation/<task>/<metric>`, and `validation/loss` over the tokens of all tasks. Every process
        must call it at the same step.
        """
        scalars: dict[str, float] = {}
        reports: dict[str, Report] = {}
        totals = np.zeros(2)
        for task in self._tasks:
            sums = self._teacher_forced(params, task)
            totals += sums["loss"]
            metrics = {name: float(total / max(weight, 1e-9)) for name, (total, weight) in sums.items()}
            samples: list[dict[str, str]] = []
            if task.has_metrics and self._settings.max_predictions:
                predicted, samples = self._predictions(params, task)
                metrics |= predicted
            scalars |= {f"validation/{task.name}/{name}": value for name, value in metrics.items()}
            reports[task.name] = {"metrics": metrics, "predictions": samples}
        if self._tasks:
            scalars["validation/loss"] = float(totals[0] / max(totals[1], 1e-9))
        return scalars, reports

    def _teacher_forced(self, params: Params, task: EvalTask) -> dict[str, np.ndarray]:
        if self._loss is None:
            self._loss = self._compile_loss()
        sums: dict[str, np.ndarray] = {}
        for index, (batch, _) in enumerate(task.batches()):
            if index == self._settings.max_batches:
                break
            metrics = jax.device_get(self._loss(params, self._batch.put(self._mine(batch))))
            for name, pair in metrics.items():
                sums[name] = sums.get(name, np.zeros(2)) + np.array(pair, np.float64)
        return sums

    def _predictions(self, params: Params, task: EvalTask) -> tuple[dict[str, float], list[dict[str, str]]]:
        predictions: list[Any] = []
        samples: list[dict[str, str]] = []
        limit = min(self._settings.max_predictions, task.num_examples)
        for batch, indices in _until(task.prompt_batches(), limit):
            tokens = np.asarray(self._decode(params, batch, indices))
            for index, row in zip(indices, tokens, strict=False):
                predictions.append(task.postprocess(int(index), row))
                if len(samples) < self._settings.num_samples:
                    target, prediction = str(task.target(int(index))), str(predictions[-1])
                    samples.append({"input": task.inputs_text(int(index)), "target": target, "prediction": prediction})
        return task.metrics(predictions), samples

    def _decode(self, params: Params, batch: Batch, indices: np.ndarray) -> jax.Array:
        """Returns the best prediction of each row, int32 [batch, length]."""
        key = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
        partitioner = self._placed.partitioner
        shardings = partitioner.batch_shardings(
            {name: ArraySpec(x.shape, x.dtype, ("batch", *[None] * (x.ndim - 1))) for name, x in batch.items()}
        )
        rows = next(iter(batch.values())).shape[0]
        if key not in self._predict:
            model, length = self._placed.model, self._lengths["targets"]
            decoder, stop = self._settings.decoder, Stop((self._settings.eos_id,))

            def predict(params: Params, batch: Batch, ids: jax.Array) -> jax.Array:
                decoded = decoder(model, params, batch, length, stop, ids, jax.random.key(0))
                best = jnp.argmax(decoded.scores, axis=1)[:, None, None]
                return jnp.take_along_axis(decoded.tokens, best, axis=1)[:, 0]

            self._predict[key] = partitioner.compile(
                predict,
                self._placed.param_shapes,
                {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()},
                jax.ShapeDtypeStruct((rows,), np.int32),
                in_shardings=(self._placed.param_shardings, shardings, partitioner.replicated),
                out_shardings=partitioner.replicated,
            )
        ids = np.resize(indices, rows).astype(np.int32)  # rows past the examples repeat, and are not read
        placed = partitioner.put_batch(self._mine(batch), shardings, self._batch.size)
        return self._predict[key](params, placed, ids)

    def _compile_loss(self) -> Callable[..., Metrics]:
        model = self._placed.model

        def metrics(params: Params, batch: Batch) -> Metrics:
            loss, weight, metrics = model.loss(params, batch, None)
            return metrics | {"loss": (loss, weight)}

        return self._placed.partitioner.compile(
            metrics,
            self._placed.param_shapes,
            self._batch.abstract,
            in_shardings=(self._placed.param_shardings, self._batch.shardings),
            out_shardings=self._placed.partitioner.replicated,
        )

    def _mine(self, batch: Batch) -> Batch:
        return {name: rows[self._rows] for name, rows in batch.items()}


def _until(batches: Iterator[tuple[Batch, np.ndarray]], limit: int) -> Iterator[tuple[Batch, np.ndarray]]:
    for batch, indices in batches:
        if indices[0] >= limit:
            return
        yield batch, indices[indices < limit]
