"""What layers give beside their output, without passing through every call: losses, metrics, intermediates, padding.

A network says `observe(name, value)`; inside `observing(names)` what was asked for is kept. Otherwise nothing is, and
the compiler never sees it. As with `reports`, both must happen within one trace.

A layer says `add_loss` or `add_metric`; whoever called it `collecting()` gets them. A collector must be opened and
closed within one trace: the body of a scan, of a rematerialised function or of a vmap opens its own and returns what
was found, and its caller says it again (`say`). Without a collector nothing is kept.

Most layers treat padding as any token, since nobody reads what becomes of it. In a mixture of experts it would take
other tokens' room and be counted, so a block tells its feed-forward layer, without every such layer taking an argument.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from meshway.models.layers.masks import Mask

_asked: ContextVar[tuple[frozenset[str], dict[str, jax.Array], list[str]] | None] = ContextVar("observed", default=None)


@contextlib.contextmanager
def capture_intermediates(names: Collection[str]) -> Iterator[dict[str, jax.Array]]:
    """Yields what is observed of `names` inside the `with` block.

    Raises:
      ValueError: at its end, a name that nothing was observed by; says which there are.
    """
    found: dict[str, jax.Array] = {}
    said: list[str] = []
    token = _asked.set((frozenset(names), found, said))
    try:
        yield found
    finally:
        _asked.reset(token)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"there is no intermediate {missing[0]!r}; there are {', '.join(sorted(said))}")


def sow_intermediate(name: str, value: jax.Array) -> jax.Array:
    """Shows `value` [batch, length, ...] by a name, and returns it."""
    asked = _asked.get()
    if asked is not None:
        names, found, said = asked
        said.append(name)
        if name in names:
            found[name] = value
    return value


@dataclasses.dataclass(frozen=True)
class Reports:
    """By name: auxiliary losses, means over tokens with their coefficients in, and metrics; float32 scalars, or one
    value a layer, [layers], where a stack reports them."""

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Reports, ["losses", "metrics"], [])

_collector: ContextVar[Reports | None] = ContextVar("meshway_reports", default=None)


@contextlib.contextmanager
def capture() -> Iterator[Reports]:
    """Yields what is said inside the `with` block."""
    found = Reports()
    token = _collector.set(found)
    try:
        yield found
    finally:
        _collector.reset(token)


def add_loss(name: str, value: jax.Array) -> None:
    """Adds `value`, a mean over the tokens of the batch times its coefficient, to the training loss."""
    _add("losses", name, value)


def add_metric(name: str, value: jax.Array) -> None:
    """Reports a statistic of the batch."""
    _add("metrics", name, value)


def sow(reports: Reports, prefix: str = "") -> None:
    """Says again what an inner collector found, its names after `prefix`."""
    for name, value in reports.losses.items():
        add_loss(prefix + name, value)
    for name, value in reports.metrics.items():
        add_metric(prefix + name, value)


def as_loss(reports: Reports, weight: jax.Array) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns what an objective adds to its own: the summed loss, and metrics as (sum, weight).

    Args:
      reports: what a network said; of an array [layers] each layer counts.
      weight: the objective's summed weight: a mean over tokens times it is a sum, which the step divides again.
    """
    losses = {name: jnp.sum(value) for name, value in reports.losses.items()}
    metrics = {name: (value * weight, weight) for name, value in losses.items()}
    one = jnp.ones((), jnp.float32)
    for name, value in reports.metrics.items():
        layers = {name: value} if value.ndim == 0 else {f"{name}/layer_{i:02d}": v for i, v in enumerate(value)}
        metrics |= {layer: (number, one) for layer, number in layers.items()}
    return sum(losses.values(), jnp.zeros((), jnp.float32)) * weight, metrics


def _add(kind: str, name: str, value: jax.Array) -> None:
    found = _collector.get()
    if found is None:
        return
    names = getattr(found, kind)
    if name in names:
        raise ValueError(f"a layer reports {name!r} twice; wrap its parts in collecting() and say() with a prefix")
    names[name] = jnp.asarray(value, jnp.float32)


_real: ContextVar[jax.Array | None] = ContextVar("meshway_real_tokens", default=None)


@contextlib.contextmanager
def with_padding_mask(mask: Mask | None) -> Iterator[None]:
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


def padding_mask(x: jax.Array) -> jax.Array:
    """Returns float32 [batch, length]: 1 on tokens of x [batch, length, d_model], 0 on padding; all 1 where unknown."""
    real = _real.get()
    if real is None:
        return jnp.ones(x.shape[:2], jnp.float32)
    return jnp.broadcast_to(real, x.shape[:2]).astype(jnp.float32)
