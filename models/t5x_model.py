"""Models written for T5X as models of ours: their losses and parameters, under our step, rules and checkpoints."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from meshway.models.linen import T5X_AXES, Patterns, VariableOptions, Variables
from meshway.models.losses import CrossEntropy, Metrics, TokenSpec, text_spec, token_targets
from meshway.models.objectives import Batch, RowDecoding


class T5XModel(Variables):
    """A model written for T5X's `BaseModel`: it has `get_initial_variables` and `loss_fn`, and may have `eval_fn` and
    `score_batch`. Nothing is inherited; its optimizer is not read, and it predicts nothing.

    The step normalises the loss, by LOSS_NORMALIZING_FACTOR over the global batch: `loss_fn` must return the sum over
    weighted targets, as T5X's own models do by default, or else `loss_is_mean` says that it returns their mean.
    """

    def __init__(
        self,
        model: Any,
        lengths: Mapping[str, int],
        encoder: bool = True,
        prefix: bool = False,
        loss_is_mean: bool = False,
        param_axes: Patterns = (),
        axis_names: Mapping[str, str | None] = T5X_AXES,
    ):
        """`linen.Linen` documents the arguments that are not above.

        Raises:
          ValueError: the model lacks a method, or divides its loss itself.
        """
        super().__init__(type(model).__name__, VariableOptions(param_axes, axis_names))
        if lacking := [name for name in self._needs() if not callable(getattr(model, name, None))]:
            raise ValueError(f"{self._name} has no method {lacking[0]}, which T5X's models have")
        factor = getattr(model, "_loss_normalizing_factor", None)
        if factor is not None and not loss_is_mean:
            raise ValueError(
                f"{self._name} divides its loss by loss_normalizing_factor = {factor!r}, for each microbatch: give the "
                "model None, and bind LOSS_NORMALIZING_FACTOR, by which a step divides once"
            )
        self._model, self._encoder, self._prefix, self._mean = model, encoder, prefix, loss_is_mean
        self._example = self.batch_spec(1, lengths)

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch, those of T5X's converters."""
        return text_spec(batch_size, lengths, self._encoder, self._prefix)

    def initial_variables(self, rng: jax.Array) -> Mapping[str, Any]:
        """Returns what `get_initial_variables` makes for a batch of one row."""
        types = {name: spec.dtype for name, spec in self._example.items()}
        return self._model.get_initial_variables(rng, {name: spec.shape for name, spec in self._example.items()}, types)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics); `rng` None means `eval_fn`, where the model has it."""
        with nn.logical_axis_rules(self._rules()):
            if rng is None and hasattr(self._model, "eval_fn"):
                loss, metrics = self._model.eval_fn(params, batch)
            else:
                loss, metrics = self._model.loss_fn(params, batch, rng)
        weight = jnp.sum(batch["decoder_loss_weights"])
        if isinstance(metrics, tuple):  # (weight, metrics), as T5X once had it
            weight, metrics = metrics
        sums = {name: pair for name, pair in as_sums(metrics).items() if name != "loss"}
        return (loss * weight if self._mean else loss).astype(jnp.float32), weight, sums

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each row, float32 [batch, 1], or of each target, as `score_batch` does.

        Raises:
          ValueError: the model has no `score_batch`.
        """
        if not hasattr(self._model, "score_batch"):
            raise ValueError(f"{self._name} has no method score_batch: it scores nothing")
        with nn.logical_axis_rules(self._rules()):
            scores = self._model.score_batch(params, batch)
        return scores[:, None] if scores.ndim == 1 else scores

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Raises ValueError: such a model shows no intermediates."""
        raise ValueError(f"{self._name} shows no intermediates; a Linen module does, by linen.Linen")

    def _needs(self) -> tuple[str, ...]:
        return ("get_initial_variables", "loss_fn")


class T5XTransformer(RowDecoding, T5XModel):
    """A model written for T5X's `BaseTransformerModel`: its `_compute_logits` scores each target, and predicts."""

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, length, vocab]."""
        with nn.logical_axis_rules(self._rules()):
            return self._model._compute_logits(params, batch, rng).astype(jnp.float32)

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each target, float32 [batch, length], 0 where its weight is 0."""
        logits = self.logits(params, batch, None)
        return CrossEntropy().score(lambda logits: logits, logits, *token_targets(batch, "decoder"))

    def _needs(self) -> tuple[str, ...]:
        return (*super()._needs(), "_compute_logits")


def as_sums(metrics: Any) -> Metrics:
    """Returns metrics as (sum, weight): numbers, such pairs, and clu's or T5X's metrics that are sums over counts, in a
    mapping or in a collection of clu's.

    Raises:
      ValueError: one is no mean of a sum, as clu's Std; it would be reported as one.
    """
    if not isinstance(metrics, Mapping):  # a `clu.metrics.Collection`
        metrics = {name: metric for name, metric in vars(metrics).items() if not name.startswith("_")}
    found: Metrics = {}
    for name, metric in metrics.items():
        fields = {field.name for field in dataclasses.fields(metric)} if dataclasses.is_dataclass(metric) else set()
        if isinstance(metric, tuple) and len(metric) == 2:
            found[name] = metric
        elif isinstance(metric, (jax.Array, float, int)):
            found[name] = jnp.asarray(metric, jnp.float32), jnp.ones((), jnp.float32)
        elif "total" in fields <= {"total", "count", "steps"}:
            weight = getattr(metric, "count", None)
            found[name] = jnp.asarray(metric.total), jnp.asarray(1.0 if weight is None else weight, jnp.float32)
        elif "duration" not in fields:  # time (TimeRate, StepsPerTime) is in reports already
            raise ValueError(
                f"metric {name!r} is a {type(metric).__name__}, which is no sum over a count: return (sum, weight) for "
                "it, or an Average of clu.metrics"
            )
    return found
