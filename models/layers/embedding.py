"""Embeddings of tokens and of positions."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain, constrain_lookup
from meshway.models.module import param, value_of


class Embedding(nnx.Module):
    """A table [vocab, d_model]; its dtype is that of the network's activations."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        dtype: str,
        stddev: float = 1.0,
        one_hot: bool = False,
    ):
        """`one_hot` looks up by a matmul with one-hot rows: much slower on CPU (19 % of a T5X step), it may be faster
        on TPU where `vocab` is sharded."""
        table = stddev * jax.random.normal(rngs.params(), (vocab_size, d_model), jnp.float32)
        self.embedding = param(table, ("vocab", "embed"), summed=("embed",))
        self.dtype, self.one_hot = dtype, one_hot

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [batch, length] -> [batch, length, d_model]."""
        table = value_of(self.embedding, self.dtype)
        names = ("batch", "length", "embed")
        if self.one_hot:
            return constrain(jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ table, names)
        tokens = constrain(tokens, ("batch", "length"), free_for="vocab")
        return constrain_lookup(table[tokens], names, table, ("vocab", "embed"))

    def logits(self, x: jax.Array, scale: bool = True) -> jax.Array:
        """x [batch, length, d_model] -> logits [batch, length, vocab] by the table (tied output); `scale` multiplies by
        1/sqrt(d_model), as T5 does."""
        table = value_of(self.embedding, x.dtype)
        return jnp.einsum("bld,vd->blv", x * table.shape[1] ** -0.5 if scale else x, table)


class EmbeddingFactory(Protocol):
    """A gin-configured `Embedding`."""

    def __call__(self, *, vocab_size: int, d_model: int, rngs: nnx.Rngs, dtype: str) -> Embedding: ...


class OutputBias(nnx.Module):
    """A bias [vocab] on logits that come from the embedding table."""

    def __init__(self, vocab_size: int):
        self.bias = param(jnp.zeros((vocab_size,)), ("vocab",))

    def __call__(self, logits: jax.Array) -> jax.Array:
        """logits [batch, length, vocab] -> the same shape and dtype."""
        return logits + self.bias[...].astype(logits.dtype)


class PositionEmbedding(nnx.Module):
    """A learned vector for each position in a segment (GPT-2, BERT): a table [positions, d_model]."""

    def __init__(self, d_model: int, num_positions: int, *, rngs: nnx.Rngs, stddev: float = 0.02):
        table = stddev * jax.random.normal(rngs.params(), (num_positions, d_model), jnp.float32)
        self.embedding = param(table, ("positions", "embed"))

    def __call__(self, x: jax.Array, positions: jax.Array, length: int) -> jax.Array:
        """Adds to x [batch, queries, d_model] the vectors of `positions` [batch, queries], of rows of `length` tokens.

        Raises:
          ValueError: rows are longer than the table, where a look-up would return its last entry.
        """
        table = self.embedding[...].astype(x.dtype)
        if length > table.shape[0]:
            raise ValueError(
                f"rows of {length} tokens are longer than the {table.shape[0]} positions that were learned: "
                "PositionEmbedding.num_positions; shorten TASK_FEATURE_LENGTHS, or what is to be decoded"
            )
        names = ("batch", "length", "embed")
        return x + constrain_lookup(table[positions], names, table, ("positions", "embed"))


class TypeEmbedding(nnx.Module):
    """A learned vector for each token type (BERT): a table [types, d_model], never sharded by type."""

    def __init__(self, d_model: int, num_types: int, *, rngs: nnx.Rngs, stddev: float = 0.02):
        table = stddev * jax.random.normal(rngs.params(), (num_types, d_model), jnp.float32)
        self.embedding = param(table, (None, "embed"))

    def __call__(self, x: jax.Array, types: jax.Array | None) -> jax.Array:
        """Adds to x [batch, length, d_model] the vectors of `types` int32 [batch, length], or of type 0."""
        table = self.embedding[...].astype(x.dtype)
        if types is None:
            return x + table[0]
        names = ("batch", "length", "embed")
        return x + constrain_lookup(table[types], names, table, (None, "embed"))
