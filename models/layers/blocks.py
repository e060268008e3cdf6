"""Pre-norm Transformer layers: x + f(norm(x)) for each part f."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.layers.dropout import dropout, split_key
from meshway.models.layers.masks import Mask
from meshway.models.layers.norm import RMSNorm
from meshway.models.layers.padding import known_from
from meshway.models.layers.positions import PositionBias


class LayerFactory(Protocol):
    """A gin-configured layer class: attention, MLP or normalisation."""

    def __call__(self, *, d_model: int, rngs: nnx.Rngs) -> Any: ...


class SelfAttentionBlock(nnx.Module):
    """Self-attention, then a feed-forward layer."""

    def __init__(
        self,
        d_model: int,
        attention: LayerFactory,
        mlp: LayerFactory,
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        dropout_rate: float = 0.0,
    ):
        self.attention_norm = norm(d_model=d_model, rngs=rngs)
        self.attention = attention(d_model=d_model, rngs=rngs)
        self.mlp_norm = norm(d_model=d_model, rngs=rngs)
        self.mlp = mlp(d_model=d_model, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: jax.Array,
        *,
        rng: jax.Array | None = None,
        cache: Any = None,
        cache_index: jax.Array | None = None,
        positions: jax.Array | None = None,
        bias: PositionBias | None = None,
        mask: Mask | None = None,
    ) -> tuple[jax.Array, Any]:
        """x [batch, length, d_model]; the rest as `Attention` takes it."""
        keys = split_key(rng, 4)
        y, cache = self.attention(
            self.attention_norm(x),
            positions=positions,
            bias=bias,
            mask=mask,
            cache=cache,
            cache_index=cache_index,
            rng=keys[0],
        )
        x = x + dropout(y, self.dropout_rate, keys[1])
        with known_from(mask):
            y = self.mlp(self.mlp_norm(x), rng=keys[2])
        return x + dropout(y, self.dropout_rate, keys[3]), cache

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """Returns room for `length` positions of self-attention."""
        return self.attention.empty_cache(batch, length, dtype)


class CrossAttentionBlock(nnx.Module):
    """Self-attention, attention to an encoder's output, then a feed-forward layer."""

    def __init__(
        self,
        d_model: int,
        attention: LayerFactory,
        mlp: LayerFactory,
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        dropout_rate: float = 0.0,
    ):
        self.attention_norm = norm(d_model=d_model, rngs=rngs)
        self.attention = attention(d_model=d_model, rngs=rngs)
        self.cross_attention_norm = norm(d_model=d_model, rngs=rngs)
        self.cross_attention = attention(d_model=d_model, rngs=rngs)
        self.mlp_norm = norm(d_model=d_model, rngs=rngs)
        self.mlp = mlp(d_model=d_model, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        x: jax.Array,
        *,
        encoded: jax.Array | None = None,
        cross_mask: Mask | None = None,
        rng: jax.Array | None = None,
        cache: Any = None,
        cache_index: jax.Array | None = None,
        bias: PositionBias | None = None,
        mask: Mask | None = None,
    ) -> tuple[jax.Array, Any]:
        """x [batch, length, d_model]; `encoded` [batch, kv_length, d_model] unless the cache holds its projections."""
        keys = split_key(rng, 6)
        y, own = self.attention(
            self.attention_norm(x),
            bias=bias,
            mask=mask,
            cache=None if cache is None else cache["own"],
            cache_index=cache_index,
            rng=keys[0],
        )
        x = x + dropout(y, self.dropout_rate, keys[1])
        attended = self.cross_attention.keys_values(encoded) if cache is None else cache["encoded"]
        y, _ = self.cross_attention(self.cross_attention_norm(x), attended=attended, mask=cross_mask, rng=keys[2])
        x = x + dropout(y, self.dropout_rate, keys[3])
        with known_from(mask):
            y = self.mlp(self.mlp_norm(x), rng=keys[4])
        cache = None if cache is None else {"own": own, "encoded": attended}
        return x + dropout(y, self.dropout_rate, keys[5]), cache

    def empty_cache(self, encoded: jax.Array, length: int) -> Any:
        """Returns room for `length` positions, and the encoder's output projected once for all steps."""
        return {
            "own": self.attention.empty_cache(encoded.shape[0], length, encoded.dtype),
            "encoded": self.cross_attention.keys_values(encoded),
        }
