"""What is trained, one pytree, and the train step: a pure function of (state, batch).

What the summed loss of a batch is divided by is T5X's `loss_normalizing_factor`, its names and meanings (t5x/losses.py,
`SpecialLossNormalizingFactor`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import constrain
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Metrics, Model, Params
from meshway.framework.optimizers.optimizers import BoundOptimizer
from meshway.framework.partitioning.partitioner import Partitioner

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
    """`step` counts batches taken; `skipped` those whose update was left out because it was not finite, of which
    `skipped_in_a_row` directly before now. No RNG: randomness is a function of (seed, step)."""

    step: jax.Array
    params: Params
    opt_state: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def state_axes(model: Model, optimizer: BoundOptimizer) -> Any:
    """Returns the logical axes of each leaf of the state, in the tree of a `TrainState`."""
    scalar: Any = ()
    return TrainState(scalar, model.axes(), optimizer.state_axes(), scalar, scalar)


def init_state(model: Model, optimizer: BoundOptimizer, rng: jax.Array) -> TrainState:
    """Returns the state before the first step. Pure: trace it for shapes, jit it into shards."""
    params = model.init(rng)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def init_sharded(
    model: Model, optimizer: BoundOptimizer, partitioner: Partitioner, shardings: TrainState, seed: int
) -> TrainState:
    """Initialises every leaf directly into its shards; equal on every mesh."""
    key = jax.random.key(seed)
    initialise = partitioner.compile(
        lambda key: init_state(model, optimizer, key),
        key,
        in_shardings=partitioner.replicated,
        out_shardings=shardings,
    )
    return initialise(key)


Gradients = Any  # like Params
# Normalised gradients and metrics of this step's batch at the given parameters.
GradientAt = Callable[[Params], tuple[Gradients, Metrics]]
# Which gradient the optimizer gets: may call `gradient_at` more than once (sharpness-aware methods do).
GradientRule = Callable[[GradientAt, Params], tuple[Gradients, Metrics]]


def plain_gradient(gradient_at: GradientAt, params: Params) -> tuple[Gradients, Metrics]:
    """The gradient where the parameters are."""
    return gradient_at(params)


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class TrainStep:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    Losses come as sums and weights, are added over microbatches in float32, and are divided once, by the summed weight
    unless `loss_normalizing_factor` says otherwise (`divisor`): how a batch was sharded cannot change the
    result. A step whose loss or gradient is not finite leaves parameters and optimizer as they were and is counted.
    Dropout is drawn by the generator `rng_impl`, jax's default if it is None.
    """

    model: Model
    optimizer: BoundOptimizer
    seed: int
    num_microbatches: int = 1
    gradient_rule: GradientRule = plain_gradient
    loss_normalizing_factor: LossNormalizingFactor = "NUM_REAL_TARGET_TOKENS"
    rng_impl: str | None = None

    def __call__(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        gradients, metrics = self.gradients(state.params, batch, state.step)
        params, opt_state, stats = self.optimizer.update(gradients, state.opt_state, state.params)
        loss_sum, _ = metrics["loss"]
        finite = jnp.isfinite(loss_sum) & jnp.isfinite(stats["grad_norm"])
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = jnp.where(finite, 0, 1).astype(jnp.int32)
        new_state = TrainState(
            state.step + 1, params, opt_state, state.skipped + bad, (state.skipped_in_a_row + 1) * bad
        )
        one = jnp.ones((), jnp.float32)
        extra = {name: (jnp.asarray(value, jnp.float32), one) for name, value in stats.items()}
        extra["skipped_steps"] = (new_state.skipped.astype(jnp.float32), one)
        extra["skipped_in_a_row"] = (new_state.skipped_in_a_row.astype(jnp.float32), one)
        return new_state, metrics | extra | _token_count(batch)

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

        def one(index: jax.Array, micro: Mapping[str, jax.Array]) -> tuple[Gradients, Metrics]:
            micro = {name: constrain(x, ("batch", *([None] * (x.ndim - 1)))) for name, x in micro.items()}
            return self._summed_gradients(params, micro, jax.random.fold_in(rng, index))

        def add(total: Any, micro: tuple[jax.Array, Mapping[str, jax.Array]]) -> tuple[Any, None]:
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, one(*micro)), None

        micros = (jnp.arange(count), {name: split(feature) for name, feature in batch.items()})
        shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        total, _ = jax.lax.scan(add, zeros, micros)
        return total


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
