"""The classification objective: one label an image. Meets `framework.interfaces.Model` by shape."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshway.models.losses import CrossEntropy, OutputLayer, TokenSpec
from meshway.models.module import NetworkFactory
from meshway.models.objective import Batch, Objective


class Classifier(Objective):
    """Maximum likelihood of each image's label, for a network like `vit.VisionTransformer`.

    A batch has `image` float32 [batch, *image_shape], `label` int32 [batch] and `loss_weights` float32 [batch], which
    `framework.data.passthrough.PassThrough` makes.
    """

    def __init__(self, network: NetworkFactory, image_shape: Sequence[int], label_smoothing: float = 0.0):
        super().__init__(network, CrossEntropy(label_smoothing=label_smoothing))
        self._image_shape = tuple(image_shape)

    def batch_spec(self, batch_size: int, lengths: Mapping[str, int]) -> dict[str, TokenSpec]:
        """Returns the features of a batch; `lengths` are not read."""
        return image_spec(batch_size, self._image_shape)

    def hidden(self, params: dict[str, Any], batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, OutputLayer]:
        """Returns the logits of each class, float32 [batch, classes]: nothing is gained by computing them later."""
        return self.bind(params)(batch["image"], batch["loss_weights"] > 0, rng=rng), lambda logits: logits

    def targets(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns (labels, weights), [batch] each."""
        return batch["label"], batch["loss_weights"]

    def score(self, params: dict[str, Any], batch: Batch) -> jax.Array:
        """Returns the log-probability of each label, float32 [batch, 1], 0 on padding."""
        return super().score(params, batch)[:, None]


def image_spec(batch_size: int, image_shape: Sequence[int]) -> dict[str, TokenSpec]:
    """Returns the features of a batch of labelled images."""
    return {
        "image": TokenSpec((batch_size, *image_shape), np.dtype("float32"), ("batch", *[None] * len(image_shape))),
        "label": TokenSpec((batch_size,), np.dtype("int32"), ("batch",)),
        "loss_weights": TokenSpec((batch_size,), np.dtype("float32"), ("batch",)),
    }
