"""Attention in small: one problem, computed by any kernel on any mesh, with its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from meshway.framework.partitioning.mesh import MeshShape
from meshway.framework.partitioning.partitioner import Layout, Partitioner
from meshway.models.layers.attention import dot_product_attention
from meshway.models.layers.masks import Sight, row_positions, visible
from meshway.models.layers.positions import PositionBias, relative_position_bucket

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
    dropout_rate: float = 0.0


def partitioner(sizes, **rules):
    """Returns a mesh of `sizes` (data, sequence, model) and the rules of attention over it."""
    ici = dict(zip(("data", "sequence", "model"), sizes, strict=True))
    return Partitioner(Layout(MeshShape(ici), [], list((RULES | rules).items())))


@functools.cache
def arrays(case):
    """Returns (query, key, value, table), segments of queries and keys, and a weight for each output."""
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
    return (query, key, value, normal(case.heads, BUCKETS)), (queries, keys), out


def attend(kernel, case, query, key, value, table):
    """Calls a kernel with the case's mask, bias and dropout; returns (output, which queries see a key)."""
    _, segments, _ = arrays(case)
    mask = bias = None
    if case.causal or case.segments:
        sights = [
            Sight(s if case.segments else None, row_positions(s.shape[1]), (s == 2) * 1 if case.prefix else None)
            for s in segments
        ]
        mask = visible(*sights, causal=case.causal)
    if case.bias:
        places = [row_positions(s.shape[1]) for s in segments]
        dense = jnp.moveaxis(table[:, BUCKET(places[1][:, None, :] - places[0][:, :, None])], 0, 1)
        bias = PositionBias(dense, table, *places, BUCKET)
    rng = jax.random.key(1) if case.dropout_rate else None
    out = kernel(query, key, value, bias=bias, mask=mask, dropout_rate=case.dropout_rate, rng=rng)
    sees = True if mask is None else mask.dense.any(axis=(1, 3))[:, :, None, None]
    return out, sees


def results(kernel, case, on=None, around=lambda function: function):
    """Returns (output, gradients of query, key, value and table), 0 for queries that see nothing.

    `on` is a partitioner; `around` wraps the function of (query, key, value, table) that gets differentiated.
    """
    operands, _, weight = arrays(case)

    def weighted(*operands):
        out, sees = attend(kernel, case, *operands)
        out = jnp.where(sees, out, 0)
        return jnp.sum(out * weight), out

    function = jax.jit(jax.value_and_grad(around(weighted), argnums=(0, 1, 2, 3), has_aux=True))
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
    for name, found, wanted in zip(
        ("out", "query", "key", "value", "table"), results(kernel, case, on, **how), expected(case), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max(), err_msg=name)
