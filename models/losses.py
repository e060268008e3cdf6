"""Cross entropy over tokens or classes, as sums and weights, never means; and the specs of a batch's features."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.axes import constrain
from meshway.models.layers.side_outputs import Reports, as_loss

Metrics = dict[str, tuple[jax.Array, jax.Array]]  # name -> (sum, weight)
OutputLayer = Callable[[jax.Array], jax.Array]  # hidden states [batch, ..., d_model] -> logits [batch, ..., classes]


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


def text_spec(batch_size: int, lengths: Mapping[str, int], encoder: bool, prefix: bool = False) -> dict[str, TokenSpec]:
    """Returns the features of a batch of texts: with `encoder` inputs and targets apart, else both in a decoder's row,
    with `prefix` their inputs marked. Raises KeyError where one of `lengths` is missing."""
    names = ["input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions"]
    if encoder:
        inputs = token_spec(batch_size, lengths["inputs"], "encoder", ["input_tokens", "segment_ids", "positions"])
        return inputs | token_spec(batch_size, lengths["targets"], "decoder", names)
    inputs_length = lengths["inputs"] if prefix else lengths.get("inputs", 0)
    inputs_length += lengths.get("suffixes", 0)  # which seqio's prefix-suffix converter puts behind the targets
    names += ["prefix_mask"] if prefix else []
    return token_spec(batch_size, lengths["targets"] + inputs_length, "decoder", names)


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with label smoothing and z-loss.

    z_loss * log(Z)^2 keeps the softmax normaliser Z near one (Mesh-TensorFlow; PaLM section 5). With
    label_smoothing e the target distribution is 1 - e on the target and e / (vocab - 1) elsewhere (Szegedy et al.
    2016, section 7), and its entropy is subtracted, so that a perfect prediction still scores zero (as T5X does).

    With num_chunks n, logits of length / n tokens of each row are held at a time, never those of [batch, length,
    vocab]; the backward pass computes them again, which costs one more product with the output layer. Where n does not
    divide the length, rows are padded for it.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    num_chunks: int = 1

    def __call__(
        self,
        output_layer: OutputLayer,
        hidden: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        reports: Reports | None = None,
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Sums over a batch.

        Args:
          output_layer: hidden states [batch, n, d_model] -> logits float32 [batch, n, vocab].
          hidden: [batch, length, d_model].
          targets: int32 [batch, length].
          weights: float32 [batch, length], 0 on padding.
          reports: what the network's layers reported: auxiliary losses, which are added, and statistics.

        Returns:
          (summed loss, summed weight, metrics as (sum, weight): cross_entropy, z_loss if any, accuracy, and those of
          `reports`).
        """
        if self.num_chunks == 1:
            sums = self._sums(output_layer(hidden), targets, weights)
        else:
            chunks = tuple(_chunked(x, self.num_chunks) for x in (hidden, targets, weights))
            sums = self._added(output_layer, chunks)
        loss, weight = sums.pop("loss"), sums.pop("weight")
        metrics = {name: (value, weight) for name, value in sums.items()}
        auxiliary, statistics = as_loss(reports or Reports(), weight)
        return loss + auxiliary, weight, metrics | statistics

    def score(self, output_layer: OutputLayer, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Returns log p(target), float32 [batch, length], 0 where the weight is 0; arguments as `__call__`."""

        def of_chunk(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            x, targets, weights = chunk
            logits = output_layer(x)
            chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            return jnp.where(weights > 0, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

        if self.num_chunks == 1:
            return of_chunk((hidden, targets, weights))
        found = jax.lax.map(of_chunk, tuple(_chunked(x, self.num_chunks) for x in (hidden, targets, weights)))
        return jnp.moveaxis(found, 0, 2).reshape(len(targets), -1)[:, : targets.shape[1]]

    def _added(self, output_layer: OutputLayer, chunks: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        """Returns `_sums` over chunks of (hidden, targets, weights), one after the other."""

        def of_chunk(chunk: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
            return self._sums(output_layer(chunk[0]), *chunk[1:])

        def add(total: dict[str, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[dict[str, jax.Array], None]:
            return jax.tree.map(jnp.add, total, of_chunk(chunk)), None

        shapes = jax.eval_shape(of_chunk, tuple(x[0] for x in chunks))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(jax.checkpoint(add), zeros, chunks)
        return total

    def _sums(self, logits: jax.Array, targets: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
        """Returns by name what is summed over tokens; 'loss' is the total without auxiliary losses."""
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        cross_entropy = log_z - target_logits
        loss = cross_entropy
        vocab = logits.shape[-1]
        if self.label_smoothing:
            high, low = 1.0 - self.label_smoothing, self.label_smoothing / (vocab - 1)
            entropy = -(high * math.log(high) + (vocab - 1) * low * math.log(low))
            loss = log_z - (high - low) * target_logits - low * jnp.sum(logits, axis=-1) - entropy
        correct = jnp.argmax(logits, axis=-1) == targets
        sums = {
            "weight": jnp.sum(weights),
            "cross_entropy": jnp.sum(cross_entropy * weights),
            "accuracy": jnp.sum(correct * weights),
        }
        if self.z_loss:
            penalty = self.z_loss * jnp.square(log_z)
            loss = loss + penalty
            sums["z_loss"] = jnp.sum(penalty * weights)
        return sums | {"loss": jnp.sum(loss * weights)}


def token_targets(batch: Mapping[str, jax.Array], side: str) -> tuple[jax.Array, jax.Array]:
    """Returns `side`_target_tokens and `side`_loss_weights, [batch, length], sharded as the logits of their tokens.

    Batches may be sharded along the length by mesh axes that shard the vocabulary of logits (Megatron's sequence
    parallelism). Left to itself XLA then moves the logits, and their gradient, to where targets lie.
    """
    names = ("batch", "length")
    targets = constrain(batch[f"{side}_target_tokens"], names, free_for="vocab")
    return targets, constrain(batch[f"{side}_loss_weights"], names, free_for="vocab")


def _chunked(x: jax.Array, num_chunks: int) -> jax.Array:
    """[batch, length, ...] -> [num_chunks, batch, length / num_chunks, ...], rows first padded by zeros to a multiple.

    Chunk i takes tokens i, i + num_chunks, ...: a mesh axis that shards the length holds its share of each chunk.
    """
    batch, length = x.shape[:2]
    per_chunk = -(-length // num_chunks)
    x = jnp.pad(x, ((0, 0), (0, per_chunk * num_chunks - length), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(batch, per_chunk, num_chunks, *x.shape[2:]), 2, 0)
