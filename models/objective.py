"""What objectives over a network share: losses, scores and intermediates follow from hidden states and targets."""

import abc
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from meshway.models.layers.cache import take_copies
from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, Metrics, OutputLayer
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class TargetLoss(abc.ABC):
    """Loss and scores of targets, from the hidden states that predict them and their output layer."""

    def __init__(self, criterion: CrossEntropy):
        self._criterion = criterion

    @abc.abstractmethod
    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns what the output layer reads of each target, [batch, ..., d_model], and that layer, to be called
        within the same trace; `rng` None means no dropout."""

    @abc.abstractmethod
    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (targets, weights) of a batch, [batch, ...] each."""

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each target, float32 [batch, ..., classes]; `rng` None means no dropout."""
        hidden, output_layer = self.hidden(params, batch, rng)
        return output_layer(hidden)

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed loss, summed weight, metrics) over weighted targets; `rng` None means no dropout."""
        with capture() as reports:
            hidden, output_layer = self.hidden(params, batch, rng)
        return self._criterion(output_layer, hidden, *self.targets(batch), reports)

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each target, float32 [batch, length], 0 where its weight is 0."""
        hidden, output_layer = self.hidden(params, batch, None)
        return self._criterion.score(output_layer, hidden, *self.targets(batch))


class Objective(Network, TargetLoss):
    """A loss over a network's predictions; meets `framework.interfaces.Model` by shape, once a subclass adds
    `batch_spec`, `hidden` and `targets`."""

    def __init__(self, network: NetworkFactory, criterion: CrossEntropy):
        Network.__init__(self, network)
        TargetLoss.__init__(self, criterion)

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of the pass that `score` makes, by name, [batch, length, ...].

        Raises:
          ValueError: a name that the network does not know; says which it does.
        """
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found


class RowDecoding:
    """Predictions of a model with `logits` and a batch of texts: for each token whole rows are computed again, since a
    module's own cache has no common form. Right for evaluation on small sets, slow for long outputs."""

    _encoder: bool
    _prefix: bool
    logits: Callable[..., jax.Array]

    def prefill(self, params: dict[str, Any], batch: Batch, max_length: int) -> tuple[jax.Array, jax.Array, Batch]:
        """Makes room for `max_length` tokens behind the prompt; the rows themselves are the cache."""
        tokens = jnp.asarray(batch["decoder_input_tokens"])
        rows, length = tokens.shape
        room = max_length if self._encoder else length + max_length
        cache = {name: jnp.asarray(x) for name, x in batch.items() if name.startswith("encoder_")}
        if self._encoder:
            first, last, segments = tokens[:, :1], jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, room), jnp.int32)
        else:
            segments = jnp.pad(batch["decoder_segment_ids"], ((0, 0), (0, max_length)))
            last = jnp.sum(segments != 0, axis=1) - 1
            first = jnp.take_along_axis(tokens, last[:, None], axis=1)
        known = jnp.pad(tokens, ((0, 0), (0, max(0, room - length))))[:, :room]
        if self._prefix:
            cache["decoder_prefix_mask"] = jnp.pad(batch["decoder_prefix_mask"], ((0, 0), (0, max_length)))
        cache |= {
            "decoder_input_tokens": known,
            # T5X's decoders take a target of 0 for padding.
            "decoder_target_tokens": jnp.where(segments != 0, jnp.maximum(jnp.roll(known, -1, axis=1), 1), 0),
            "decoder_loss_weights": jnp.zeros((rows, room), jnp.float32),
            "decoder_segment_ids": segments,
            "decoder_positions": jnp.broadcast_to(jnp.arange(room, dtype=jnp.int32), (rows, room)),
        }
        return first, last, cache

    def decode(
        self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Batch
    ) -> tuple[jax.Array, Batch]:
        """Feeds tokens [batch, 1] at positions [batch]; returns (logits [batch, vocab], cache)."""

        def put(name: str, values: jax.Array) -> jax.Array:
            # Not x.at[arange, positions]: where the batch is sharded, XLA gathers for that.
            one_row = jax.vmap(lambda row, index, value: row.at[index].set(value, mode="drop"))
            return one_row(cache[name], positions, values)

        one = jnp.ones_like(positions)
        fed = {"decoder_input_tokens": put("decoder_input_tokens", tokens[:, 0])}
        fed |= {name: put(name, one) for name in ("decoder_target_tokens", "decoder_segment_ids")}
        batch = {**cache, **fed}
        logits = self.logits(params, batch, None)
        return jnp.take_along_axis(logits, positions[:, None, None], axis=1)[:, 0], batch

    def fork(self, cache: Batch, times: int) -> Batch:
        """Returns a cache of `times` copies of each row, one after the other."""
        return {name: jnp.repeat(x, times, axis=0) for name, x in cache.items()}

    def reorder(self, cache: Batch, chosen: jax.Array) -> Batch:
        """Returns a cache in which copy j of row i is the old one's copy `chosen[i, j]` of that row."""
        return {name: take_copies(x[None], chosen)[0] for name, x in cache.items()}
