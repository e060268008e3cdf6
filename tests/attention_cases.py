"""Attention in small: one problem, computed by any kernel on any mesh, with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.models.layers.attention import dot_product_attention
from meshway.models.layers.masks import local_window, make_attention_mask, row_metadata, row_positions
from meshway.models.layers.positions import PositionBias, relative_position_bucket, with_alibi

BATCH, HEAD_DIM, BUCKETS = 4, 4, 8
RULES = {
    "batch": "data",
    "length": "sequence",
    "kv_length": "sequence",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
}
BUCKET = functools.partial(relative_position_bucket, bidirectional=True, num_buckets=BUCKETS, max_distance=16)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and what hides keys; `kv_length` None is self-attention."""

    length: int = 24
    kv_length: int | None = None
    heads: int = 4
    kv_heads: int = 2
    causal: bool = False
    segments: bool = False
    prefix: bool = False
    bias: bool = False
    alibi: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dropout_rate: float = 0.0


def partitioner(sizes, **rules):
    """Returns a mesh of `sizes` (data, sequence, model) and the rules of attention over it."""
    ici = dict(zip(("data", "sequence", "model"), sizes, strict=True))
    return Partitioner(Layout(MeshShape(ici), [], list((RULES | rules).items())))


@functools.cache
def arrays(case):
    """Returns (query, key, value, table, sinks), segments of queries and keys, and a weight for each output."""
    random = np.random.default_rng(0)
    kv_length = case.kv_length or case.length

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def segments(length):  # 2.. 1.. 0..: packed, then padded
        return jnp.asarray(-np.sort(-random.integers(0, 3, (BATCH, length)), axis=1), jnp.int32)

    query, out = (normal(BATCH, case.length, case.heads, HEAD_DIM) for _ in range(2))
    key, value = (normal(BATCH, kv_length, case.kv_heads, HEAD_DIM) for _ in range(2))
    queries = segments(case.length)
    keys = segments(kv_length) if case.kv_length else queries
    return (query, key, value, normal(case.heads, BUCKETS), normal(case.heads)), (queries, keys), out


def attend(kernel, case, query, key, value, table, sinks):
    """Calls a kernel with the case's mask, biases and the rest; returns (output, which queries see a key)."""
    _, segments, _ = arrays(case)
    mask = bias = None
    if case.causal or case.segments:
        metadata = [
            row_metadata(s.shape[1], s if case.segments else None, (s == 2) * 1 if case.prefix else None)
            for s in segments
        ]
        mask = make_attention_mask(*metadata, causal=case.causal)
    places = [row_positions(s.shape[1]) for s in segments]
    if case.window:
        mask = local_window(mask, case.window, *[row_metadata(s.shape[1]) for s in segments])
    if case.bias:
        dense = jnp.moveaxis(table[:, BUCKET(places[1][:, None, :] - places[0][:, :, None])], 0, 1)
        bias = PositionBias(dense, table, *places, BUCKET)
    if case.alibi:
        bias = with_alibi(bias, case.heads, *places)
    out = kernel(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        soft_cap=case.soft_cap,
        sinks=sinks if case.sinks else None,
        dropout_rate=case.dropout_rate,
        rng=jax.random.key(1) if case.dropout_rate else None,
    )
    sees = True if mask is None else mask.dense.any(axis=(1, 3))[:, :, None, None]
    return out, sees


def results(kernel, case, on=None, around=lambda function: function):
    """Returns (output, gradients of query, key, value, table and sinks), 0 for queries that see nothing.

    `on` is a partitioner; `around` wraps the function of these five that gets differentiated.
    """
    operands, _, weight = arrays(case)

    def weighted(*operands):
        out, sees = attend(kernel, case, *operands)
        out = jnp.where(sees, out, 0)
        return jnp.sum(out * weight), out

    function = jax.jit(jax.value_and_grad(around(weighted), argnums=tuple(range(5)), has_aux=True))
    if on is None:
        (_, out), gradients = function(*operands)
    else:
        with on.activate():
            (_, out), gradients = function(*operands)
    return jax.device_get((out, *gradients))


@functools.cache
def expected(case):
    """Returns the results of the reference on one device."""
    return results(dot_product_attention, case)


def assert_equals_reference(kernel, case, on=None, **how):
    names = ("out", "query", "key", "value", "table", "sinks")
    for name, found, wanted in zip(names, results(kernel, case, on, **how), expected(case), strict=True):
        most = 1e-5 if name == "out" else 2e-5
        scale = max(np.abs(wanted).max(), 0.2)  # with a window of 1 the gradients of queries are 0
        np.testing.assert_allclose(found, wanted, rtol=most, atol=most * scale, err_msg=name)


def in_remat(function):
    return jax.checkpoint(function, policy=jax.checkpoint_policies.nothing_saveable)


def in_scan(function):
    def scanned(*operands):
        def body(carry, _):
            total, out = function(*operands)
            return (carry[0] + total, out), None

        (total, out), _ = jax.lax.scan(body, (0.0, jnp.zeros_like(operands[0])), None, length=2)
        return total / 2, out

    return scanned


def in_vmap(function):
    """Two problems, one on each part of `data`, as a pipeline holds its stages; the second is the first's negative."""

    def mapped(query, key, value, *by_head):
        stages = [jnp.stack([x, y]) for x, y in ((query, query), (key, key), (value, -value))]
        totals, outs = jax.vmap(function, (0, 0, 0, None, None), spmd_axis_name="data")(*stages, *by_head)
        return (totals[0] - totals[1]) / 2, outs[0]

    return mapped


TRANSFORMATIONS = (in_remat, in_scan, in_vmap)
