"""Multi-head attention, with grouped keys and values, and its cache."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meshway.framework.axes import FOLLOWS, Names, constrain, constrain_operand, in_rings, mesh_axes
from meshway.models.layers import cache as cache_lib
from meshway.models.layers.cache import Cache, KeysValues
from meshway.models.layers.integer_products import IntegerProduct
from meshway.models.layers.kernels.auto import AutoAttention
from meshway.models.layers.kernels.reference import AttentionKernel, dot_product_attention
from meshway.models.layers.masks import AttentionMetadata, Mask, local_window, row_metadata, row_positions
from meshway.models.layers.mlp import Linear, fan_in_init, project_all
from meshway.models.layers.positions import PositionBias, with_alibi
from meshway.models.layers.sharded_products import HeadExchange, PartialSums, head_exchange
from meshway.models.module import param

KEYS = ("batch", "kv_length", "kv_heads", "head_dim")
REPEATED_KEYS = ("batch", "kv_length", "heads", "head_dim")  # with copies of heads, which divide as those of queries
ATTENTION = {followed: name for name, followed in FOLLOWS.items()}  # a projection's axis -> attention's
PARTS = ("query", "key", "value", "out")


@runtime_checkable
class ScoreTerm(Protocol):
    """A term added to attention scores that depends on queries, keys and their row positions. It needs all scores at
    once: attention is then computed by `dot_product_attention`."""

    def scores(self, query: jax.Array, key: jax.Array, positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        """Returns float32 [batch, heads, length, kv_length] for queries and keys as they are multiplied, at row
        positions [rows, length] and [rows, kv_length]."""
        ...


class Attention(nnx.Module):
    """Self- or cross-attention."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        num_kv_heads: int | None = None,
        biases: Collection[str] = (),
        qk_norm: Callable[..., Any] | None = None,
        scale_logits: bool = True,
        query_scale: float | None = None,
        rotary: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
        relative: Callable[..., ScoreTerm] | None = None,
        alibi: bool = False,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        dropout_rate: float = 0.0,
        kernel: AttentionKernel = AutoAttention(),
        cache_dtype: str | None = None,
        products: IntegerProduct | None = None,
    ):
        """Builds the projections.

        Args:
          num_kv_heads: fewer than `num_heads` is GQA (Ainslie et al. 2023), 1 is MQA (Shazeer 2019); None for as many.
          biases: which of "query", "key", "value" and "out" add a bias to their projection.
          qk_norm: normalisation of each head's queries and keys, called with d_model=head_dim, axis="head_dim", rngs.
          scale_logits: False leaves out 1/sqrt(head_dim) and starts the query kernel that much smaller, as T5 does.
          query_scale: what queries are multiplied by instead of 1/sqrt(head_dim).
          rotary: rotates x [batch, length, heads, head_dim] by positions [batch, length], for queries and keys; one
            that is a `ScoreTerm` (`rotary.ReRoPE`) corrects their scores too.
          relative: called with d_model, num_heads, head_dim and rngs for a `ScoreTerm` (`positions.RelativeScores`).
          alibi: subtracts a fixed slope of each head times the distance of query and key (`positions.with_alibi`).
          window: a query sees its own position and the window-1 before it, and where the mask is not causal as many
            after; positions are those in the row, whatever is packed in it.
          soft_cap: scores become soft_cap * tanh(scores / soft_cap), before the mask.
          sinks: one learned score for each head that takes part in the softmax and has no value.
          kernel: computes attention, except over a cache or with a `ScoreTerm`, where `dot_product_attention` does;
            the default chooses a kernel by platform, shapes and options. Layouts that shard the length bind one that
            supports it.
          cache_dtype: how keys and values are stored while decoding: "float32", "bfloat16", or "int8" with a scale for
            each head and position (`cache.Stored`); None for the dtype of activations. They are rounded as they are
            written, those of an encoder's output too, and attended to in the dtype of the queries.
          products: computes the projections in integers; scores and their products with values stay as they are.

        Raises:
          ValueError: `num_heads` is not a multiple of `num_kv_heads`, or an option is out of its range.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check(num_heads, num_kv_heads, biases, scale_logits, query_scale, window, soft_cap)
        cache_lib.check_cache_dtype(cache_dtype)
        heads, kv_heads = {"heads": num_heads}, {"kv_heads": num_kv_heads}
        inputs, size = {"embed": d_model}, {"head_dim": head_dim}

        def linear(name: str, inputs: dict[str, int], outputs: dict[str, int], scale: float = 1.0) -> Linear:
            init = fan_in_init("normal", scale)
            return Linear(inputs, outputs, rngs=rngs, init=init, use_bias=name in biases, products=products)

        self.query = linear("query", inputs, heads | size, 1.0 if scale_logits else 1.0 / head_dim)
        self.key = linear("key", inputs, kv_heads | size)
        self.value = linear("value", inputs, kv_heads | size)
        self.out = linear("out", heads | size, inputs)
        self.query_norm, self.key_norm = (
            None if qk_norm is None else qk_norm(d_model=head_dim, axis="head_dim", rngs=rngs) for _ in range(2)
        )
        self.sinks = param(jnp.zeros((num_heads,)), ("heads",)) if sinks else None
        if query_scale is None:
            query_scale = head_dim**-0.5 if scale_logits else 1.0
        self.logit_scale, self.soft_cap = query_scale, soft_cap
        self.relative = relative and relative(d_model=d_model, num_heads=num_heads, head_dim=head_dim, rngs=rngs)
        self.rotary, self.alibi, self.window = rotary, alibi, window
        self.dropout_rate, self.kernel, self.cache_dtype = dropout_rate, kernel, cache_dtype
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim

    @property
    def inputs(self) -> list[tuple[Linear, Names | None]]:
        """The maps of x to queries, keys and values, as `project_all` takes them."""
        return [(self.query, None), (self.key, KEYS[:2]), (self.value, KEYS[:2])]

    def keys_values(
        self,
        source: jax.Array,
        positions: jax.Array | None = None,
        projected: Sequence[jax.Array] | None = None,
    ) -> KeysValues:
        """Projects source [batch, kv_length, d_model] to keys and values [batch, kv_length, kv_heads, head_dim], where
        attention has them, with the heads, in its order, that it has (`_copies`); `projected`: keys and values, where
        these are made already."""
        if projected is None:
            source = constrain_operand(source, ("batch", "length", "embed"), free_for="kv_heads")
            projected = project_all(source, ("batch", "length"), *self.inputs[1:])
        key, value = checkpoint_name(projected[0], "key_proj"), checkpoint_name(projected[1], "value_proj")
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.rotary is not None and positions is not None:
            key = self.rotary(key, positions)
        if (copies := self._copies(key.shape[0])) > 1:
            both = [jnp.repeat(constrain(each, KEYS), copies, axis=2) for each in (key, value)]
            return self._for_attention(both[0], REPEATED_KEYS)[0], self._for_attention(both[1], REPEATED_KEYS)[0]
        return self._for_attention(key, KEYS)[0], self._for_attention(value, KEYS)[0]

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Returns an empty cache for the keys and values of `length` positions; `dtype` is that of activations."""
        shape = (batch, length, self.num_kv_heads * self._copies(batch), self.head_dim)
        return cache_lib.empty_cache(shape, self._cache_dtype(dtype))

    def full_cache(self, source: jax.Array) -> Cache:
        """Returns a cache with the keys and values of a source [batch, kv_length, d_model] that all steps attend to."""
        return cache_lib.store_all(self.keys_values(source), self._cache_dtype(source.dtype))

    def __call__(
        self,
        x: jax.Array,
        *,
        attended: KeysValues | None = None,
        positions: jax.Array | None = None,
        bias: PositionBias | None = None,
        mask: Mask | None = None,
        cache: Cache | None = None,
        cache_index: jax.Array | None = None,
        queries: Literal["length"] | None = "length",
        rng: jax.Array | None = None,
        sum_later: bool = False,
        projected: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array | PartialSums, Cache | None]:
        """Attends from x [batch, length, d_model].

        Args:
          attended: projected keys and values (cross-attention); None attends to x itself.
          positions: [batch, length], those of x in its segment, for rotary embeddings.
          bias, mask: over the cache's length where there is a cache.
          cache: keys and values seen so far; those of x are written at `cache_index` before attending.
          cache_index: int32 [batch, length], the slot of each position of x: its position in the row.
          queries: the logical axis of x's second dimension; None where no layout shards it, as where it holds the
            predictions of one example.
          rng: dropout key.
          sum_later: return the output's terms on each device, where there are such (`Linear.terms`).
          projected: x through `inputs`, where a block has done that.

        Returns:
          (output [batch, length, d_model], or its terms with `sum_later` alone; the updated cache or None).

        Raises:
          ValueError: rotary embeddings without positions, or a window or ALiBi in cross-attention, where queries and
            keys are of different rows.
        """
        x = constrain_operand(x, ("batch", queries, "embed"), free_for="heads")
        if projected is None and attended is None and in_rings():
            projected = project_all(x, ("batch", queries), *self.inputs)
        query = self.query(x, ("batch", queries)) if projected is None else projected[0]
        query = checkpoint_name(query, "query_proj")
        if self.query_norm is not None:
            query = self.query_norm(query)
        query = query * self.logit_scale
        terms = self._terms() if attended is None else []
        if attended is None:
            if self.rotary is not None:
                if positions is None:
                    raise ValueError("Attention with rotary embeddings needs the positions of its tokens")
                query = self.rotary(query, positions)
            attended = self.keys_values(x, positions, None if projected is None else projected[1:])
            in_row = row_positions(x.shape[1])
            if cache is not None:
                assert cache_index is not None
                in_row, cache = cache_index, cache_lib.write(cache, attended, cache_index)
                attended = cache_lib.read(cache, x.dtype)
            kv_in_row = row_positions(attended[0].shape[1])
            if self.window is not None:
                metadata = AttentionMetadata(row_positions=in_row, ordered=cache is None)
                mask = local_window(mask, self.window, metadata, row_metadata(attended[0].shape[1]))
            if self.alibi:
                bias = with_alibi(bias, self.num_heads, in_row, kv_in_row)
            for term in terms:
                bias = _added(bias, term.scores(query, attended[0], in_row, kv_in_row), in_row, kv_in_row)
        elif self.window is not None or self.alibi or self.relative is not None:
            raise ValueError(
                "Attention.window, alibi and relative are for self-attention: in cross-attention keys have no position "
                "in the queries' row; give cross-attention an Attention of its own, by a gin scope"
            )
        names = ("batch", queries, "heads", "head_dim")
        y = self._attend(query, attended, names, bias, mask, rng, has_terms=bool(terms))
        out = self.out.terms(checkpoint_name(y, "attention_out"), ("batch", queries), sum_later=sum_later)
        if isinstance(out, PartialSums):
            return out, cache
        return checkpoint_name(constrain(out, ("batch", queries, "embed")), "out_proj"), cache

    def _attend(
        self,
        query: jax.Array,
        attended: KeysValues,
        names: Names,
        bias: PositionBias | None,
        mask: Mask | None,
        rng: jax.Array | None,
        has_terms: bool,
    ) -> jax.Array:
        """Returns what scaled queries [batch, length, heads, head_dim] attend to, of their shape and, as they are, with
        axes `names`; `has_terms`: the bias has terms that only the reference kernel takes."""
        query, exchange = self._for_attention(query, names)
        if exchange is not None and exchange.order is not None:
            if has_terms:
                raise ValueError(
                    "Attention: ReRoPE's and Transformer-XL's terms know heads in their own order, and the layout "
                    "gives attention another; shard attention's batch over all axes that shard heads, or its heads"
                )
            bias = bias and _in_order(bias, exchange)
        # The mask of a cache and the scores of terms are dense arrays only.
        blocks = (mask is None or mask.queries is not None) and not has_terms
        attend = self.kernel if blocks else dot_product_attention
        sinks = None if self.sinks is None else jnp.asarray(self.sinks[...])
        if sinks is not None and exchange is not None:
            sinks = exchange.reordered(sinks, 0)
        y = attend(
            query,
            *attended,
            bias=bias,
            mask=mask,
            soft_cap=self.soft_cap,
            sinks=sinks,
            dropout_rate=self.dropout_rate,
            rng=rng,
        )
        return constrain(y, names) if exchange is None else exchange.back(y)

    def _for_attention(self, x: jax.Array, names: Names) -> tuple[jax.Array, HeadExchange | None]:
        """Returns a projection [batch, length, heads, head_dim] where attention is to have it, and how it came there if
        devices exchanged heads for examples."""
        x = constrain(x, names)
        after = _in_attention(names)
        exchange = head_exchange(names, after, x.shape)
        if exchange is not None:
            return exchange.there(x), exchange
        elsewhere = any(mesh_axes(name) != mesh_axes(followed) for followed, name in ATTENTION.items())
        return (constrain(x, after) if elsewhere else x), None

    def _copies(self, batch: int) -> int:
        """Returns how many copies of each head of keys and values attention has.

        More than one only where the layout gives devices query heads that are not adjacent, and heads of keys do not
        divide as these do. Each device then has, for its examples, a copy of each head that its queries meet.
        """
        names = ("batch", None, "heads", "head_dim")
        exchange = head_exchange(names, _in_attention(names), (batch, 1, self.num_heads, self.head_dim))
        if exchange is None or exchange.order is None or self.num_kv_heads == 1:
            return 1
        names, shape = ("batch", None, "kv_heads", "head_dim"), (batch, 1, self.num_kv_heads, self.head_dim)
        keys = head_exchange(names, _in_attention(names), shape)
        if keys is not None and keys.order == exchange.order:
            return 1
        group = self.num_heads // self.num_kv_heads
        return group // math.gcd(group, exchange.adjacent(self.num_heads))

    def _cache_dtype(self, computed: jnp.dtype) -> str | jnp.dtype:
        return computed if self.cache_dtype is None else self.cache_dtype

    def _terms(self) -> list[ScoreTerm]:
        return [term for term in (self.rotary, self.relative) if isinstance(term, ScoreTerm)]


def _in_attention(names: Names) -> Names:
    """Returns the logical axes that an array of a projection has where attention computes."""
    return tuple(ATTENTION.get(name or "", name) for name in names)


def _in_order(bias: PositionBias, exchange: HeadExchange) -> PositionBias:
    """Returns a bias whose heads are in the order of attention's, dense only."""
    dense = exchange.reordered(bias.dense, 1)
    return PositionBias(dense, None, bias.query_positions, bias.kv_positions, None)


def _added(bias: PositionBias | None, scores: jax.Array, positions: jax.Array, kv_positions: jax.Array) -> PositionBias:
    """Returns the sum of a bias and a term's scores, dense only."""
    return PositionBias(scores if bias is None else scores + bias.dense, None, positions, kv_positions, None)


def _check(
    num_heads: int,
    num_kv_heads: int,
    biases: Collection[str],
    scale_logits: bool,
    query_scale: float | None,
    window: int | None,
    soft_cap: float | None,
) -> None:
    if num_heads % num_kv_heads:
        raise ValueError(f"Attention: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if isinstance(biases, str) or not set(biases) <= set(PARTS):
        raise ValueError(f"Attention.biases must be a list of some of {list(PARTS)}, not {biases!r}")
    if query_scale is not None and not scale_logits:
        raise ValueError(
            f"Attention: query_scale={query_scale} scales queries, and scale_logits=False does not: bind one of them"
        )
    if window is not None and window < 1:
        raise ValueError(f"Attention.window must be at least 1 (a query's own position), not {window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"Attention.soft_cap must be above 0, not {soft_cap}; None leaves scores as they are")
