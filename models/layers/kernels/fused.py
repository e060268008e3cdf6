"""Attention by kernels that others wrote for one kind of accelerator: splash on TPUs, cuDNN's on NVIDIA GPUs."""

import dataclasses
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from meshway.models.layers.kernels.attention_shards import Operands, cut_of, on_shards, operands
from meshway.models.layers.kernels.choice import LANES, Call, cudnn_refuses, describe, splash_refuses
from meshway.models.layers.kernels.reference import Options
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """A `Kernel` for TPUs: jax's splash attention, written in Pallas, which skips blocks that its mask hides.

    It knows causal and full masks, windows, packed segments, soft caps, sinks and fewer key heads than query heads, at
    lengths that are multiples of 128; rows and heads may be cut. It has no biases, prefixes or dropout.

    Attributes:
      block: most queries and keys of one block.
      interpret: run it as plain jax, on any platform and slowly: for tests.
    """

    block: int = 512
    interpret: bool = False

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`; padding attends to padding.

        Raises:
          ValueError: something it cannot do; see `choice.splash_refuses`.
        """
        return _fused("SplashAttention", splash_refuses, self._attend, query, key, value, options)

    def _attend(self, terms: Terms) -> "Splash":
        return Splash(terms, self.block, self.interpret)


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """A `Kernel` for NVIDIA GPUs: cuDNN's flash attention, by `jax.nn.dot_product_attention`.

    It knows causal and full attention, windows in causal attention, and fewer key heads than query heads, in bfloat16
    or float16, with a head_dim that is a multiple of 8 up to 128; rows and heads may be cut. jax's door to it has no
    packed segments, and it has no biases, prefixes, soft caps, sinks or dropout like ours.
    """

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`.

        Raises:
          ValueError: something it cannot do; see `choice.cudnn_refuses`.
        """
        return _fused("CudnnAttention", cudnn_refuses, Cudnn, query, key, value, options)


@dataclasses.dataclass(frozen=True)
class Splash:
    """Splash attention on plain local arrays."""

    terms: Terms
    block: int
    interpret: bool

    def __call__(self, queries: Queries, keys: Keys, by_head: ByHead) -> jax.Array:
        """Returns [batch, length, heads, head_dim]."""
        from jax.experimental.pallas.ops.tpu import splash_attention as splash  # slow to import, and of use on TPUs

        batch, length, heads, _ = queries.query.shape
        shape = (length, keys.key.shape[1])
        mask: Any = splash.FullMask(shape)
        if self.terms.window is not None:
            reach = self.terms.window - 1
            mask = splash.LocalMask(shape, (reach, 0 if self.terms.causal else reach), offset=0)
        elif self.terms.causal:
            mask = splash.CausalMask(shape)
        q, kv = (_block(size, self.block) for size in shape)
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=self.terms.soft_cap,
            interpret=self.interpret,
        )
        rows = [None if side.sight is None else side.sight.segments for side in (queries, keys)]
        segments = None
        if all(x is not None for x in rows):
            segments = splash.SegmentIds(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in rows if x is not None))
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (queries.query, keys.key, keys.value))
        out = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(*heads_first, segments, by_head.sinks)
        return jnp.swapaxes(out, 1, 2).astype(queries.query.dtype)


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """cuDNN's attention on plain local arrays."""

    terms: Terms

    def __call__(self, queries: Queries, keys: Keys, by_head: ByHead) -> jax.Array:
        """Returns [batch, length, heads, head_dim]."""
        window = None if self.terms.window is None else (self.terms.window - 1, 0)
        return jax.nn.dot_product_attention(
            queries.query,
            keys.key.astype(queries.query.dtype),
            keys.value.astype(queries.query.dtype),
            scale=1.0,
            is_causal=self.terms.causal,
            local_window_size=window,
            implementation="cudnn",
        )


Attend = Callable[[Queries, Keys, ByHead], jax.Array]


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """A function of local arrays that jax can differentiate, as a `ShardKernel`; `attend` is hashable."""

    attend: Attend

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Returns the output, and the function that turns its gradient back."""

        def of(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array | None) -> jax.Array:
            mine = queries._replace(query=query), keys._replace(key=key, value=value), by_head._replace(sinks=sinks)
            return self.attend(*mine)

        return jax.vjp(of, queries.query, keys.key, keys.value, by_head.sinks)

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Turns the gradient back."""
        query, key, value, sinks = saved(gradient)
        return Queries(query), Keys(key, value), ByHead(sinks=sinks)


def _fused(
    name: str,
    refuses: Callable[[Call], str | None],
    attend: Callable[[Terms], Attend],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    options: Options,
) -> jax.Array:
    """Computes attention by a fused kernel, on each device's rows and heads.

    Raises:
      ValueError: the kernel refuses.
    """
    cut = cut_of(query, key)
    refusal = refuses(describe(query, key, **options, cut=cut))
    if refusal is not None:
        raise ValueError(f"{name}: {refusal}; chunked.ChunkedAttention as attention.Attention.kernel can do this")
    given: Operands = operands(name, query, key, value, **options, blocks=(1, 1))
    if cut is None or cut.mesh.size == 1:
        return attend(given.terms)(given.queries, given.keys, given.by_head)
    return on_shards(Differentiated(attend(given.terms)), given, cut, by_head=cut.heads)


def _block(length: int, most: int) -> int:
    """Returns the largest block up to `most` that divides a length, both multiples of `LANES`."""
    fitting = (size for size in range(LANES, max(most, LANES) + 1, LANES) if length % size == 0)
    return max(fitting)
