"""What is trained, one pytree, and the train step: a pure function of (state, batch).

What the summed loss of a batch is divided by is T5X's `loss_normalizing_factor`, its names and meanings (t5x/losses.py,
`SpecialLossNormalizingFactor`).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import constrain
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Metrics, Model, Params, untrained
from meshway.framework.optimizers.optimizers import BoundOptimizer, ParameterAverage
from meshway.framework.trees import flatten, matching, merge, select

# A number divides as it is, None leaves the sum; the words are those of `divisor` and `reweighted`.
LossNormalizingFactor = (
    float | Literal["NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE"] | None
)


def check_factor(factor: LossNormalizingFactor) -> None:
    """Raises UserError for a number that nothing can be divided by."""
    if not isinstance(factor, str) and factor is not None and not factor > 0:
        raise UserError(f"loss_normalizing_factor = {factor}: it must be above 0, one of T5X's words, or None")


def reweighted(factor: LossNormalizingFactor, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """Returns the batch with its loss weights as the factor asks for.

    AVERAGE_PER_SEQUENCE divides each token's weight by the sum of its sequence's, so that examples count alike whatever
    their length, packed or not; others leave weights as they are. Sequences are the segments of a row where the batch
    has `..._segment_ids` beside `..._loss_weights` [batch, length], else whole rows.
    """
    if factor != "AVERAGE_PER_SEQUENCE":
        return batch
    changed = {}
    for name, weights in batch.items():
        if name.endswith("loss_weights") and weights.ndim == 2:
            changed[name] = _per_sequence(weights, batch.get(name.replace("loss_weights", "segment_ids")))
    return {**batch, **changed}


def divisor(factor: LossNormalizingFactor, batch: Mapping[str, jax.Array], weight: jax.Array) -> jax.Array | float:
    """Returns what a batch's summed gradient is divided by.

    Args:
      factor: NUM_REAL_TARGET_TOKENS, and AVERAGE_PER_SEQUENCE once weights are `reweighted`, divide by `weight`;
        NUM_TOTAL_TARGET_TOKENS by the number of targets with padding.
      batch: the whole of it, as the step takes it.
      weight: the summed weight of its loss.
    """
    if factor is None:
        return 1.0
    if not isinstance(factor, str):
        return factor
    if factor == "NUM_TOTAL_TARGET_TOKENS":
        return float(sum(np.prod(x.shape) for name, x in batch.items() if name.endswith("loss_weights")))
    return jnp.maximum(weight, 1e-9)


def _per_sequence(weights: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """Returns weights [batch, length] divided by their sum over each sequence, 0 where that is 0."""
    if segment_ids is None:
        sums = jnp.sum(weights, axis=1, keepdims=True)
    else:
        length = weights.shape[1]  # no row has more segments than tokens

        def of_row(weights: jax.Array, segment_ids: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(weights, segment_ids, num_segments=length + 1)[segment_ids]

        sums = jax.vmap(of_row)(weights, segment_ids)
    return jnp.where(sums > 0, weights / jnp.where(sums > 0, sums, 1.0), 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """`step` counts batches taken; `skipped` those whose update was left out because it was not finite or a spike, of
    which `skipped_in_a_row` directly before now. No RNG: randomness is a function of (seed, step).

    `average` has averages of trained parameters, `spikes` what a `SpikeGuard` remembers; both are {} where the recipe
    does not ask for them, and then no checkpoint has them.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    average: Params = dataclasses.field(default_factory=dict)
    spikes: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """Leaves out the update of a step whose loss or gradient norm is far above its running mean.

    PaLM (arXiv:2204.02311, section 5.1) goes back to a checkpoint and skips some hundred batches around a spike, for
    which `train.train.skip_batches` is there; this leaves out such a step as it comes, as one that is not finite. Means
    are over the steps whose updates were done, with the bias of their beginning corrected (Adam's, section 3).

    Attributes:
      loss, grad_norm: the largest multiple of its mean that each may have; None for any. Losses must be positive.
      decay: of the means.
      warmup_steps: how many first steps are never left out.
    """

    loss: float | None = None
    grad_norm: float | None = None
    decay: float = 0.99
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("loss", "grad_norm"):
            factor = getattr(self, name)
            if factor is not None and not factor > 1:
                raise UserError(f"SpikeGuard.{name} = {factor}: a multiple of the mean must be above 1")

    def init(self) -> dict[str, jax.Array]:
        """Returns sums of losses and norms that are weighted alike, and their number."""
        zero = jnp.zeros((), jnp.float32)
        return {"loss": zero, "grad_norm": zero, "count": jnp.zeros((), jnp.int32)}

    def judge(
        self, state: dict[str, jax.Array], finite: jax.Array, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array], Metrics]:
        """Returns (whether the update is done, the next state, metrics: the means and the share of spikes)."""
        count, one, fine = state["count"], jnp.ones((), jnp.float32), finite
        new, metrics = {"count": count + 1}, {}
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            mean = state[name] / jnp.maximum(1.0 - self.decay ** count.astype(jnp.float32), 1e-9)
            factor, new[name] = getattr(self, name), self.decay * state[name] + (1.0 - self.decay) * value
            metrics[f"{name}_mean"] = jnp.where(count > 0, mean, 0.0), jnp.where(count > 0, one, 0.0)
            if factor is not None:
                fine &= (count < self.warmup_steps) | (value <= factor * mean)
        metrics["spikes"] = (finite & ~fine).astype(jnp.float32), one
        return fine, {name: jnp.where(fine, new[name], state[name]) for name in state}, metrics


def state_axes(
    model: Model,
    optimizer: BoundOptimizer,
    average: ParameterAverage | None = None,
    spikes: SpikeGuard | None = None,
) -> Any:
    """Returns the logical axes of each leaf of the state, in the tree of a `TrainState`."""
    scalar: Any = ()
    averaged: Any = optimizer.axes if average else {}
    remembered: Any = jax.tree.map(lambda _: scalar, spikes.init()) if spikes else {}
    return TrainState(scalar, model.axes(), optimizer.state_axes(), scalar, scalar, averaged, remembered)


def init_state(
    model: Model,
    optimizer: BoundOptimizer,
    rng: jax.Array,
    average: ParameterAverage | None = None,
    spikes: SpikeGuard | None = None,
) -> TrainState:
    """Returns the state before the first step. Pure: trace it for shapes, jit it into shards."""
    params = model.init(rng)
    zero = jnp.zeros((), jnp.int32)
    averaged = average.init(select(params, optimizer.trainable)) if average else {}
    return TrainState(zero, params, optimizer.init(params), zero, zero, averaged, spikes.init() if spikes else {})


Gradients = Any  # like Params
VARIABLES = "variables"  # among a step's metrics: new values of those that the loss itself updates, never reported
# Normalised gradients and metrics of this step's batch at the given parameters.
GradientAt = Callable[[Params], tuple[Gradients, Metrics]]
# Which gradient the optimizer gets: may call `gradient_at` more than once (sharpness-aware methods do).
GradientRule = Callable[[GradientAt, Params], tuple[Gradients, Metrics]]


def plain_gradient(gradient_at: GradientAt, params: Params) -> tuple[Gradients, Metrics]:
    """The gradient where the parameters are."""
    return gradient_at(params)


@dataclasses.dataclass(frozen=True)
class WeightStatistics:
    """What parameters are like, as metrics: those of T5X's `WeightMetricsComputer`, by its names.

    `weight_rms/NAME` and `weight_max/NAME` (of absolute values) after the update, `weight_gradient_rms/NAME` (before
    clipping), `weight_update_rms/NAME`, and `weight_update_divided_by_weight_rms/NAME` over entries that are not 0.

    Attributes:
      every: computed every so many steps; reports of steps between have none. None never computes them.
      groups: (name, regex over whole '/'-joined paths) of parameters that are taken together; () for each by itself.
    """

    every: int | None = 100
    groups: Sequence[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UserError(f"WeightStatistics.every = {self.every}: it must be at least 1")

    def members(self, paths: Collection[str]) -> dict[str, list[str]]:
        """Returns the parameters of each name; UserError for a regex that matches none."""
        if not self.groups:
            return {path: [path] for path in paths}
        return {name: matching(pattern, paths, "WeightStatistics.groups") for name, pattern in self.groups}

    def __call__(self, step: jax.Array, before: Params, after: Params, gradients: Gradients) -> Metrics:
        """Returns the metrics of step number `step`, of weight 0 where it has none."""
        old, new, slopes = flatten(before), flatten(after), flatten(gradients)
        groups = self.members(new)

        def found() -> dict[str, jax.Array]:
            values = {}
            for name, paths in groups.items():
                changes = [new[path] - old[path] for path in paths]
                ratios = [
                    jnp.where(old[p] == 0, 0.0, c / jnp.where(old[p] == 0, 1, old[p])) for p, c in zip(paths, changes)
                ]
                nonzero = sum(jnp.sum(old[path] != 0) for path in paths)
                values[f"weight_rms/{name}"] = _rms([new[path] for path in paths])
                values[f"weight_gradient_rms/{name}"] = _rms([slopes[path] for path in paths])
                values[f"weight_update_rms/{name}"] = _rms(changes)
                values[f"weight_update_divided_by_weight_rms/{name}"] = _rms(ratios, nonzero)
                values[f"weight_max/{name}"] = jnp.max(jnp.stack([jnp.max(jnp.abs(new[path])) for path in paths]))
            return {name: value.astype(jnp.float32) for name, value in values.items()}

        now = step % (self.every or 1) == 0
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(found))
        weight = now.astype(jnp.float32)
        return {name: (value, weight) for name, value in jax.lax.cond(now, found, lambda: zeros).items()}


def _rms(arrays: Sequence[jax.Array], size: jax.Array | float | None = None) -> jax.Array:
    """Returns the root of the mean square of all entries, whose number is `size` unless None."""
    total = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays)
    return jnp.sqrt(total / jnp.maximum(float(sum(x.size for x in arrays)) if size is None else size, 1))


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class TrainStep:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Losses come as sums and weights, are added over microbatches in float32, and are divided once, by the summed weight
    unless `loss_normalizing_factor` says otherwise (`divisor`): how a batch was sharded cannot change the
    result. A step whose loss or gradient is not finite, or that `spikes` refuses, leaves parameters and optimizer as
    they were and is counted. Dropout is drawn by the generator `rng_impl`, jax's default if it is None.
    """

    model: Model
    optimizer: BoundOptimizer
    seed: int
    num_microbatches: int = 1
    gradient_rule: GradientRule = plain_gradient
    loss_normalizing_factor: LossNormalizingFactor = "NUM_REAL_TARGET_TOKENS"
    average: ParameterAverage | None = None
    spikes: SpikeGuard | None = None
    statistics: WeightStatistics | None = None
    rng_impl: str | None = None

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        gradients, metrics = self.gradients(state.params, batch, state.step)
        metrics = dict(metrics)
        variables: Any = metrics.pop(VARIABLES, {})
        params, opt_state, stats = self.optimizer.update(gradients, state.opt_state, state.params)
        loss_sum, weight = metrics["loss"]
        done = jnp.isfinite(loss_sum) & jnp.isfinite(stats["grad_norm"])
        remembered = state.spikes
        if self.spikes:
            mean = loss_sum / jnp.maximum(weight, 1e-9)
            done, remembered, told = self.spikes.judge(state.spikes, done, mean, stats["grad_norm"])
            metrics |= told
        averaged = self.average.update(state.average, params, state.step) if self.average else {}
        params = merge(params, variables) if variables else params
        params, opt_state, averaged = jax.tree.map(
            lambda new, old: jnp.where(done, new, old),
            (params, opt_state, averaged),
            (state.params, state.opt_state, state.average),
        )
        bad = jnp.where(done, 0, 1).astype(jnp.int32)
        skipped, in_a_row = state.skipped + bad, (state.skipped_in_a_row + 1) * bad
        new_state = TrainState(state.step + 1, params, opt_state, skipped, in_a_row, averaged, remembered)
        one = jnp.ones((), jnp.float32)
        extra = {name: (jnp.asarray(value, jnp.float32), one) for name, value in stats.items()}
        extra["skipped_steps"] = (new_state.skipped.astype(jnp.float32), one)
        extra["skipped_in_a_row"] = (new_state.skipped_in_a_row.astype(jnp.float32), one)
        if self.statistics:
            trained = [select(tree, self.optimizer.trainable) for tree in (state.params, params, gradients)]
            extra |= self.statistics(new_state.step, *trained)
        return new_state, metrics | extra | _token_count(batch)

    @property
    def _has_variables(self) -> bool:
        """Whether the loss updates variables that no gradient trains, such as batch statistics (see `Updates`)."""
        return bool(untrained(self.model))

    def gradients(self, params: Params, batch: Mapping[str, jax.Array], step: jax.Array) -> tuple[Gradients, Metrics]:
        """Returns what the optimizer gets of a batch in step number `step`, and the step's metrics."""
        rng = jax.random.fold_in(jax.random.key(self.seed, impl=self.rng_impl), step)

        def gradient_at(params: Params) -> tuple[Gradients, Metrics]:
            return self._normalized_gradients(params, batch, rng)

        return self.gradient_rule(gradient_at, params)

    def _normalized_gradients(
        self, params: Params, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[Gradients, Metrics]:
        batch = reweighted(self.loss_normalizing_factor, batch)
        if self.num_microbatches == 1:
            gradients, metrics = self._summed_gradients(params, batch, rng)
        else:
            gradients, metrics = self._accumulated_gradients(params, batch, rng)
        scale = 1.0 / divisor(self.loss_normalizing_factor, batch, metrics["loss"][1])
        return jax.tree.map(lambda gradient: gradient * scale, gradients), metrics

    def _summed_gradients(
        self, params: Params, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[Gradients, Metrics]:
        def summed(params: Params) -> tuple[jax.Array, Metrics]:
            if self._has_variables:
                loss, weight, metrics, variables = self.model.loss_and_updates(params, batch, rng)  # type: ignore
                return loss, metrics | {"loss": (loss, weight), VARIABLES: variables}
            loss, weight, metrics = self.model.loss(params, batch, rng)
            return loss, metrics | {"loss": (loss, weight)}

        (_, metrics), gradients = jax.value_and_grad(summed, has_aux=True)(params)
        return gradients, metrics

    def _accumulated_gradients(
        self, params: Params, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[Gradients, Metrics]:
        count = self.num_microbatches

        def split(feature: jax.Array) -> jax.Array:
            # Microbatch i takes rows i, i + count, ...: each lies on all devices that hold the batch.
            return jnp.swapaxes(feature.reshape(-1, count, *feature.shape[1:]), 0, 1)

        def one(params: Params, index: jax.Array, micro: Mapping[str, jax.Array]) -> tuple[Gradients, Metrics]:
            micro = {name: constrain(x, ("batch", *([None] * (x.ndim - 1)))) for name, x in micro.items()}
            return self._summed_gradients(params, micro, jax.random.fold_in(rng, index))

        def add(carry: Any, micro: tuple[jax.Array, Mapping[str, jax.Array]]) -> tuple[Any, None]:
            total, variables = carry  # each microbatch starts from the variables that the one before left, as in T5X
            gradients, metrics = one(merge(params, variables) if variables else params, *micro)
            variables = metrics.pop(VARIABLES, {})
            return (jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (gradients, metrics)), variables), None

        micros = (jnp.arange(count), {name: split(feature) for name, feature in batch.items()})
        gradients, metrics = jax.eval_shape(one, params, *jax.tree.map(lambda x: x[0], micros))
        variables = select(params, flatten(metrics.pop(VARIABLES, {})))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (gradients, metrics))
        ((gradients, metrics), variables), _ = jax.lax.scan(add, (zeros, variables), micros)
        return gradients, metrics | ({VARIABLES: variables} if variables else {})


def rng_impl_of(use_hardware_rng: bool | str) -> str | None:
    """Returns the generator of dropout: None for jax's default, T5X's choice 'unsafe_rbg' for True, or the one named.

    Raises:
      UserError: there is no such generator.
    """
    if isinstance(use_hardware_rng, bool):
        return "unsafe_rbg" if use_hardware_rng else None
    try:
        jax.eval_shape(lambda: jax.random.key(0, impl=use_hardware_rng))
    except ValueError as error:
        raise UserError(
            f"use_hardware_rng={use_hardware_rng!r} is neither True (T5X's 'unsafe_rbg') nor False nor a generator of "
            "jax's: 'rbg', 'unsafe_rbg', 'threefry2x32'"
        ) from error
    return use_hardware_rng


def check_microbatches(batch_size: int, num_microbatches: int) -> None:
    """Raises UserError where the batch is not divisible."""
    if num_microbatches < 1 or batch_size % num_microbatches:
        raise UserError(
            f"num_microbatches={num_microbatches} does not divide BATCH_SIZE={batch_size}; the microbatches of a step "
            "must be equal"
        )


def _token_count(batch: Mapping[str, jax.Array]) -> Metrics:
    """Returns the batch's tokens, and of each feature with segment ids the share of it that is not padding."""
    segments = {name: ids for name, ids in batch.items() if name.endswith("segment_ids")}
    if not segments:
        return {}
    tokens = {name: jnp.sum(ids != 0, dtype=jnp.float32) for name, ids in segments.items()}
    metrics = {"tokens": (jnp.asarray(sum(tokens.values())), jnp.ones((), jnp.float32))}
    for name, ids in segments.items():
        metrics[name.replace("segment_ids", "density")] = (tokens[name], jnp.asarray(ids.size, jnp.float32))
    return metrics
