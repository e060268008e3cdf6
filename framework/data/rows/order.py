"""Pseudo-random order and seeds as pure functions of their keys: nothing is stored, anything can be asked for.

Built from 64-bit multiply-xor-shift hashing alone, so that the order of a run depends on no library's version.
"""

import zlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = 8


def key_of(*parts: int | str) -> int:
    """Returns a 64-bit key of numbers and names; other parts or another order of them give another key."""
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

    A Feistel network of 8 rounds on the smallest even number of bits that holds `count`, walked until it lands
    below `count` (Black and Rogaway 2002, section 4): a bijection of any size, in no memory, from any position.
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
