"""Each pass over a task visits each example once: at any size, on any number of processes, whatever the objective."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_in_memory import task

from meshway.framework.data.denoising import MixtureOfDenoisers, RandomPrefix, SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream

LENGTHS = {"inputs": 40, "targets": 40}
PAIRS = [EncoderDecoder, LanguageModel, PrefixLanguageModel]
TEXTS = [SpanCorruption, MixtureOfDenoisers, RandomPrefix]


class _Noted:
    """An objective that notes which items of which pass it is asked for."""

    def __init__(self, objective):
        self._objective, self.seen = objective, []

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def convert(self, example, index, part, epoch, seed):
        self.seen.append((epoch, index, part))
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
