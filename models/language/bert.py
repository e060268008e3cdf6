"""BERT: a bidirectional encoder with logits for every token (Devlin et al. 2019)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.language.t5 import StackFactory
from meshway.models.layers.blocks import LayerFactory
from meshway.models.layers.embedding import Embedding, EmbeddingFactory, OutputBias, PositionEmbedding, TypeEmbedding
from meshway.models.layers.masks import Mask
from meshway.models.layers.mlp import ACTIVATIONS, Linear
from meshway.models.layers.norm import LayerNorm, dropout, split_key
from meshway.models.layers.side_outputs import capture, sow, sow_intermediate
from meshway.models.layers.stack import Stack


class Bert(nnx.Module):
    """The network: tokens in, logits of every token out."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        encoder: StackFactory = Stack,  # type: ignore[assignment]  # recipes bind the rest
        position_embedding: LayerFactory = PositionEmbedding,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        embedding: EmbeddingFactory = Embedding,
        num_token_types: int = 0,
        norm: LayerFactory = LayerNorm,
        head_activation: str = "gelu_exact",
        dropout_rate: float = 0.0,
        dtype: str = "float32",
    ):
        """Args:
          vocab_size, d_model: entries of the vocabulary, width of the residual stream.
          encoder: the stack of layers, whose blocks normalise their output (norms="post").
          position_embedding: a learned vector for each position (`embedding.PositionEmbedding`).
          rngs: for the initial parameters.
          embedding: of tokens; it is the output layer as well, not scaled.
          num_token_types: number of token types (BERT: 2, the first and the second text), each with a learned vector.
          norm: of the embeddings and of the head.
          head_activation: between the head's layer and its norm, a name of `mlp.ACTIVATIONS`.
          dropout_rate: of embeddings.
          dtype: of activations; parameters are float32.

        Raises:
          ValueError: an unknown activation.
        """
        if head_activation not in ACTIVATIONS:
            raise ValueError(f"Bert.head_activation: unknown {head_activation!r}; known are {sorted(ACTIVATIONS)}")
        self.token_embedding = embedding(vocab_size=vocab_size, d_model=d_model, rngs=rngs, dtype=dtype)
        self.position_embedding = position_embedding(d_model=d_model, rngs=rngs)
        self.token_type_embedding = TypeEmbedding(d_model, num_token_types, rngs=rngs) if num_token_types else None
        self.embedding_norm = norm(d_model=d_model, rngs=rngs)
        self.encoder = encoder(d_model=d_model, rngs=rngs)
        self.head = Linear({"embed": d_model}, {"mlp": d_model}, rngs=rngs, use_bias=True)
        self.head_norm = norm(d_model=d_model, rngs=rngs)
        self.logits = OutputBias(vocab_size)
        self.activation: Callable[[jax.Array], jax.Array] = ACTIVATIONS[head_activation]
        self.dropout_rate = dropout_rate

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        *,
        token_types: jax.Array | None = None,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the hidden states that `score` turns into logits of each position.

        Args:
          tokens: int32 [batch, length].
          positions: int32 [batch, length], the position of each token in its segment.
          mask: which tokens each token attends to.
          token_types: int32 [batch, length], None for all of type 0.
          rng: dropout key.

        Returns:
          hidden states [batch, length, d_model].

        Raises:
          ValueError: rows are longer than the learned positions.
        """
        keys = split_key(rng, 2)
        x = self.position_embedding(self.token_embedding(tokens), positions, tokens.shape[1])
        if self.token_type_embedding is not None:
            x = self.token_type_embedding(x, token_types)
        x = dropout(self.embedding_norm(x), self.dropout_rate, keys[0])
        with capture() as reports:
            x, _ = self.encoder(x, positions=positions, mask=mask, rng=keys[1])
        sow(reports, "encoder/")
        x = constrain(sow_intermediate("encoder_output", x), ("batch", "length", "embed"), free_for="mlp")
        return self.head_norm(constrain(self.activation(self.head(x)), ("batch", "length", "embed")))

    def score(self, x: jax.Array) -> jax.Array:
        """Hidden states [batch, length, d_model] -> logits, float32 [batch, length, vocab]."""
        x = constrain(x, ("batch", "length", "embed"), free_for="vocab")
        logits = self.logits(self.token_embedding.logits(x, scale=False))
        return sow_intermediate("logits", constrain(logits.astype(jnp.float32), ("batch", "length", "vocab")))
