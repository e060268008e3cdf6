"""Each pass over a task visits each example once: at any size, on any number of processes, whatever the objective."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_in_memory import task

from meshway.framework.data.denoising import MixtureOfDenoisers, RandomPrefix, SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.rows import online_source
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.online_source import StreamedSource
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 40, "targets": 40}
PAIRS = [EncoderDecoder, LanguageModel, PrefixLanguageModel]
TEXTS = [SpanCorruption, MixtureOfDenoisers, RandomPrefix]


class _Noted:
    """An objective that notes which items of which pass it is asked for."""

    def __init__(self, objective):
        self._objective, self.seen, self.examples = objective, [], []

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def convert(self, example, index, part, epoch, seed):
        self.seen.append((epoch, index, part))
        self.examples.append(example)
        return self._objective.convert(example, index, part, epoch, seed)


def passes_of(make, count, longest, pack, batch_size, num_processes, seed, passes):
    """Reads whole batches until `passes` passes are over; returns (items seen by all processes, those of a pass)."""
    random = np.random.default_rng(seed)
    converter = make(pack)
    names = converter.task_features if make in PAIRS else ("targets",)
    examples = InMemory(
        [
            {name: random.integers(3, 200, random.integers(1, longest + 1)).astype(np.int32) for name in names}
            for _ in range(count)
        ]
    )
    lengths = {name: LENGTHS[name] for name in converter.task_features}
    noted = _Noted(converter.bind(task(*names), lengths))
    share = batch_size // num_processes
    sources = [RowSource("a_task", examples, noted, pack, seed=seed) for _ in range(num_processes)]
    spec = converter.spec(lengths, batch_size)
    streams = [
        RowStream("a_task", [source], {"a_task": 1.0}, (), spec, batch_size, slice(at * share, (at + 1) * share), seed)
        for at, source in enumerate(sources)
    ]
    rows = sum(sources[0].rows_in_round(number) for number in range(passes))
    for _ in range(-(-rows // batch_size)):
        for stream in streams:
            next(stream)
    parts = noted.parts(examples.sizes)
    return noted.seen, [(index, part) for index in range(count) for part in range(int(parts[index]))]


@pytest.mark.parametrize("make", PAIRS + TEXTS)
@settings(deadline=None, max_examples=8)
@given(
    count=st.integers(1, 150),
    longest=st.sampled_from([3, 25, 40]),
    pack=st.booleans(),
    share=st.integers(1, 7),
    num_processes=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_each_pass_has_each_example_once(make, count, longest, pack, share, num_processes, seed):
    seen, items = passes_of(make, count, longest, pack, share * num_processes, num_processes, seed, passes=3)
    for number in range(3):
        assert Counter(item[1:] for item in seen if item[0] == number) == Counter(items)


@pytest.mark.parametrize("count", [1, 2, 500, 1023, 1024, 1025])
@pytest.mark.parametrize("make", [LanguageModel, SpanCorruption])
def test_no_example_comes_again_before_all_have_come(make, count):
    """In the order of rows, so that a run stopped at the end of a pass has seen each example equally often."""
    seen, items = passes_of(make, count, 12, True, 1, 1, 0, passes=2)
    assert Counter(item[1:] for item in seen[: len(items)]) == Counter(items)
    assert [epoch for epoch, *_ in seen] == sorted(epoch for epoch, *_ in seen)


def streamed(name, count, seed, objective, pack, part=0, parts=1):
    """A source over examples that tell their number by their first token, in a fresh order each pass."""
    random = np.random.default_rng(seed)
    sizes = {number: int(random.integers(1, 12)) for number in range(part, count, parts)}

    def passes():
        while True:
            for number in random.permutation(list(sizes)).tolist():
                tokens = np.full(sizes[number], 7, np.int32)
                tokens[0] = number
                yield {name: tokens for name in LENGTHS}
            yield None

    return StreamedSource(name, passes(), objective, pack, seed), list(sizes)


@settings(deadline=None, max_examples=12)
@given(
    counts=st.lists(st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 90]), min_size=1, max_size=3),
    pack=st.booleans(),
    batch_size=st.integers(1, 9),
    parts=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_stream_ends_a_pass_before_it_begins_the_next(counts, pack, batch_size, parts, seed):
    """Buffers of 32; whatever else is in the mixture, and whichever part of a task a process reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_source, "BUFFER", 32)
        converter, sources, numbers, noted = EncoderDecoder(pack), [], [], []
        for place, count in enumerate(counts):
            noted.append(_Noted(converter.bind(task(*LENGTHS), LENGTHS)))
            part = seed % min(parts, count)
            source, own = streamed(f"task {place}", count, seed, noted[-1], pack, part, parts)
            sources.append(source)
            numbers.append(own)
        rates = {f"task {place}": 1.0 + place for place in range(len(counts))}
        spec = converter.spec(LENGTHS, batch_size)
        stream = RowStream("mix", sources, rates, [], spec, batch_size, slice(0, batch_size))
        for _ in range(40):
            next(stream)
    for own, seen in zip(numbers, noted):
        found = [int(example["inputs"][0]) for example in seen.examples]
        for begin in range(0, len(found), len(own)):
            of_pass = found[begin : begin + len(own)]
            assert len(set(of_pass)) == len(of_pass) and set(of_pass) <= set(own)
            epochs = {epoch for epoch, *_ in seen.seen[begin : begin + len(own)]}
            assert epochs == {begin // len(own)}


def test_a_stream_without_examples_says_so():
    objective = LanguageModel().bind(task("targets"), {"targets": 4})
    with pytest.raises(UserError, match="task 'none' has no examples to read in shard 2 of 2"):
        StreamedSource("none", iter([None, None]), objective, True, part=" in shard 2 of 2").take(np.arange(1))
    too_long = LanguageModel(overlong="skip").bind(task("targets"), {"targets": 4})
    passes = itertools.cycle([{"targets": np.arange(9)}, {"targets": np.arange(8)}, None])
    with pytest.raises(UserError, match="task 'long': 200 examples in a row were all left out"):
        StreamedSource("long", passes, too_long, True).take(np.arange(1))
    passes = iter([{"targets": np.array([3])}, {"targets": np.array([3, 300])}, None])
    with pytest.raises(UserError, match="task 'ids', example 1: feature 'targets' holds the token id 300"):
        StreamedSource("ids", passes, objective, True, vocabulary_sizes={"targets": 259}).take(np.arange(1))
