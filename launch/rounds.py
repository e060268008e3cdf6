"""Rounds of a bench: several passes take turns, so that what else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax

from meshway.framework.errors import UserError

Key = TypeVar("Key", bound=Hashable)


def require_at_least(least: int, where: str, **numbers: float | None) -> None:
    """Checks what a recipe says of a bench, say `require_at_least(1, "bench.moe", steps=steps, rounds=rounds)`.

    Raises:
      UserError: a number is less than that; None, what was left open, is not.
    """
    for name, value in numbers.items():
        if value is not None and value < least:
            raise UserError(f"{where}.{name} must be at least {least}, not {value}")


def time_in_turn(passes: Mapping[Key, Callable[[], object]], steps: int, rounds: int) -> dict[Key, float]:
    """Runs each pass once untimed, then times all of them in turn.

    Args:
      passes: what runs a pass and returns its arrays, which are waited for.
      steps: passes of a turn, whose median counts.
      rounds: turns of each.

    Returns:
      seconds of a pass, the median of its turns, by the keys and in the order of `passes`.
    """
    for once in passes.values():
        jax.block_until_ready(once())
    turns: dict[Key, list[float]] = {key: [] for key in passes}
    for _ in range(rounds):
        for key, once in passes.items():
            turns[key].append(statistics.median(_seconds(once) for _ in range(steps)))
    return {key: statistics.median(seconds) for key, seconds in turns.items()}


def _seconds(once: Callable[[], object]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(once())
    return time.perf_counter() - begin
