"""The classification objective: one label an image. Meets `framework.interfaces.Model` by shape, but for decoding."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from meshway.models.layers.side_outputs import capture, capture_intermediates
from meshway.models.losses import CrossEntropy, TokenSpec, target_log_probs
from meshway.models.module import Network, NetworkFactory

Batch = Mapping[str, jax.Array]


class Classifier:
    """Maximum likelihood of each image's label, for a network like `vit.VisionTransformer`.

    A batch has `image` float32 [batch, *image_shape], `label` int32 [batch] and `loss_weights` float32 [batch], which
    `framework.data.passthrough.PassThrough` makes.
    """

    def __init__(self, network: NetworkFactory, image_shape: Sequence[int], label_smoothing: float = 0.0):
        self._network = Network(network)
        self._image_shape = tuple(image_shape)
        self._criterion = CrossEntropy(label_smoothing=label_smoothing)

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh float32 parameters."""
        return self._network.init(rng)

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter."""
        return self._network.axes()

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` are not read."""
        image = (batch_size, *self._image_shape)
        return {
            "image": TokenSpec(image, np.dtype("float32"), ("batch", *[None] * len(self._image_shape))),
            "label": TokenSpec((batch_size,), np.dtype("int32"), ("batch",)),
            "loss_weights": TokenSpec((batch_size,), np.dtype("float32"), ("batch",)),
        }

    def loss(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, dict]:
        """Returns (summed loss, summed weight, metrics) over weighted images; `rng` None means no dropout."""
        with capture() as reports:
            logits = self.logits(params, batch, rng)
        return self._criterion(logits, batch["label"], batch["loss_weights"], reports)

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each label, float32 [batch, 1], 0 on padding."""
        logits = self.logits(params, batch, None)
        return target_log_probs(logits, batch["label"], batch["loss_weights"])[:, None]

    def logits(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> jax.Array:
        """Returns the logits of each class, float32 [batch, classes]."""
        return self._network.bind(params)(batch["image"], batch["loss_weights"] > 0, rng=rng)

    def observe(self, params: dict[str, Any], batch: Batch, names: Collection[str]) -> dict[str, jax.Array]:
        """Returns intermediate values by name, [batch, ...] (`observed`); ValueError for a name that is none."""
        with capture_intermediates(names) as found:
            self.logits(params, batch, None)
        return found

    def prefill(self, params: dict[str, Any], batch: Batch, max_length: int) -> NoReturn:
        """Raises ValueError: there are no tokens to produce."""
        raise ValueError("a Classifier produces no tokens: there is nothing to decode; take its `score` or `logits`")

    def decode(self, params: dict[str, Any], tokens: jax.Array, positions: jax.Array, cache: Any) -> NoReturn:
        """Raises ValueError, as `prefill` does."""
        self.prefill(params, {}, 0)
