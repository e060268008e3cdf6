"""Choosing the spans that denoising objectives drop from a text, and the inputs and targets that result.

Numpy only; all randomness comes from one seed.

Span corruption after Raffel et al. 2020, section 3.1.4: `inputs` is a text with each dropped span replaced by
a sentinel, `targets` is each sentinel followed by its span. A text begins with a kept token and ends with a
dropped one, so that a single span is the text's end: a prefix language model (Tay et al. 2022, section 3.1.1).
"""

import numpy as np

from meshway.framework.data.rows.mixing import hash64


def noise_counts(
    length: np.ndarray, noise_density: float, mean_span_length: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (tokens dropped, spans they form) for texts of `length` [n] tokens, int64 [n] each.

    A text of two tokens or more has at least one dropped token, one span, and one kept token for every span.

    Args:
      length: tokens, at least 1.
      noise_density: share of the tokens that is dropped.
      mean_span_length: tokens of a span on average; None drops one span, the text's end.
    """
    length = np.asarray(length, np.int64)
    noise = np.maximum(1, np.minimum(np.rint(length * noise_density).astype(np.int64), length - 1))
    wanted = np.ones_like(noise) if mean_span_length is None else np.rint(noise / mean_span_length).astype(np.int64)
    return noise, np.maximum(1, np.minimum(np.minimum(wanted, noise), length - noise))


def corruption_window(inputs: int, targets: int, noise_density: float, mean_span_length: float | None) -> int:
    """Returns the longest text whose corrupted form, EOS apart, has at most `inputs` and `targets` tokens; 0 if none.

    Both forms grow with the text, so every shorter text fits too.
    """
    # Each token is in one of the two, and both have one sentinel per span: n + 2 spans <= inputs + targets.
    length = np.arange(1, max(inputs + targets - 1, 1))
    noise, spans = noise_counts(length, noise_density, mean_span_length)
    return int(((length - noise + spans <= inputs) & (noise + spans <= targets)).sum())


def corrupt(
    tokens: np.ndarray, noise: int, spans: int, sentinels: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Drops `noise` of `tokens` in `spans` spans; every choice with a kept token before each span is equally likely.

    Args:
      tokens: int32 [n], n >= 1.
      noise: from `noise_counts`.
      spans: from `noise_counts`.
      sentinels: the ids that replace the first span, the second, ...: int [>= spans].
      seed: below 2**64.

    Returns:
      (inputs [n - noise + spans], targets [noise + spans]), int32.
    """
    count = len(tokens)
    kept = count - noise
    bits = random_bits(seed, count)
    kept_ends = _run_ends(bits[:kept], spans)
    lost_ends = _run_ends(bits[kept:], spans)
    lost_starts = np.zeros(spans, np.int64)
    lost_starts[1:] = lost_ends[:-1]
    edges = np.zeros(count + 1, np.int8)
    edges[kept_ends + lost_starts] = 1
    edges[kept_ends + lost_ends] = -1
    dropped = edges[:count].cumsum(dtype=np.int8).view(bool)
    number = np.arange(spans)
    sentinels = sentinels[:spans]
    return (
        _with_sentinels(tokens[~dropped], kept_ends + number, sentinels),
        _with_sentinels(tokens[dropped], lost_starts + number, sentinels),
    )


def random_bits(seed: int, count: int) -> np.ndarray:
    """Returns `count` distinct random-looking numbers below 2**64, uint64 [count]; fixed for ever by the seed."""
    return hash64(np.arange(count, dtype=np.uint64) << np.uint64(32) ^ np.uint64(seed))


def lowest(bits: np.ndarray, count: int) -> np.ndarray:
    """Returns the sorted indices of the `count` lowest of distinct `bits` [n], a random choice, int64 [count]."""
    if not count:
        return np.zeros(0, np.int64)
    return (bits <= np.partition(bits, count - 1)[count - 1]).nonzero()[0]


def _run_ends(bits: np.ndarray, runs: int) -> np.ndarray:
    """Divides len(bits) items into `runs` runs of one or more; returns where each ends, int64 [runs]."""
    ends = np.full(runs, len(bits))
    ends[:-1] = lowest(bits[1:], runs - 1) + 1
    return ends


def _with_sentinels(tokens: np.ndarray, indices: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """Returns tokens with `sentinels` [k] inserted, which are at indices `indices` [k] of the result, int32."""
    result = np.empty(len(tokens) + len(sentinels), np.int32)
    is_token = np.ones(len(result), bool)
    is_token[indices] = False
    result[is_token] = tokens
    result[indices] = sentinels
    return result
