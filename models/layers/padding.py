"""Which tokens are padding, for layers in which tokens compete: a block says it, a layer asks.

Most layers treat padding as any token, since nobody reads what becomes of it. In a mixture of experts it would take
other tokens' room and be counted, so a block tells its feed-forward layer, without every such layer taking an argument.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from meshway.models.layers.masks import Mask

_real: ContextVar[jax.Array | None] = ContextVar("meshway_real_tokens", default=None)


@contextlib.contextmanager
def known_from(mask: Mask | None) -> Iterator[None]:
    """Makes the padding that `mask` knows of (segment 0 of its queries) known inside the `with` block.

    Open it around one call, within one trace. A mask without segments (a decoding step) knows of none.
    """
    queries = None if mask is None else mask.queries
    segments = None if queries is None else queries.segments
    token = _real.set(None if segments is None else segments != 0)
    try:
        yield
    finally:
        _real.reset(token)


def real_tokens(x: jax.Array) -> jax.Array:
    """Returns float32 [batch, length]: 1 on tokens of x [batch, length, d_model], 0 on padding; all 1 where unknown."""
    real = _real.get()
    if real is None:
        return jnp.ones(x.shape[:2], jnp.float32)
    return jnp.broadcast_to(real, x.shape[:2]).astype(jnp.float32)
