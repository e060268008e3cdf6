import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.noise import corrupt, corruption_window, lowest, noise_counts, random_bits

SENTINELS = np.arange(99, 49, -1)
quick = settings(max_examples=50, deadline=None)
DENSITIES = [0.01, 0.15, 0.25, 0.5, 0.9, 0.99]
MEANS = [None, 1.0, 3.0, 8.0, 64.0]


def reassembled(inputs, targets, first_sentinel):
    """Puts every span back where its sentinel stands."""
    is_sentinel = np.isin(targets, first_sentinel - np.arange(first_sentinel // 2))
    spans = np.split(targets, is_sentinel.nonzero()[0])[1:]
    spans = {int(span[0]): span[1:].tolist() for span in spans}
    text = []
    for token in inputs.tolist():
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("mean", MEANS)
def test_counts_are_as_one_would_count(density, mean):
    for length, noise, spans in zip(range(1, 400), *noise_counts(np.arange(1, 400), density, mean), strict=True):
        assert noise == max(1, min(round(length * density), length - 1))
        assert spans == max(1, min(round(noise / (mean or noise)), noise, length - noise))


@quick
@given(st.integers(0, 60), st.integers(0, 60), st.sampled_from(DENSITIES), st.sampled_from(MEANS))
def test_the_window_is_the_longest_that_fits(inputs, targets, density, mean):
    window = corruption_window(inputs, targets, density, mean)
    length = np.arange(1, 200)
    noise, spans = noise_counts(length, density, mean)
    fits = (length - noise + spans <= inputs) & (noise + spans <= targets)
    assert fits[:window].all() and not fits[window:].any()


def test_the_published_window():
    assert corruption_window(512 - 1, 10_000, 0.15, 3.0) == 568
    assert corruption_window(512 - 1, 114 - 1, 0.15, 3.0) == 568  # Raffel et al. 2020: inputs 512, targets 114
    assert corruption_window(512 - 1, 114 - 2, 0.15, 3.0) < 568


@quick
@given(st.integers(1, 300), st.sampled_from(DENSITIES), st.sampled_from(MEANS), st.integers(0, 2**64 - 1))
def test_corrupted_texts_reassemble(length, density, mean, seed):
    noise, spans = (int(column[0]) for column in noise_counts(np.array([length]), density, mean))
    tokens = (np.arange(length, dtype=np.int32) * 7) % 50  # zeros among them
    inputs, targets = corrupt(tokens, noise, spans, 999 - np.arange(400), seed)
    assert (inputs.dtype, targets.dtype) == (np.int32, np.int32)
    assert (len(inputs), len(targets)) == (length - noise + spans, noise + spans)
    assert reassembled(inputs, targets, 999) == tokens.tolist()
    assert inputs[inputs > 500].tolist() == targets[targets > 500].tolist() == list(range(999, 999 - spans, -1))


def test_one_span_is_the_end_of_the_text():
    inputs, targets = corrupt(np.arange(8), 2, 1, SENTINELS, seed=3)
    assert [inputs.tolist(), targets.tolist()] == [[0, 1, 2, 3, 4, 5, 99], [99, 6, 7]]


def test_a_token_alone_is_dropped():
    inputs, targets = corrupt(np.array([0]), 1, 1, SENTINELS, seed=3)
    assert [inputs.tolist(), targets.tolist()] == [[99], [99, 0]]


def test_all_ways_of_dropping_are_equally_likely():
    # 5 kept and 4 dropped tokens in 3 spans: 6 ways to divide the kept, 3 the dropped.
    found = collections.Counter(corrupt(np.arange(9), 4, 3, SENTINELS, seed)[0].tobytes() for seed in range(9000))
    assert len(found) == 18
    chi_squared = sum((count - 500) ** 2 / 500 for count in found.values())
    assert chi_squared < 40.8  # 1 in 1000 of 17 degrees of freedom


def test_random_bits_are_distinct_even_and_of_their_seed():
    bits = random_bits(7, 5000)
    assert len(set(bits.tolist())) == 5000
    np.testing.assert_array_equal(bits, random_bits(7, 5000))
    assert not np.isin(bits, random_bits(8, 5000)).any()
    shares = [float(((bits >> np.uint64(bit)) & np.uint64(1)).mean()) for bit in range(64)]
    assert min(shares) > 0.46 and max(shares) < 0.54


def test_random_bits_are_those_of_whole_numbers():
    """A run that goes on under another numpy must see the same noise."""
    seed, found = 2**64 - 5, []
    for number in range(3):
        mixed = ((seed ^ number << 32) + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        found.append(mixed ^ mixed >> 31)
    assert random_bits(seed, 3).tolist() == found


@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_lowest_are_the_lowest(count):
    bits = random_bits(1, 9)
    assert lowest(bits, count).tolist() == sorted(np.argsort(bits)[:count].tolist())
