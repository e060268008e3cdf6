"""A pre-norm decoder-only language model."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.blocks import LayerFactory
from meshway.models.layers.dropout import dropout, split_key
from meshway.models.layers.embedding import Embedding
from meshway.models.layers.linear import Linear
from meshway.models.layers.masks import Mask, causal_mask, row_positions
from meshway.models.layers.norm import RMSNorm
from meshway.models.layers.reports import collecting, say
from meshway.models.t5 import StackFactory


class LanguageModel(nnx.Module):
    """The network: tokens in, logits of the next token out."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        decoder: StackFactory,
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        dropout_rate: float = 0.0,
        tied_logits: bool = False,
        dtype: str = "float32",
    ):
        """`dtype` is what activations are computed in; parameters are float32. `tied_logits` reuses the token
        embedding as the output layer."""
        self.token_embedding = Embedding(vocab_size, d_model, rngs=rngs, dtype=dtype)
        self.decoder = decoder(d_model=d_model, rngs=rngs)
        self.decoder_norm = norm(d_model=d_model, rngs=rngs)
        self.logits = None if tied_logits else Linear({"embed": d_model}, {"vocab": vocab_size}, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        *,
        cache: Any = None,
        cache_index: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Scores what follows each token.

        Args:
          tokens: int32 [batch, length].
          positions: int32 [batch, length], where each token stands in its segment.
          mask: which tokens each sees; which slots of the cache, where there is a cache.
          cache, cache_index: see `Attention`.
          rng: dropout key.

        Returns:
          (logits float32 [batch, length, vocab], the updated cache or None).
        """
        keys = split_key(rng, 3)
        x = dropout(self.token_embedding(tokens), self.dropout_rate, keys[0])
        with collecting() as reports:
            x, cache = self.decoder(
                x, positions=positions, mask=mask, cache=cache, cache_index=cache_index, rng=keys[1]
            )
        say(reports, "decoder/")
        x = dropout(self.decoder_norm(x), self.dropout_rate, keys[2])
        x = constrain(x, ("batch", "length", "embed"), free_for="vocab")
        logits = self.token_embedding.logits(x) if self.logits is None else self.logits(x)
        return constrain(logits.astype(jnp.float32), ("batch", "length", "vocab")), cache

    def empty_cache(self, batch: int, length: int) -> Any:
        """Returns room for the keys and values of `length` positions."""
        return self.decoder.empty_cache(batch=batch, length=length, dtype=jnp.dtype(self.token_embedding.dtype))

    def decode_cached(self, tokens: jax.Array, positions: jax.Array, cache: Any, length: int) -> tuple[jax.Array, Any]:
        """One step of decoding: tokens [batch, 1] at positions [batch, 1] -> (logits [batch, 1, vocab], cache)."""
        mask = Mask(causal_mask(positions, row_positions(length)))
        return self(tokens, positions, mask, cache=cache, cache_index=positions)
