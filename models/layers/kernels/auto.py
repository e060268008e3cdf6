"""The default attention kernel, which chooses among the others, and the fused kernels of TPUs and GPUs."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from meshway.models.layers.kernels.attention_shards import (
    AttentionSharding,
    Operands,
    attention_sharding,
    by_blocks,
    on_shards,
    operands,
)
from meshway.models.layers.kernels.chunked import ChunkedAttention
from meshway.models.layers.kernels.reference import AttentionKernel, Options, dot_product_attention
from meshway.models.layers.kernels.scores import ByHead, Keys, Queries, Terms
from meshway.models.layers.masks import Mask
from meshway.models.layers.positions import PositionBias

# Scores of one head and row up to which the reference is as fast as chunks, and its memory does not matter. Measured on
# CPU (by `meshway bench attention`); elsewhere a guess, since chunks are many small kernels there.
REFERENCE_SCORES = {"cpu": 512 * 512, "cuda": 1024 * 1024, "rocm": 1024 * 1024, "tpu": 1024 * 1024}
LANES = 128  # splash takes multiples of this many queries and keys
MOST_SPLASH_SCORES = 1 << 24  # of a block: 64 MiB in float32, half of what the largest TPU core keeps near its units
CUDNN_HEAD_DIM = 128

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of attention asks for.

    Attributes:
      length, kv_length, head_dim: of queries and keys.
      dtype: of queries.
      causal, window, segments, prefix: what the mask hides; `segments` also for padding.
      ordered: whether row positions are 0, 1, 2 ... for queries and keys alike.
      table, slopes: which biases are added to scores.
      soft_cap, sinks, dropout: whether there are any.
      by_blocks: whether mask and bias can be computed for any block, rather than given as dense arrays.
      sharded: which of "length", "kv_length" and "head_dim" the mesh shards.
      apart: whether it shards the keys' length, and by other axes than the queries'.
    """

    length: int
    kv_length: int
    head_dim: int
    dtype: str = "float32"
    causal: bool = False
    window: int | None = None
    segments: bool = False
    prefix: bool = False
    ordered: bool = True
    table: bool = False
    slopes: bool = False
    soft_cap: bool = False
    sinks: bool = False
    dropout: bool = False
    by_blocks: bool = True
    sharded: tuple[str, ...] = ()
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel's name ("reference", "chunked", "cudnn" or "splash"), and why it was chosen."""

    name: str
    reason: str


def choose(platform: str, call: Call) -> Choice:
    """Returns the kernel for a call on a platform ("cpu", "cuda", "rocm", "tpu").

    The fastest that supports the call: splash on TPUs, cuDNN on CUDA; elsewhere, or where these do not support it, the
    reference for few scores and chunked attention for many, which both support everything.
    """
    if not call.by_blocks:
        return Choice("reference", "the mask or the bias is a dense array only")
    if "head_dim" in call.sharded:
        return Choice("reference", "the layout shards head_dim")
    why = ""
    for fused, fused_platform, refuses in (("splash", "tpu", splash_refuses), ("cudnn", "cuda", cudnn_refuses)):
        if platform == fused_platform:
            refusal = refuses(call)
            if refusal is None:
                return Choice(fused, f"the fastest on {platform} that supports this call")
            why = f"; no {fused}: {refusal}"
    pairs = call.length * call.kv_length
    if pairs <= REFERENCE_SCORES.get(platform, 512 * 512):
        return Choice("reference", f"{call.length} x {call.kv_length} scores are few{why}")
    if call.apart:
        return Choice("reference", f"the layout shards the keys' length by other axes than the queries'{why}")
    return Choice("chunked", f"{call.length} x {call.kv_length} scores are many{why}")


def splash_refuses(call: Call) -> str | None:
    """Returns why splash attention does not support a call, None if it does.

    It supports masks that follow from row positions and segments, soft caps, sinks and fewer key heads than query
    heads, but no bias, no dropout, and only lengths that are multiples of 128.
    """
    refusal = _unfused(call)
    if refusal is None and (call.length % LANES or call.kv_length % LANES):
        refusal = f"its lengths are multiples of {LANES}, not {call.length} and {call.kv_length}"
    return refusal


def cudnn_refuses(call: Call) -> str | None:
    """Returns why cuDNN's attention does not support a call, None if it does.

    It supports causal masks, windows in them, and 16-bit floats only; as jax exposes it, no segments, soft caps or
    sinks.
    """
    if call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {call.dtype}"
    for name, asked in (("segments", call.segments), ("soft caps", call.soft_cap), ("sinks", call.sinks)):
        if asked:
            return f"it supports no {name}"
    if call.head_dim % 8 or call.head_dim > CUDNN_HEAD_DIM:
        return f"head_dim is a multiple of 8 up to {CUDNN_HEAD_DIM}, not {call.head_dim}"
    if call.window is not None and not call.causal:
        return "its windows are causal"
    return _unfused(call)


def _unfused(call: Call) -> str | None:
    """Returns why neither of the fused kernels supports a call, None if either may."""
    for name, asked in (("biases", call.table or call.slopes), ("dropout", call.dropout), ("prefixes", call.prefix)):
        if asked:
            return f"it supports no {name}"
    if not call.by_blocks:
        return "the mask is a dense array only"
    if call.sharded:
        return f"the layout shards {' and '.join(call.sharded)}"
    if (call.causal or call.window is not None) and not (call.ordered and call.length == call.kv_length):
        return "it assumes that queries and keys stand at 0, 1, 2 ... of one row, and here they do not"
    return None


def describe(
    query: jax.Array,
    key: jax.Array,
    *,
    sharding: AttentionSharding | None,
    bias: PositionBias | None = None,
    mask: Mask | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> Call:
    """Returns what the arguments of an `AttentionKernel` ask for, under `sharding`."""
    metadata = [] if mask is None else [metadata for metadata in (mask.queries, mask.keys) if metadata is not None]
    names = () if sharding is None else ("length", "kv_length", "head_dim")
    return Call(
        length=query.shape[1],
        kv_length=key.shape[1],
        head_dim=query.shape[3],
        dtype=jnp.dtype(query.dtype).name,
        causal=mask is not None and mask.causal,
        window=None if mask is None else mask.window,
        segments=bool(metadata) and all(metadata.segments is not None for metadata in metadata),
        prefix=bool(metadata) and all(metadata.prefix is not None for metadata in metadata),
        ordered=all(metadata.ordered for metadata in metadata),
        table=bias is not None and getattr(bias, "table", None) is not None,
        slopes=bias is not None and getattr(bias, "slopes", None) is not None,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
        dropout=rng is not None and dropout_rate > 0.0,
        by_blocks=by_blocks(bias, mask),
        sharded=tuple(name for name in names if getattr(sharding, name)),
        apart=sharding is not None and sharding.kv_length not in ((), sharding.length),
    )


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """An `AttentionKernel` for TPUs: jax's splash attention, written in Pallas, which skips blocks that its mask hides.

    It supports causal and full masks, windows, packed segments, soft caps, sinks and fewer key heads than query heads,
    at lengths that are multiples of 128; rows and heads may be sharded. It has no biases, prefixes or dropout.

    Attributes:
      block: most queries and keys of one block.
      interpret: run it in Pallas's interpreter, on any platform and slowly: for tests.
    """

    block: int = 512
    interpret: bool = False

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`; padding attends to padding.

        Raises:
          ValueError: a call that it does not support; see `splash_refuses`; or a block that a core has no room for.
        """
        return _fused("SplashAttention", splash_refuses, self._attend, query, key, value, options)

    def _attend(self, terms: Terms) -> "Splash":
        return Splash(terms, self.block, self.interpret)


@dataclasses.dataclass(frozen=True)
class CudnnAttention:
    """An `AttentionKernel` for NVIDIA GPUs: cuDNN's flash attention, by `jax.nn.dot_product_attention`.

    It supports causal and full attention, windows in causal attention, and fewer key heads than query heads, in
    bfloat16 or float16, with a head_dim that is a multiple of 8 up to 128; rows and heads may be sharded. As jax
    exposes it, it has no packed segments, and no biases, prefixes, soft caps, sinks or dropout like ours.
    """

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`.

        Raises:
          ValueError: a call that it does not support; see `cudnn_refuses`.
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
        if q * kv > MOST_SPLASH_SCORES:  # XLA:TPU compiles for many minutes before it refuses
            raise ValueError(
                f"SplashAttention: a block of {q} x {kv} scores takes {q * kv >> 18} MiB, and a core has room for "
                f"{MOST_SPLASH_SCORES >> 18}: its `block` ({self.block}) must be smaller, such as 1024"
            )
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(q, kv, kv, q, kv, kv, q, kv),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=self.terms.soft_cap,
            interpret=self.interpret,
        )
        rows = [None if side.metadata is None else side.metadata.segments for side in (queries, keys)]
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
    """A `ShardKernel` made of a hashable function of local arrays, which jax differentiates."""

    attend: Attend

    def forward(self, queries: Queries, keys: Keys, by_head: ByHead) -> tuple[jax.Array, Any]:
        """Returns the output and its VJP function."""

        def of(query: jax.Array, key: jax.Array, value: jax.Array, sinks: jax.Array | None) -> jax.Array:
            mine = queries._replace(query=query), keys._replace(key=key, value=value), by_head._replace(sinks=sinks)
            return self.attend(*mine)

        return jax.vjp(of, queries.query, keys.key, keys.value, by_head.sinks)

    def backward(self, saved: Any, gradient: jax.Array) -> tuple[Queries, Keys, ByHead]:
        """Applies the VJP function."""
        query, key, value, sinks = saved(gradient)
        return Queries(query), Keys(key, value), ByHead(sinks=sinks)


@dataclasses.dataclass(frozen=True)
class AutoAttention:
    """An `AttentionKernel` that hands each call to another one (`choose`) and logs which and why, once for each kind of
    call: splash on TPUs and cuDNN on CUDA where these support the call, else the reference for few scores and chunked
    attention for many. Shapes and options decide, never values, so a compiled step always uses the same kernels.

    Attributes:
      chunked, splash, cudnn: the kernels to choose from, with their block sizes.
    """

    chunked: AttentionKernel = ChunkedAttention()
    splash: AttentionKernel = SplashAttention()
    cudnn: AttentionKernel = CudnnAttention()

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **options: Unpack[Options]) -> jax.Array:
        """See `dot_product_attention`."""
        sharding = attention_sharding(query, key)
        choice = _chosen(_platform(sharding), describe(query, key, **options, sharding=sharding))
        kernels: dict[str, AttentionKernel] = {
            "reference": dot_product_attention,
            "chunked": self.chunked,
            "splash": self.splash,
            "cudnn": self.cudnn,
        }
        return kernels[choice.name](query, key, value, **options)


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
    sharding = attention_sharding(query, key)
    refusal = refuses(describe(query, key, **options, sharding=sharding))
    if refusal is not None:
        raise ValueError(f"{name}: {refusal}; chunked.ChunkedAttention as attention.Attention.kernel supports this")
    given: Operands = operands(name, query, key, value, **options, blocks=(1, 1))
    if sharding is None or sharding.mesh.size == 1:
        return attend(given.terms)(given.queries, given.keys, given.by_head)
    return on_shards(Differentiated(attend(given.terms)), given, sharding, by_head=sharding.heads)


def _block(length: int, most: int) -> int:
    """Returns the largest block up to `most` that divides a length, both multiples of `LANES`."""
    fitting = (size for size in range(LANES, max(most, LANES) + 1, LANES) if length % size == 0)
    return max(fitting)


@functools.cache
def _chosen(platform: str, call: Call) -> Choice:
    """Chooses and logs the choice, once for each kind of call: choices are cached."""
    choice = choose(platform, call)
    shape = f"{call.length} x {call.kv_length}, head_dim {call.head_dim}, {call.dtype}"
    logger.info("attention on %s (%s): %s, since %s", platform, shape, choice.name, choice.reason)
    return choice


def _platform(sharding: AttentionSharding | None) -> str:
    """Returns the platform that a call will run on: that of the mesh, whose devices may be described only, else of
    jax's first device."""
    device = jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
