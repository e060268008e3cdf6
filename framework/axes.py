"""Logical axis names, and `constrain`, which says in a model how an activation lies on the mesh.

A model names the axes of its arrays; a layout file (`gin/layouts/`) maps names to mesh axes. This file is
the vocabulary both sides share, so it imports only jax. It is no closed list: a user's model may use a new
name, if the layout maps it.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax
from jax.sharding import NamedSharding

# Axis name -> what lies along it. A layout may map any of these to None although a model lacks them.
VOCABULARY = {
    "batch": "examples of a batch",
    "length": "positions of a sequence (queries, in attention)",
    "kv_length": "positions of the keys and values that attention reads",
    "embed": "the residual stream, d_model wide",
    "mlp": "hidden units of a feed-forward layer",
    "heads": "query heads of attention",
    "kv_heads": "key and value heads of attention (fewer than heads in GQA and MQA)",
    "head_dim": "features of one attention head",
    "vocab": "entries of a vocabulary",
    "relpos_buckets": "buckets of T5's relative position bias",
    "layers": "layers stacked into one array",
    "expert": "experts of a mixture",
    "stage": "stages of a pipeline",
}

Names = tuple[str | None, ...]
# Maps (axis names, shape) to the sharding the ambient layout gives that activation; raises on unknown names.
Resolver = Callable[[Names, tuple[int, ...]], NamedSharding]

_resolver: ContextVar[Resolver | None] = ContextVar("meshway_activation_resolver", default=None)


@contextlib.contextmanager
def resolving(resolver: Resolver) -> Iterator[None]:
    """Makes `resolver` the ambient layout that `constrain` asks, for the length of a `with` block."""
    token = _resolver.set(resolver)
    try:
        yield
    finally:
        _resolver.reset(token)


def constrain(x: jax.Array, names: Names) -> jax.Array:
    """Constrains an activation's sharding by its logical axis names.

    Args:
      x: an array of rank ``len(names)``.
      names: one logical name a dimension; None leaves that dimension to no mesh axis.

    Returns:
      x, constrained under the ambient layout; x itself outside any mesh (a plain, unpartitioned call).

    Raises:
      ValueError: the rank differs from the number of names, or a mesh is set without a layout. (flax's own
        helper is silent in such cases; a lost constraint shows up as memory, never as an error.)
    """
    if x.ndim != len(names):
        raise ValueError(f"constrain: an array of shape {x.shape} was given {len(names)} axis names {names}")
    resolver = _resolver.get()
    if resolver is None:
        if jax.sharding.get_abstract_mesh().empty:
            return x
        raise ValueError(f"constrain{names}: a mesh is set but no layout is; run inside Partitioner.activate()")
    sharding = resolver(names, x.shape)
    if sharding.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, sharding)
