"""T5: an encoder and a decoder with relative position biases (Raffel et al. 2020, section 2.1, and its 1.1 release)."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.blocks import LayerFactory
from meshway.models.layers.embedding import Embedding, EmbeddingFactory
from meshway.models.layers.masks import (
    AttentionMetadata,
    Mask,
    causal_mask,
    make_attention_mask,
    row_metadata,
    row_positions,
    segment_mask,
)
from meshway.models.layers.mlp import Linear
from meshway.models.layers.norm import RMSNorm, dropout, split_key
from meshway.models.layers.positions import BiasFactory, PositionBias, RelativePositionBias
from meshway.models.layers.side_outputs import capture, sow, sow_intermediate


class StackFactory(Protocol):
    """A gin-configured `Stack`."""

    def __call__(self, *, d_model: int, rngs: nnx.Rngs) -> Any: ...


class T5(nnx.Module):
    """The network: `encode` the inputs, `decode` targets that attend to them."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        encoder: StackFactory,
        decoder: StackFactory,
        position_bias: BiasFactory | None = RelativePositionBias,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        embedding: EmbeddingFactory = Embedding,
        norm: LayerFactory = RMSNorm,
        dropout_rate: float = 0.0,
        tied_logits: bool = False,
        scale_tied_logits: bool = True,
        dtype: str = "float32",
    ):
        """`dtype` is what activations are computed in; parameters are float32. `tied_logits` (T5 1.0) reuses the
        token embedding as the output layer, `scale_tied_logits` times 1/sqrt(d_model). `position_bias` is one for all
        layers of a stack; None where blocks have their own (umT5)."""
        self.token_embedding = embedding(vocab_size=vocab_size, d_model=d_model, rngs=rngs, dtype=dtype)
        self.encoder_position_bias = None if position_bias is None else position_bias(bidirectional=True, rngs=rngs)
        self.encoder = encoder(d_model=d_model, rngs=rngs)
        self.encoder_norm = norm(d_model=d_model, rngs=rngs)
        self.decoder_position_bias = None if position_bias is None else position_bias(bidirectional=False, rngs=rngs)
        self.decoder = decoder(d_model=d_model, rngs=rngs)
        self.decoder_norm = norm(d_model=d_model, rngs=rngs)
        self.logits = None if tied_logits else Linear({"embed": d_model}, {"vocab": vocab_size}, rngs=rngs)
        self.scale_tied_logits, self.dropout_rate = scale_tied_logits, dropout_rate

    def encode(self, tokens: jax.Array, segments: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """tokens and segments int32 [batch, length] (segment 0 is padding) -> [batch, length, d_model]."""
        keys = split_key(rng, 3)
        x = dropout(sow_intermediate("encoder_embedding", self.token_embedding(tokens)), self.dropout_rate, keys[0])
        with capture() as reports:
            x, _ = self.encoder(
                x,
                bias=_square(self.encoder_position_bias, tokens.shape[1]),
                mask=make_attention_mask(AttentionMetadata(segments), AttentionMetadata(segments)),
                rng=keys[1],
            )
        sow(reports, "encoder/")
        return sow_intermediate("encoder_output", dropout(self.encoder_norm(x), self.dropout_rate, keys[2]))

    def decode(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        encoded: jax.Array,
        encoded_segments: jax.Array,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Teacher-forced: tokens [batch, length] against encoded [batch, kv_length, d_model] -> the hidden states
        [batch, length, d_model] that `score` turns into logits."""
        own = row_metadata(tokens.shape[1], segments)
        x, _ = self._decode(
            tokens,
            rng=rng,
            encoded=encoded,
            bias=_square(self.decoder_position_bias, tokens.shape[1]),
            mask=make_attention_mask(own, own, causal=True),
            cross_mask=make_attention_mask(AttentionMetadata(segments), AttentionMetadata(encoded_segments)),
        )
        return x

    def score(self, x: jax.Array) -> jax.Array:
        """Hidden states [batch, length, d_model] -> logits, float32 [batch, length, vocab]."""
        x = constrain(x, ("batch", "length", "embed"), free_for="vocab")
        logits = (
            self.token_embedding.logits(x, self.scale_tied_logits)
            if self.logits is None
            else self.logits(x, ("batch", "length"))
        )
        return sow_intermediate("logits", constrain(logits.astype(jnp.float32), ("batch", "length", "vocab")))

    def empty_cache(self, encoded: jax.Array, length: int) -> Any:
        """Returns the decoder's cache for `length` positions, with the keys and values of `encoded`."""
        return self.decoder.empty_cache(encoded=encoded, length=length)

    def decode_cached(
        self, tokens: jax.Array, positions: jax.Array, cache: Any, encoded_segments: jax.Array, length: int
    ) -> tuple[jax.Array, Any]:
        """Goes on from a cache: tokens [rows, n] at positions [rows, n] -> (logits [rows, n, vocab], cache); rows are a
        multiple of the encoded batch, those of an example adjacent."""
        slots = row_positions(length)
        asking = jnp.ones((encoded_segments.shape[0], tokens.size // encoded_segments.shape[0]), jnp.int32)
        x, cache = self._decode(
            tokens,
            cache=cache,
            cache_index=positions,
            bias=None if self.decoder_position_bias is None else self.decoder_position_bias(positions, slots),
            mask=Mask(causal_mask(positions, slots)),
            cross_mask=Mask(segment_mask(asking, encoded_segments)),
        )
        return self.score(x), cache

    def _decode(self, tokens: jax.Array, rng: jax.Array | None = None, **context: Any) -> tuple[jax.Array, Any]:
        keys = split_key(rng, 3)
        x = dropout(self.token_embedding(tokens), self.dropout_rate, keys[0])
        with capture() as reports:
            x, cache = self.decoder(x, rng=keys[1], **context)
        sow(reports, "decoder/")
        return sow_intermediate("decoder_output", dropout(self.decoder_norm(x), self.dropout_rate, keys[2])), cache


def _square(position_bias: RelativePositionBias | None, length: int) -> PositionBias | None:
    return None if position_bias is None else position_bias.square(length)
