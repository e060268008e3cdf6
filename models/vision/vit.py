"""Vision Transformer: images as patches, an encoder, the mean of its output, classes (Dosovitskiy et al. 2021).

Positions are fixed sines of the two coordinates and the output is averaged, as in the simple baseline of Beyer et al.
2022; norms and attention are this library's defaults, without biases.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.language.t5 import StackFactory
from meshway.models.layers.blocks import LayerFactory
from meshway.models.layers.masks import AttentionMetadata, make_attention_mask
from meshway.models.layers.mlp import Linear, fan_in_init
from meshway.models.layers.norm import RMSNorm, dropout, split_key
from meshway.models.layers.side_outputs import capture, sow, sow_intermediate
from meshway.models.layers.stack import Stack
from meshway.models.module import param


class VisionTransformer(nnx.Module):
    """The network: images in, logits of their classes out."""

    def __init__(
        self,
        image_shape: Sequence[int],
        patch_size: int,
        num_classes: int,
        d_model: int,
        encoder: StackFactory = Stack,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
    ):
        """`image_shape` is (height, width, channels); `dtype` is that of activations.

        Raises:
          ValueError: patches do not tile the image, or d_model is not a multiple of 4.
        """
        height, width, channels = image_shape
        if height % patch_size or width % patch_size:
            raise ValueError(f"VisionTransformer: patches of {patch_size} do not tile images of {height} x {width}")
        self.patch_size = patch_size
        self.positions = PatchPositions(height // patch_size, width // patch_size, d_model)
        pixels = patch_size**2 * channels
        # Pixels of a patch are few: no layout shards them.
        self.patch_kernel = param(fan_in_init()(1)(rngs.params(), (pixels, d_model), jnp.float32), (None, "embed"))
        self.encoder = encoder(d_model=d_model, rngs=rngs)
        self.encoder_norm = norm(d_model=d_model, rngs=rngs)
        self.logits = Linear({"embed": d_model}, {"vocab": num_classes}, rngs=rngs)
        self.dropout_rate, self.dtype = dropout_rate, dtype

    def __call__(self, images: jax.Array, real: jax.Array | None = None, *, rng: jax.Array | None = None) -> jax.Array:
        """Returns the logits of images' classes.

        Args:
          images: [batch, height, width, channels].
          real: bool [batch], False on rows that are padding, which matters where rows share something (the capacity of
            experts); None: all are images.
          rng: dropout key; None means inference.

        Returns:
          logits, float32 [batch, classes].
        """
        keys = split_key(rng, 3)
        patches = patches_of(images.astype(self.dtype), self.patch_size)
        x = patches @ self.patch_kernel[...].astype(self.dtype) + self.positions().astype(self.dtype)
        x = dropout(constrain(x, ("batch", "length", "embed")), self.dropout_rate, keys[0])
        mask = None
        if real is not None:
            segments = jnp.broadcast_to(real[:, None], x.shape[:2]).astype(jnp.int32)
            mask = make_attention_mask(AttentionMetadata(segments), AttentionMetadata(segments))
        with capture() as reports:
            x, _ = self.encoder(x, mask=mask, rng=keys[1])
        sow(reports, "encoder/")
        x = sow_intermediate("encoder_output", dropout(self.encoder_norm(x), self.dropout_rate, keys[2]))
        x = constrain(jnp.mean(x.astype(jnp.float32), axis=1), ("batch", "embed"))
        return sow_intermediate("logits", constrain(self.logits(x), ("batch", "vocab")))


def patches_of(images: jax.Array, size: int) -> jax.Array:
    """images [batch, height, width, channels] -> [batch, patches, size * size * channels], row by row."""
    batch, height, width, channels = images.shape
    x = images.reshape(batch, height // size, size, width // size, size, channels)
    return jnp.swapaxes(x, 2, 3).reshape(batch, (height // size) * (width // size), size * size * channels)


@dataclasses.dataclass(frozen=True)
class PatchPositions:
    """Fixed positions in two dimensions: sines and cosines of each patch's row and column at d_model / 4 wavelengths,
    from 2 pi to 10,000 times that.

    Raises:
      ValueError: d_model is not a multiple of 4.
    """

    rows: int
    columns: int
    d_model: int

    def __post_init__(self) -> None:
        if self.d_model % 4:
            raise ValueError(f"PatchPositions: d_model must be a multiple of 4, not {self.d_model}")

    def __call__(self) -> jax.Array:
        """Returns float32 [rows * columns, d_model]."""
        count = self.d_model // 4
        frequencies = 10_000.0 ** (-jnp.arange(count, dtype=jnp.float32) / max(count - 1, 1))
        coordinates = jnp.meshgrid(jnp.arange(self.rows), jnp.arange(self.columns), indexing="ij")
        angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in coordinates]
        return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)
