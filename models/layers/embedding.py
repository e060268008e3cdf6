"""Token embeddings."""

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain, constrain_lookup
from meshway.models.module import param


class Embedding(nnx.Module):
    """A table [vocab, d_model]; its dtype is the dtype the whole network computes in."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        rngs: nnx.Rngs,
        stddev: float = 1.0,
        dtype: str = "float32",
        one_hot: bool = False,
    ):
        """`one_hot` looks up by a matmul with one-hot rows: dearer by far on CPU (19 % of a T5X step), it may pay
        on TPU where `vocab` is sharded."""
        table = stddev * jax.random.normal(rngs.params(), (vocab_size, d_model), jnp.float32)
        self.embedding = param(table, ("vocab", "embed"))
        self.dtype, self.one_hot = dtype, one_hot

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """tokens int32 [batch, length] -> [batch, length, d_model]."""
        table = jnp.asarray(self.embedding[...], self.dtype)
        names = ("batch", "length", "embed")
        if self.one_hot:
            return constrain(jax.nn.one_hot(tokens, table.shape[0], dtype=table.dtype) @ table, names)
        tokens = constrain(tokens, ("batch", "length"), free_for="vocab")
        return constrain_lookup(table[tokens], names, table, ("vocab", "embed"))

    def logits(self, x: jax.Array) -> jax.Array:
        """Scores x [batch, length, d_model] against the table (tied output), scaled by 1/sqrt(d_model) as T5 does."""
        table = self.embedding[...].astype(x.dtype)
        return jnp.einsum("bld,vd->blv", x * table.shape[1] ** -0.5, table)
