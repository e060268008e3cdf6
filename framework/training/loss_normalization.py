"""What the summed loss of a batch is divided by before its gradient reaches the optimizer: T5X's
`loss_normalizing_factor`, its names and meanings (t5x/losses.py, `SpecialLossNormalizingFactor`)."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.errors import UserError

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
