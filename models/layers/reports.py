"""What layers say beside their output: auxiliary losses and statistics, collected without passing through every call.

A layer says `add_loss` or `add_metric`; whoever called it `collecting()` gets them. A collector must be opened and
closed within one trace: the body of a scan, of a rematerialised function or of a vmap opens its own and returns what
was found, and its caller says it again (`say`). Without a collector nothing is kept.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Reports:
    """By name: auxiliary losses, means over tokens with their coefficients in, and metrics; float32 scalars, or one
    value a layer, [layers], where a stack reports them."""

    losses: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, jax.Array] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Reports, ["losses", "metrics"], [])

_collector: ContextVar[Reports | None] = ContextVar("meshway_reports", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[Reports]:
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


def say(reports: Reports, prefix: str = "") -> None:
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
