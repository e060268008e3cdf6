"""The order of rows: random passes over a task, and tasks drawn by rate, as pure functions of a position.

Built only from 64-bit multiply-xor-shift hashing, so that the order of a run depends on no library's version.

Each source has an interval of [0, 1) as long as its share. Row d goes to the source whose interval contains the van der
Corput number of d: its digits in base 2, mirrored at the point. Any stretch of rows then holds each source's share to
within a few rows, and how many of the first d rows went to a source has a closed form, so any row is found at once.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from meshway.framework.errors import UserError, did_you_mean

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def key_of(*parts: int | str) -> int:
    """Returns a 64-bit key of numbers and names; it changes with any part and with their order."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        number = zlib.crc32(part.encode()) | 1 << 32 if isinstance(part, str) else int(part) & (2**64 - 1)
        state = hash64(state ^ np.uint64(number))
    return int(state[0])


def hash64(values: np.ndarray) -> np.ndarray:
    """Returns the SplitMix64 output for each of `values`, uint64 [...] (Steele et al. 2014, figure 17)."""
    with np.errstate(over="ignore"):
        mixed = values + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def seeds(key: int, *columns: np.ndarray) -> np.ndarray:
    """Returns a 64-bit seed for each row of integer `columns` [n], uint64 [n], keyed by `key`."""
    state = np.full(len(columns[0]), hash64(np.array([key], np.uint64)))
    for column in columns:
        state = hash64(state ^ np.asarray(column).astype(np.uint64))
    return state


def permute(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """Returns where a random permutation of range(count) sends `positions` [n], int64 [n].

    A Feistel network of 8 rounds on the smallest even number of bits that holds `count`, applied again until the result
    is below `count` (cycle walking; Black and Rogaway 2002, section 4): a bijection of any size, without a table.
    """
    if count <= 1:
        return np.zeros(len(positions), np.int64)
    half = np.uint64(((count - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = hash64(np.uint64(key) ^ (np.arange(_ROUNDS, dtype=np.uint64) << np.uint64(32)))
    values = np.asarray(positions).astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        current = values[walking]
        left, right = current >> half, current & mask
        for round_key in keys:
            left, right = right, left ^ (hash64(right ^ round_key) & mask)
        values[walking] = left << half | right
        walking = walking[values[walking] >= count]
    return values.astype(np.int64)


_BITS = 52  # a period has at most 2 ** _BITS rows, and shares are multiples of 2 ** -_BITS


@dataclasses.dataclass(frozen=True)
class Rates:
    """New mixing rates from a step on.

    Attributes:
      from_step: the first step (batch) drawn at these rates.
      rates: task -> rate, relative to the others; tasks not named keep their rates, and 0 stops a task.
    """

    from_step: int
    rates: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.from_step < 0:
            raise UserError(f"Rates.from_step must be a step, at least 0, not {self.from_step}")
        for name, rate in self.rates.items():
            if not rate >= 0 or rate == float("inf"):
                raise UserError(
                    f"Rates from step {self.from_step}: the rate of task {name!r} must be at least 0, not {rate}"
                )


def periods(names: Sequence[str], rates: Mapping[str, float], changes: Sequence[Rates]) -> list[tuple[int, np.ndarray]]:
    """Returns (first step, rate of each of `names`) of each period, in order, the first from step 0.

    Raises:
      UserError: a change names an unknown task, is not later than the one before, or leaves no rate above 0; or
        there is no rate above 0 before the first change.
    """
    current = dict(rates)
    result = [(0, np.array([current[name] for name in names], np.float64))]
    for change in changes:
        for name in change.rates:
            if name not in current:
                raise UserError(f"Rates from step {change.from_step}: no task {name!r}{did_you_mean(name, names)}")
        current |= change.rates
        values = np.array([current[name] for name in names], np.float64)
        if not values.sum() > 0:
            raise UserError(f"Rates from step {change.from_step} leave no task with a rate above 0")
        if change.from_step == 0:
            result = [(0, values)]
        elif change.from_step <= result[-1][0]:
            raise UserError(f"Rates must come in order of from_step; {change.from_step} follows {result[-1][0]}")
        else:
            result.append((change.from_step, values))
    if not result[0][1].sum() > 0:
        later = f" before step {result[1][0]}: add Rates with from_step 0" if result[1:] else ": one must be above 0"
        raise UserError(f"the mixing rates of {', '.join(map(repr, names))} are all 0{later}")
    return result


class Interleaving:
    """The rows of one period, divided among sources by weight.

    Args:
      weights: weight of each source [sources], at least 0, not all 0.
    """

    def __init__(self, weights: np.ndarray) -> None:
        shares = np.cumsum(np.asarray(weights, np.float64) / np.sum(weights))
        self._bounds = np.round(shares * 2**_BITS).astype(np.int64)
        self._bounds[np.flatnonzero(weights)[-1] :] = 2**_BITS

    def counts(self, rows: int) -> np.ndarray:
        """Returns how many of the period's first `rows` rows each source has, int64 [sources]."""
        return np.diff(_counts_below(rows, self._bounds), prepend=0)

    def sources(self, first: int, count: int) -> np.ndarray:
        """Returns the source of rows first, ..., first + count - 1 of the period, int64 [count]."""
        if len(self._bounds) == 1:
            return np.zeros(count, np.int64)
        mirrored = _mirror(np.arange(first, first + count, dtype=np.int64))
        return np.searchsorted(self._bounds, mirrored, side="right")


def _mirror(rows: np.ndarray) -> np.ndarray:
    """Returns the van der Corput number of each row, times 2 ** _BITS."""
    result = np.zeros_like(rows)
    for _ in range(_BITS):
        result = result << 1 | rows & 1
        rows = rows >> 1
    return result


def _counts_below(rows: int, bounds: np.ndarray) -> np.ndarray:
    """Returns how many of range(rows) have a van der Corput number below each bound / 2 ** _BITS.

    range(rows) falls into one aligned block for each set bit i of `rows`; the numbers of such a block are an
    arithmetic progression of 2 ** i terms with step 2 ** (_BITS - i).
    """
    total = np.zeros_like(bounds)
    base = 0
    for bit in reversed(range(_BITS)):
        if rows >> bit & 1:
            offset = int(f"{base:0{_BITS}b}"[::-1], 2)
            terms = -((offset - bounds) >> (_BITS - bit))  # rounded up
            total += np.clip(terms, 0, 1 << bit)
            base |= 1 << bit
    return total
