"""Keeping devices at work while the host reads and writes."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def one_ahead(started: Iterable[T]) -> Iterator[T]:
    """Yields what has been started once the next is started too: devices work while the host reads and writes."""
    waiting: list[T] = []
    for each in started:
        waiting.append(each)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
