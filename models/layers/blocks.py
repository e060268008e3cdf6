"""Transformer blocks: attention and feed-forward layers around a residual stream, and where they are normalised."""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import TOKENS, constrain_operand, in_rings
from meshway.models.layers.attention import Attention
from meshway.models.layers.cache import read
from meshway.models.layers.masks import Mask, row_positions
from meshway.models.layers.mlp import Mlp, project_all
from meshway.models.layers.norm import RMSNorm, dropout, split_key
from meshway.models.layers.positions import BiasFactory, PositionBias, RelativePositionBias
from meshway.models.layers.sharded_products import PartialSums, sum_of
from meshway.models.layers.side_outputs import with_padding_mask


class LayerFactory(Protocol):
    """A gin-configured layer class: attention, MLP or normalisation."""

    def __call__(self, *, d_model: int, rngs: nnx.Rngs) -> Any: ...


class SelfAttentionBlock(nnx.Module):
    """Self-attention, then a feed-forward layer."""

    def __init__(
        self,
        d_model: int,
        attention: LayerFactory = Attention,  # type: ignore[assignment]  # recipes bind the rest
        mlp: LayerFactory = Mlp,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        norms: Literal["pre", "post", "both"] = "pre",
        parallel: bool = False,
        position_bias: BiasFactory | None = None,
        bidirectional_bias: bool = False,
        dropout_rate: float = 0.0,
    ):
        """`norms` is where each layer f is normalised: "pre" x + f(norm(x)), "post" norm(x + f(x)) as in Vaswani et al.
        2017 and BERT, "both" x + post_norm(f(norm(x))) as in Gemma 2. `parallel` adds both layers to x at once,
        x + attention(norm(x)) + mlp(norm(x)), with one norm for both (GPT-J; PaLM, section 2). `position_bias` is one
        of the block's own on its attention scores (umT5; Chung et al. 2023), with separate halves for keys before and
        after the query where it is `bidirectional_bias`.

        Raises:
          ValueError: an unknown order, or a parallel block whose norms are not "pre".
        """
        if norms not in ("pre", "post", "both"):
            raise ValueError(f"SelfAttentionBlock.norms must be 'pre', 'post' or 'both', not {norms!r}")
        if parallel and norms != "pre":
            raise ValueError(f"SelfAttentionBlock: a parallel block has norms='pre', not {norms!r}")
        twice = norms == "both"
        self.attention_norm = norm(d_model=d_model, rngs=rngs)
        self.attention = attention(d_model=d_model, rngs=rngs)
        self.attention_post_norm = norm(d_model=d_model, rngs=rngs) if twice else None
        self.mlp_norm: Any = None if parallel else norm(d_model=d_model, rngs=rngs)
        self.mlp = mlp(d_model=d_model, rngs=rngs)
        self.mlp_post_norm = norm(d_model=d_model, rngs=rngs) if twice else None
        self.position_bias = (
            None if position_bias is None else position_bias(bidirectional=bidirectional_bias, rngs=rngs)
        )
        self.norms, self.parallel, self.dropout_rate = norms, parallel, dropout_rate

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
        post = self.norms == "post"
        normed = x if post else self.attention_norm(x)
        bias = _with_own(self.position_bias, bias, x.shape[1], mask, None if cache is None else cache_index)
        together = self._sums_together(rng)
        options: dict[str, Any] = {"sum_later": True} if together else {}
        hidden = None
        if together:
            normed = constrain_operand(normed, ("batch", "length", "embed"), free_for="mlp")
            if in_rings():  # x goes around once for both layers
                made = project_all(normed, TOKENS, *self.attention.inputs, *self.mlp.inputs)
                options["projected"], hidden = made[:3], made[3:]
        y, cache = self.attention(
            normed,
            **options,
            positions=positions,
            bias=bias,
            mask=mask,
            cache=cache,
            cache_index=cache_index,
            rng=keys[0],
        )
        if isinstance(y, PartialSums):
            return x + sum_of(y, self.mlp.terms(normed, sum_later=True, projected=hidden)), cache
        if self.attention_post_norm is not None:
            y = self.attention_post_norm(y)
        x = x + dropout(y, self.dropout_rate, keys[1])
        if post:
            x = self.attention_norm(x)
        if self.mlp_norm is not None:
            normed = x if post else self.mlp_norm(x)
        with with_padding_mask(mask):
            y = self.mlp(normed, rng=keys[2]) if hidden is None else self.mlp.terms(normed, projected=hidden)
        if self.mlp_post_norm is not None:
            y = self.mlp_post_norm(y)
        x = x + dropout(y, self.dropout_rate, keys[3])
        return (self.mlp_norm(x) if post else x), cache

    def _sums_together(self, rng: jax.Array | None) -> bool:
        """Whether the outputs of both layers are added before devices exchange their terms (Pope et al. 2022, section
        3.4): a parallel block of the shared layers, without dropout or biases between."""
        attention, mlp = self.attention, self.mlp
        if not self.parallel or rng is not None or type(attention) is not Attention or type(mlp) is not Mlp:
            return False
        return attention.out.bias is None and mlp.wo.bias is None

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Any:
        """Returns an empty self-attention cache for `length` positions."""
        return self.attention.empty_cache(batch, length, dtype)


class CrossAttentionBlock(nnx.Module):
    """Self-attention, attention to an encoder's output, then a feed-forward layer: x + f(norm(x)) for each part f."""

    def __init__(
        self,
        d_model: int,
        attention: LayerFactory = Attention,  # type: ignore[assignment]  # recipes bind the rest
        mlp: LayerFactory = Mlp,  # type: ignore[assignment]  # recipes bind the rest
        *,
        rngs: nnx.Rngs,
        norm: LayerFactory = RMSNorm,
        position_bias: BiasFactory | None = None,
        dropout_rate: float = 0.0,
    ):
        """`position_bias` is one of the block's own on the scores of its self-attention (umT5)."""
        self.attention_norm = norm(d_model=d_model, rngs=rngs)
        self.attention = attention(d_model=d_model, rngs=rngs)
        self.cross_attention_norm = norm(d_model=d_model, rngs=rngs)
        self.cross_attention = attention(d_model=d_model, rngs=rngs)
        self.mlp_norm = norm(d_model=d_model, rngs=rngs)
        self.mlp = mlp(d_model=d_model, rngs=rngs)
        self.position_bias = None if position_bias is None else position_bias(bidirectional=False, rngs=rngs)
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
        """x [batch, length, d_model]; `encoded` [batch, kv_length, d_model] unless the cache holds its projections.

        With a cache x may have several adjacent rows for each row of the encoder; `cross_mask` is then
        [batch, 1, rows of each * length, kv_length].
        """
        keys = split_key(rng, 6)
        bias = _with_own(self.position_bias, bias, x.shape[1], mask, None if cache is None else cache_index)
        y, own = self.attention(
            self.attention_norm(x),
            bias=bias,
            mask=mask,
            cache=None if cache is None else cache["own"],
            cache_index=cache_index,
            rng=keys[0],
        )
        x = x + dropout(y, self.dropout_rate, keys[1])
        attended = self.cross_attention.keys_values(encoded) if cache is None else read(cache["encoded"], x.dtype)
        # Several predictions of one example are queries of one row: its keys are stored, and read, once.
        grouped = self.cross_attention_norm(x).reshape(attended[0].shape[0], -1, x.shape[-1])
        queries = "length" if cache is None else None
        y, _ = self.cross_attention(grouped, attended=attended, mask=cross_mask, queries=queries, rng=keys[2])
        x = x + dropout(y.reshape(x.shape), self.dropout_rate, keys[3])
        with with_padding_mask(mask):
            y = self.mlp(self.mlp_norm(x), rng=keys[4])
        cache = None if cache is None else {"own": own, "encoded": cache["encoded"]}
        return x + dropout(y, self.dropout_rate, keys[5]), cache

    def empty_cache(self, encoded: jax.Array, length: int) -> Any:
        """Returns an empty self-attention cache for `length` positions, and the encoder's keys and values."""
        return {
            "own": self.attention.empty_cache(encoded.shape[0], length, encoded.dtype),
            "encoded": self.cross_attention.full_cache(encoded),
        }


def _with_own(
    own: RelativePositionBias | None,
    bias: PositionBias | None,
    length: int,
    mask: Mask | None,
    cache_index: jax.Array | None,
) -> PositionBias | None:
    """Returns a block's own position bias where it has one, else `bias`, the stack's.

    Args:
      length: of the rows.
      mask, cache_index: with a cache, the mask is over all its slots, and the positions of queries are `cache_index`,
        int32 [batch, queries].

    Raises:
      ValueError: the stack has one, too.
    """
    if own is None:
        return bias
    if bias is not None:
        raise ValueError("a block has a position_bias of its own and gets its stack's: bind one of them to None")
    if cache_index is None:
        return own.square(length)
    assert mask is not None
    return own(cache_index, row_positions(mask.dense.shape[-1]))
