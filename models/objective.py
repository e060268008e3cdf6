"""What objectives over a network share: losses, scores and intermediates follow from hidden states and targets."""

import abc
from collections.abc import Collection, Mapping
from typing import Any

import jax

from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, Metrics, OutputLayer
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class Objective(Network, abc.ABC):
    """A loss over a network's predictions; meets `framework.interfaces.Model` by shape, once a subclass adds
    `batch_spec`, `hidden` and `targets`."""

    def __init__(self, network: NetworkFactory, criterion: CrossEntropy):
        super().__init__(network)
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

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values of the pass that `score` makes, by name, [batch, length, ...].

        Raises:
          ValueError: a name that the network does not know; says which it does.
        """
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found
