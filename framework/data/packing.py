"""Packing: several examples in one row, told apart by segment ids. Numpy only, pure and deterministic."""

from collections.abc import Mapping, Sequence

import numpy as np

Example = Mapping[str, np.ndarray]
Arrays = dict[str, np.ndarray]


def pack(examples: Sequence[Example], lengths: Mapping[str, int], window: int = 256, pad_id: int = 0) -> Arrays:
    """Packs examples into rows, first fit over a bounded window of open rows.

    An example goes into the oldest open row that has room for all its features; when none has, a new row is
    opened, and once `window` rows are open the oldest is closed. Rows come out in the order they were opened,
    so no example moves further than a window. Lengths are explicit: a token that equals `pad_id` is data.

    Args:
      examples: feature name -> integer tokens [n], n <= lengths[name]. All features of an example share a
        row.
      lengths: row length in tokens of each feature to pack; other features of the examples are not read.
      window: how many rows may be open at once; more gives denser rows, fewer gives more local order.
      pad_id: fills what no example covers.

    Returns:
      For each feature F: F [rows, length], F_segment_ids (1, 2, ... along each row, 0 on padding) and
      F_positions (0, 1, ... within each segment, 0 on padding), all int32.

    Raises:
      ValueError: an example is longer than its row, or `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"pack: window must be at least 1, not {window}")
    sizes = _sizes(examples, lengths)
    rows, segments, offsets = _first_fit(sizes, np.array(list(lengths.values()), np.int64), window)
    return _lay_out(examples, lengths, sizes, rows, segments, offsets, pad_id)


def pad(examples: Sequence[Example], lengths: Mapping[str, int], pad_id: int = 0) -> Arrays:
    """Lays each example in a row of its own, as segment 1; arguments, result and errors as in `pack`."""
    sizes = _sizes(examples, lengths)
    count = len(examples)
    segments = np.ones(count, np.int32)
    return _lay_out(examples, lengths, sizes, np.arange(count), segments, np.zeros_like(sizes), pad_id)


def _sizes(examples: Sequence[Example], lengths: Mapping[str, int]) -> np.ndarray:
    """Returns the number of tokens [examples, features]; raises ValueError when one does not fit its row."""
    sizes = np.array([[len(example[name]) for name in lengths] for example in examples], np.int64)
    sizes = sizes.reshape(len(examples), len(lengths))
    too_long = sizes > np.array(list(lengths.values()), np.int64)
    if too_long.any():
        index, feature = np.argwhere(too_long)[0]
        name = list(lengths)[feature]
        raise ValueError(
            f"example {index} has {sizes[index, feature]} tokens of {name!r}, more than the row length "
            f"{lengths[name]}; trim it first"
        )
    return sizes


def _first_fit(sizes: np.ndarray, capacity: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (row [n], segment id [n], offset [n, features]) of each example with `sizes` [n, features]."""
    count = len(sizes)
    rows = np.zeros(count, np.int64)
    segments = np.zeros(count, np.int32)
    offsets = np.zeros_like(sizes)
    # What is free in the open rows, oldest first: one slice [0:opened] of a buffer that slides as rows close.
    free = np.tile(capacity, (2 * window, 1))
    used_segments = np.zeros(2 * window, np.int32)
    first = opened = closed = 0  # the open rows are free[first:first + opened]; `closed` rows lie before them
    for index in range(count):
        fits = (free[first : first + opened] >= sizes[index]).all(axis=1)
        slot = int(fits.argmax()) if opened else 0
        if not opened or not fits[slot]:
            if opened == window:
                first, opened, closed = first + 1, opened - 1, closed + 1
            if first + opened == len(free):
                free[:opened] = free[first : first + opened]
                used_segments[:opened] = used_segments[first : first + opened]
                first = 0
            slot = opened
            free[first + slot] = capacity
            used_segments[first + slot] = 0
            opened += 1
        at = first + slot
        rows[index] = closed + slot
        offsets[index] = capacity - free[at]
        used_segments[at] += 1
        segments[index] = used_segments[at]
        free[at] -= sizes[index]
    return rows, segments, offsets


def _lay_out(
    examples: Sequence[Example],
    lengths: Mapping[str, int],
    sizes: np.ndarray,
    rows: np.ndarray,
    segments: np.ndarray,
    offsets: np.ndarray,
    pad_id: int,
) -> Arrays:
    """Writes every feature of every example to its place, one scatter a feature."""
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    result: Arrays = {}
    for column, (name, length) in enumerate(lengths.items()):
        size = sizes[:, column]
        tokens = np.concatenate([np.asarray(example[name]) for example in examples] or [np.zeros(0, np.int32)])
        starts = np.cumsum(size) - size
        position = np.arange(len(tokens)) - np.repeat(starts, size)
        flat = np.repeat(rows * length + offsets[:, column], size) + position
        for suffix, values, fill in (
            ("", tokens, pad_id),
            ("_segment_ids", np.repeat(segments, size), 0),
            ("_positions", position, 0),
        ):
            array = np.full(num_rows * length, fill, np.int32)
            array[flat] = values
            result[name + suffix] = array.reshape(num_rows, length)
    return result
