"""Which kernel computes a call of attention: what each can do, and who is chosen, as plain functions of plain data."""

import dataclasses

import jax
import jax.numpy as jnp

from meshway.models.layers.kernels.attention_shards import Cut, by_blocks
from meshway.models.layers.masks import Mask
from meshway.models.layers.positions import PositionBias

# Scores of one head and row up to which the reference is as quick, and its memory no matter. Measured on CPU (by
# `meshway bench attention`); elsewhere a guess, since chunks are many small kernels there.
REFERENCE_SCORES = {"cpu": 512 * 512, "cuda": 1024 * 1024, "rocm": 1024 * 1024, "tpu": 1024 * 1024}
LANES = 128  # splash works on multiples of so many queries and keys
CUDNN_HEAD_DIM = 128


@dataclasses.dataclass(frozen=True)
class Call:
    """What one call of attention asks for.

    Attributes:
      length, kv_length, head_dim: of queries and keys.
      dtype: of queries.
      causal, window, segments, prefix: what the mask hides; `segments` packs or pads.
      ordered: whether tokens stand in the row as they are numbered, queries and keys alike.
      table, slopes: which biases there are on scores.
      soft_cap, sinks, dropout: whether there are any.
      by_blocks: whether mask and bias are known for any block, not only in full.
      cut: which of "length", "kv_length" and "head_dim" the mesh cuts.
      apart: whether it cuts keys' length, and by other axes than queries'.
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
    cut: tuple[str, ...] = ()
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel's name ("reference", "chunked", "cudnn" or "splash"), and why it is this one."""

    name: str
    reason: str


def choose(platform: str, call: Call) -> Choice:
    """Returns who computes a call on a platform ("cpu", "cuda", "rocm", "tpu").

    The fastest that can: splash on TPUs, cuDNN on CUDA; where these cannot, or there is none, the reference for few
    scores and chunked attention for many, which both know everything.
    """
    if not call.by_blocks:
        return Choice("reference", "the mask or the bias is known in full only")
    if "head_dim" in call.cut:
        return Choice("reference", "the layout cuts head_dim")
    why = ""
    for fused, at_home, refuses in (("splash", "tpu", splash_refuses), ("cudnn", "cuda", cudnn_refuses)):
        if platform == at_home:
            refusal = refuses(call)
            if refusal is None:
                return Choice(fused, f"the quickest on {platform} for what is asked")
            why = f"; no {fused}: {refusal}"
    pairs = call.length * call.kv_length
    if pairs <= REFERENCE_SCORES.get(platform, 512 * 512):
        return Choice("reference", f"{call.length} x {call.kv_length} scores are few{why}")
    if call.apart:
        return Choice("reference", f"the layout cuts the keys' length by other axes than the queries'{why}")
    return Choice("chunked", f"{call.length} x {call.kv_length} scores are many{why}")


def splash_refuses(call: Call) -> str | None:
    """Returns what splash attention cannot do of a call, None if it can do all: it knows masks that follow from places
    and segments, soft caps, sinks and key heads fewer than query heads, but no bias, no dropout and no odd lengths."""
    refusal = _unfused(call)
    if refusal is None and (call.length % LANES or call.kv_length % LANES):
        refusal = f"its lengths are multiples of {LANES}, not {call.length} and {call.kv_length}"
    return refusal


def cudnn_refuses(call: Call) -> str | None:
    """Returns what cuDNN's attention cannot do of a call, None if it can do all: it knows causal masks and windows in
    them, 16-bit numbers only, and of jax's door to it no segments, soft caps or sinks."""
    if call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 or float16, not {call.dtype}"
    for name, asked in (("segments", call.segments), ("soft caps", call.soft_cap), ("sinks", call.sinks)):
        if asked:
            return f"it knows no {name}"
    if call.head_dim % 8 or call.head_dim > CUDNN_HEAD_DIM:
        return f"head_dim is a multiple of 8 up to {CUDNN_HEAD_DIM}, not {call.head_dim}"
    if call.window is not None and not call.causal:
        return "its windows are causal"
    return _unfused(call)


def _unfused(call: Call) -> str | None:
    """Returns what neither of the fused kernels can do of a call."""
    for name, asked in (("biases", call.table or call.slopes), ("dropout", call.dropout), ("prefixes", call.prefix)):
        if asked:
            return f"it knows no {name}"
    if not call.by_blocks:
        return "the mask is known in full only"
    if call.cut:
        return f"the layout cuts {' and '.join(call.cut)}"
    if (call.causal or call.window is not None) and not (call.ordered and call.length == call.kv_length):
        return "it numbers the tokens of queries and keys itself, and here they stand elsewhere in the row"
    return None


def describe(
    query: jax.Array,
    key: jax.Array,
    *,
    cut: Cut | None,
    bias: PositionBias | None = None,
    mask: Mask | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    dropout_rate: float = 0.0,
    rng: jax.Array | None = None,
) -> Call:
    """Returns what the arguments of a `Kernel` ask for, under `cut`."""
    sights = [] if mask is None else [sight for sight in (mask.queries, mask.keys) if sight is not None]
    dims = {} if cut is None else {"length": cut.length, "kv_length": cut.kv_length, "head_dim": cut.head_dim}
    return Call(
        length=query.shape[1],
        kv_length=key.shape[1],
        head_dim=query.shape[3],
        dtype=jnp.dtype(query.dtype).name,
        causal=mask is not None and mask.causal,
        window=None if mask is None else mask.window,
        segments=bool(sights) and all(sight.segments is not None for sight in sights),
        prefix=bool(sights) and all(sight.prefix is not None for sight in sights),
        ordered=all(sight.ordered for sight in sights),
        table=bias is not None and getattr(bias, "table", None) is not None,
        slopes=bias is not None and getattr(bias, "slopes", None) is not None,
        soft_cap=soft_cap is not None,
        sinks=sinks is not None,
        dropout=rng is not None and dropout_rate > 0.0,
        by_blocks=by_blocks(bias, mask),
        cut=tuple(name for name, axes in dims.items() if cut is not None and cut.parts(axes) > 1),
        apart=cut is not None and cut.kv_length not in ((), cut.length),
    )
