"""Side outputs of layers, which need not pass through every call: losses, metrics, intermediates; and the padding mask.

A layer calls `add_loss` or `add_metric`; a caller inside `with capture() as reports` gets them. `capture` must be
entered and left within one trace: the body of a scan, of a rematerialised function or of a vmap opens its own and
returns the reports, and its caller reports them again (`sow`). Outside `capture` they are discarded.

A network calls `sow_intermediate(name, value)`; inside `capture_intermediates(names)` the values of those names are
kept, within one trace too. Others are discarded, and the compiler never sees them.

Most layers treat padding like any token, since its output is never read. In a mixture of experts it would use the
capacity of other tokens and be counted, so a block passes the mask to its feed-forward layer (`with_padding_mask`),
without every such layer taking an argument.
"""

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp

from meshway.models.layers.masks import Mask

# (names to keep, values kept, all names seen)
_intermediates: ContextVar[tuple[frozenset[str], dict[str, jax.Array], list[str]] | None] = ContextVar(
    "meshway_intermediates", default=None
)


@contextlib.contextmanager
def capture_intermediates(names: Collection[str]) -> Iterator[dict[str, jax.Array]]:
    """Yields a dict that `sow_intermediate` fills, for `names`, inside the `with` block.

    Raises:
      ValueError: at its end, a name that was never sown; lists those that were.
    """
    found: dict[str, jax.Array] = {}
    seen: list[str] = []
    token = _intermediates.set((frozenset(names), found, seen))
    try:
        yield found
    finally:
        _intermediates.reset(token)
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"there is no intermediate {missing[0]!r}; there are {', '.join(sorted(seen))}")


def sow_intermediate(name: str, value: jax.Array) -> jax.Array:
    """Reports `value` [batch, length, ...] under a name, and returns it."""
    asked = _intermediates.get()
    if asked is not None:
        names, found, seen = asked
        seen.append(name)
        if name in names:
            found[name] = value
    return value


@dataclasses.dataclass(frozen=True)
class Reports:
    """Reports by name: auxiliary losses, means over tokens times their coefficients, and metrics; float32 scalars, or
    one value for each layer, [layers], where a stack reports them."""

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Reports, ["losses", "metrics"], [])

_collector: ContextVar[Reports | None] = ContextVar("meshway_reports", default=None)


@contextlib.contextmanager
def capture() -> Iterator[Reports]:
    """Yields the losses and metrics that are added inside the `with` block."""
    reports = Reports()
    token = _collector.set(reports)
    try:
        yield reports
    finally:
        _collector.reset(token)


def add_loss(name: str, value: jax.Array) -> None:
    """Adds `value`, a mean over the tokens of the batch times its coefficient, to the training loss."""
    _add("losses", name, value)


def add_metric(name: str, value: jax.Array) -> None:
    """Reports a statistic of the batch."""
    _add("metrics", name, value)


def sow(reports: Reports, prefix: str = "") -> None:
    """Adds the losses and metrics of an inner `capture`, each name after `prefix`."""
    for name, value in reports.losses.items():
        add_loss(prefix + name, value)
    for name, value in reports.metrics.items():
        add_metric(prefix + name, value)


def as_loss(reports: Reports, weight: jax.Array) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Returns what an objective adds to its own: the summed loss, and metrics as (sum, weight).

    Args:
      reports: those of a network; an array [layers] has a value for each layer.
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
        raise ValueError(f"a layer reports {name!r} twice; wrap its parts in capture() and sow() each with a prefix")
    names[name] = jnp.asarray(value, jnp.float32)


_real: ContextVar[jax.Array | None] = ContextVar("meshway_real_tokens", default=None)


@contextlib.contextmanager
def with_padding_mask(mask: Mask | None) -> Iterator[None]:
    """Sets `padding_mask` inside the `with` block from the segments of the mask's queries, 0 being padding.

    Open it around one call, within one trace. A mask without segments (a decoding step) has no padding.
    """
    queries = None if mask is None else mask.queries
    segments = None if queries is None else queries.segments
    token = _real.set(None if segments is None else segments != 0)
    try:
        yield
    finally:
        _real.reset(token)


def padding_mask(x: jax.Array) -> jax.Array:
    """Returns float32 [batch, length] for x [batch, length, d_model]: 1 on tokens, 0 on padding; all 1 if unknown."""
    real = _real.get()
    if real is None:
        return jnp.ones(x.shape[:2], jnp.float32)
    return jnp.broadcast_to(real, x.shape[:2]).astype(jnp.float32)
