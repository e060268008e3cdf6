"""What is trained: one pytree that goes through the step and into checkpoints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meshway.framework.interfaces import Model, Params
from meshway.framework.partitioning.partitioner import Partitioner
from meshway.framework.training.optimizers import BoundOptimizer


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
