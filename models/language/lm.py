"""A decoder-only language model: one network whose parts a recipe chooses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.language.t5 import StackFactory
from meshway.models.layers.blocks import LayerFactory
from meshway.models.layers.embedding import Embedding, EmbeddingFactory, OutputBias
from meshway.models.layers.masks import Mask, causal_mask, row_positions
from meshway.models.layers.mlp import Linear
from meshway.models.layers.norm import RMSNorm, dropout, split_key
from meshway.models.layers.positions import BiasFactory
from meshway.models.layers.side_outputs import capture, sow, sow_intermediate
from meshway.models.layers.stack import Stack


class LanguageModel(nnx.Module):
    """The network: tokens in, logits of the next token out."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        decoder: StackFactory = Stack,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        embedding: EmbeddingFactory = Embedding,
        scale_embedding: bool = False,
        position_embedding: LayerFactory | None = None,
        embedding_norm: LayerFactory | None = None,
        position_bias: BiasFactory | None = None,
        norm: LayerFactory | None = RMSNorm,
        tied_logits: bool = False,
        scale_tied_logits: bool = True,
        logits_bias: bool = False,
        logits_soft_cap: float | None = None,
        dropout_rate: float = 0.0,
        dtype: str = "float32",
    ):
        """Args:
          vocab_size, d_model: entries of the vocabulary, width of the residual stream.
          decoder: the stack of layers.
          rngs: for the initial parameters.
          embedding: of tokens.
          scale_embedding: multiply embeddings by sqrt(d_model), rounded to `dtype` first, as Gemma does.
          position_embedding: a learned vector for each position, added to the embeddings
            (`embedding.PositionEmbedding`).
          embedding_norm: normalises the input of the stack (BLOOM).
          position_bias: a bias on the attention scores of all layers (`positions.RelativePositionBias`).
          norm: normalises the output of the stack; None where blocks normalise theirs (norms="post").
          tied_logits: reuse the token embedding as the output layer, `scale_tied_logits` times 1/sqrt(d_model).
          logits_bias: add a bias to the logits.
          logits_soft_cap: bound the logits, cap * tanh(logits / cap).
          dropout_rate: of embeddings and of the stack's output.
          dtype: of activations; parameters are float32.

        Raises:
          ValueError: a soft cap that is not positive.
        """
        if logits_soft_cap is not None and logits_soft_cap <= 0:
            raise ValueError(f"LanguageModel.logits_soft_cap must be positive or None, not {logits_soft_cap}")
        self.token_embedding = embedding(vocab_size=vocab_size, d_model=d_model, rngs=rngs, dtype=dtype)
        self.position_embedding = _if_any(position_embedding, d_model=d_model, rngs=rngs)
        self.embedding_norm = _if_any(embedding_norm, d_model=d_model, rngs=rngs)
        self.position_bias = _if_any(position_bias, bidirectional=False, rngs=rngs)
        self.decoder = decoder(d_model=d_model, rngs=rngs)
        self.decoder_norm = _if_any(norm, d_model=d_model, rngs=rngs)
        self.logits: Any
        if tied_logits:
            self.logits = OutputBias(vocab_size) if logits_bias else None
        else:
            self.logits = Linear({"embed": d_model}, {"vocab": vocab_size}, rngs=rngs, use_bias=logits_bias)
        self.tied_logits, self.scale_tied_logits, self.logits_soft_cap = tied_logits, scale_tied_logits, logits_soft_cap
        self.embedding_scale = d_model**0.5 if scale_embedding else None
        self.dropout_rate = dropout_rate

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        *,
        cache: Any = None,
        cache_index: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Computes the hidden states that `score` turns into logits of the token after each token.

        Args:
          tokens: int32 [batch, length].
          positions: int32 [batch, length], the position of each token in its segment.
          mask: which tokens each token attends to; with a cache, which slots of it.
          cache, cache_index: see `Attention`.
          rng: dropout key.

        Returns:
          (hidden states [batch, length, d_model], the updated cache or None).

        Raises:
          ValueError: rows, or those of the cache, are longer than the learned positions.
        """
        keys = split_key(rng, 3)
        kv_length = mask.dense.shape[-1]
        x = dropout(
            sow_intermediate("embedding", self._embed(tokens, positions, kv_length)), self.dropout_rate, keys[0]
        )
        context: dict[str, Any] = {"positions": positions, "mask": mask}
        if self.position_bias is not None and cache is None:
            context["bias"] = self.position_bias.square(tokens.shape[1])
        elif self.position_bias is not None:
            context["bias"] = self.position_bias(cache_index, row_positions(kv_length))
        with capture() as reports:
            x, cache = self.decoder(x, cache=cache, cache_index=cache_index, rng=keys[1], **context)
        sow(reports, "decoder/")
        if self.decoder_norm is not None:
            x = self.decoder_norm(x)
        return sow_intermediate("decoder_output", dropout(x, self.dropout_rate, keys[2])), cache

    def score(self, x: jax.Array) -> jax.Array:
        """Hidden states [batch, length, d_model] -> logits, float32 [batch, length, vocab]."""
        x = constrain(x, ("batch", "length", "embed"), free_for="vocab")
        if self.tied_logits:
            logits = self.token_embedding.logits(x, self.scale_tied_logits)
            logits = logits if self.logits is None else self.logits(logits)
        else:
            logits = self.logits(x, ("batch", "length"))
        logits = constrain(logits.astype(jnp.float32), ("batch", "length", "vocab"))
        if self.logits_soft_cap is not None:
            logits = self.logits_soft_cap * jnp.tanh(logits / self.logits_soft_cap)
        return sow_intermediate("logits", logits)

    def empty_cache(self, batch: int, length: int) -> Any:
        """Returns an empty cache for the keys and values of `length` positions."""
        return self.decoder.empty_cache(batch=batch, length=length, dtype=jnp.dtype(self.token_embedding.dtype))

    def decode_cached(self, tokens: jax.Array, positions: jax.Array, cache: Any, length: int) -> tuple[jax.Array, Any]:
        """Goes on from a cache: tokens [batch, n] at positions [batch, n] -> (logits [batch, n, vocab], cache)."""
        mask = Mask(causal_mask(positions, row_positions(length)))
        x, cache = self.hidden(tokens, positions, mask, cache=cache, cache_index=positions)
        return self.score(x), cache

    def _embed(self, tokens: jax.Array, positions: jax.Array, length: int) -> jax.Array:
        """Returns the input of the stack, [batch, queries, d_model], for rows of `length` tokens."""
        x = self.token_embedding(tokens)
        if self.embedding_scale is not None:
            x = x * jnp.asarray(self.embedding_scale, x.dtype)
        if self.position_embedding is not None:
            x = self.position_embedding(x, positions, length)
        return x if self.embedding_norm is None else self.embedding_norm(x)


def _if_any(factory: Callable[..., Any] | None, **arguments: Any) -> Any:
    """Returns factory(**arguments), None if there is no factory."""
    return None if factory is None else factory(**arguments)
