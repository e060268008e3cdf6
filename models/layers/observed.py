"""Intermediate values by name: what a network computes on the way, for whoever asks.

A network says `observe(name, value)`; inside `observing(names)` what was asked for is kept. Otherwise nothing is, and
the compiler never sees it. As with `reports`, both must happen within one trace.
"""

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar

import jax

_asked: ContextVar[tuple[frozenset[str], dict[str, jax.Array], list[str]] | None] = ContextVar("observed", default=None)


@contextlib.contextmanager
def observing(names: Collection[str]) -> Iterator[dict[str, jax.Array]]:
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


def observe(name: str, value: jax.Array) -> jax.Array:
    """Shows `value` [batch, length, ...] by a name, and returns it."""
    asked = _asked.get()
    if asked is not None:
        names, found, said = asked
        said.append(name)
        if name in names:
            found[name] = value
    return value
