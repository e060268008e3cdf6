"""Cross entropy over tokens or classes, as sums and weights, never means; and the specs of a batch's features."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import constrain
from meshway.models.layers.side_outputs import Reports, as_loss


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """Shape, dtype and logical axes of one feature (a `framework.interfaces.ArraySpec`)."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] = ("batch", "length")


def token_spec(batch_size: int, length: int, side: str, names: Iterable[str]) -> dict[str, TokenSpec]:
    """Returns features `side`_`name` [batch, length]: weights float32, all else int32."""
    return {
        f"{side}_{name}": TokenSpec((batch_size, length), np.dtype("float32" if name == "loss_weights" else "int32"))
        for name in names
    }


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with label smoothing and z-loss.

    z_loss * log(Z)^2 keeps the softmax normaliser Z near one (Mesh-TensorFlow; PaLM section 5). With
    label_smoothing e the target distribution is 1 - e on the target and e / (vocab - 1) elsewhere (Szegedy et al.
    2016, section 7), and its entropy is subtracted, so that a perfect prediction still scores zero (as T5X does).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0

    def __call__(
        self, logits: jax.Array, targets: jax.Array, weights: jax.Array, reports: Reports | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        """Sums over a batch.

        Args:
          logits: float32 [batch, length, vocab].
          targets: int32 [batch, length].
          weights: float32 [batch, length], 0 on padding.
          reports: what the network's layers reported: auxiliary losses, which are added, and statistics.

        Returns:
          (summed loss, summed weight, metrics as (sum, weight): cross_entropy, z_loss if any, accuracy, and those of
          `reports`).
        """
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        cross_entropy = log_z - target_logits
        loss = cross_entropy
        vocab = logits.shape[-1]
        if self.label_smoothing:
            high, low = 1.0 - self.label_smoothing, self.label_smoothing / (vocab - 1)
            entropy = -(high * math.log(high) + (vocab - 1) * low * math.log(low))
            loss = log_z - (high - low) * target_logits - low * jnp.sum(logits, axis=-1) - entropy
        weight = jnp.sum(weights)
        correct = jnp.argmax(logits, axis=-1) == targets
        metrics = {
            "cross_entropy": (jnp.sum(cross_entropy * weights), weight),
            "accuracy": (jnp.sum(correct * weights), weight),
        }
        if self.z_loss:
            penalty = self.z_loss * jnp.square(log_z)
            loss = loss + penalty
            metrics["z_loss"] = (jnp.sum(penalty * weights), weight)
        auxiliary, statistics = as_loss(reports or Reports(), weight)
        return jnp.sum(loss * weights) + auxiliary, weight, metrics | statistics


def constrain_like_logits(targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lays targets and weights, both [batch, length], out as the logits of their tokens.

    Batches may be cut along the length by axes that cut the vocabulary of logits (Megatron's sequence parallelism).
    Left to itself XLA then moves the logits, and their gradient, to where targets lie.
    """
    names = ("batch", "length")
    return constrain(targets, names, free_for="vocab"), constrain(weights, names, free_for="vocab")


def target_log_probs(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns log p(target) [batch, length], 0 where the weight is 0."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(weights > 0, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
