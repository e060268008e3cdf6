import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks_in_memory import random_examples, task

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.encoder_only import MaskedLanguageModel
from meshway.framework.data.features import EncoderDecoder, LanguageModel
from meshway.framework.data.rows import row_source
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 24, "targets": 16}


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(row_source, "POOL_ITEMS", 40)


def source(examples, pack=True, converter=None, lengths=LENGTHS, **more):
    converter = converter or EncoderDecoder()
    objective = converter.bind(task(*converter.task_features), lengths)
    return RowSource("a_task", examples, objective, pack, **more)


def segments(arrays, prefix, tokens):
    """Every segment of rows as a tuple of its tokens, sorted."""
    ids = arrays[f"{prefix}_segment_ids"]
    return sorted(
        tuple(row[at == segment].tolist())
        for row, at in zip(arrays[tokens], ids, strict=True)
        for segment in range(1, at.max(initial=0) + 1)
    )


def whole_round(rows, number=0):
    count = rows.rows_in_round(number)
    return rows.take(np.arange(number * count, (number + 1) * count))[0]


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=120),
    pack=st.booleans(),
    shuffle=st.booleans(),
)
def test_a_pass_has_every_token_once_or_counts_it_as_lost(sizes, pack, shuffle):
    examples = InMemory(
        [
            {"inputs": np.arange(n, dtype=np.int32), "targets": np.arange(m, dtype=np.int32) * (i + 1)}
            for i, (n, m) in enumerate(sizes)
        ]
    )
    rows = source(examples, pack, shuffle=shuffle)
    arrays = whole_round(rows)
    kept = [tuple(range(0, min(m, 16) * (i + 1), i + 1)) for i, (_, m) in enumerate(sizes)]
    if pack:  # a segment without a token is in no row
        assert [s for s in segments(arrays, "decoder", "decoder_target_tokens") if s] == sorted(k for k in kept if k)
    else:
        assert sorted(filter(None, segments(arrays, "decoder", "decoder_target_tokens"))) == sorted(filter(None, kept))
    shown = sum((arrays[f"{part}_segment_ids"] > 0).sum() for part in ("encoder", "decoder"))
    objective = EncoderDecoder().bind(task("inputs", "targets"), LENGTHS)
    assert shown + objective.lost(examples.sizes).sum() == sum(map(sum, sizes))


@pytest.mark.parametrize("pack", [True, False])
def test_rounds_differ_in_order_and_hold_the_same(pack):
    rows = source(random_examples(200), pack)
    first, second = whole_round(rows, 0), whole_round(rows, 1)
    assert not np.array_equal(first["decoder_target_tokens"], second["decoder_target_tokens"])
    key = ("decoder", "decoder_target_tokens")
    assert segments(first, *key) == segments(second, *key)
    other = whole_round(source(random_examples(200), pack, seed=1))
    assert not np.array_equal(first["decoder_target_tokens"][:5], other["decoder_target_tokens"][:5])


@pytest.mark.parametrize("pack", [True, False])
def test_any_row_can_be_taken_at_any_time(pack):
    whole, _ = source(random_examples(150), pack).take(np.arange(400))
    fresh = source(random_examples(150), pack)
    for numbers in ([399], [3, 7, 8, 250], [0], [100, 101, 399]):
        arrays, _ = fresh.take(np.array(numbers))
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole[name][numbers], err_msg=name)


def test_rows_far_away_are_found_without_reading_what_lies_before():
    class Counted(InMemory):
        reads = 0

        def read(self, indices):
            Counted.reads += len(indices)
            return super().read(indices)

    rows = source(Counted([random_examples(500).read([i])[0] for i in range(500)]))
    rows.take(np.array([10**12, 10**12 + 1]))
    assert Counted.reads < 40


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 130), pack=st.booleans(), rounds=st.integers(1, 4), first=st.integers(0, 3))
def test_each_pass_visits_each_example_once_at_any_size(count, pack, rounds, first):
    """A pass of a task below a thousand examples, packed, once left out a third of them and had others three times."""
    rows = source(random_examples(count, longest=10), pack)
    ends = np.cumsum([0, *(rows.rows_in_round(number) for number in range(first + rounds))])
    for number in range(first, first + rounds):
        seen = rows.examples_of(np.arange(ends[number], ends[number + 1]))
        assert sorted(seen.tolist()) == list(range(count))


def test_long_documents_become_windows_that_lose_nothing():
    examples = random_examples(60, ("targets",), longest=100)
    rows = source(examples, converter=LanguageModel(), lengths={"targets": 16})
    shown = sum((whole_round(rows)["decoder_segment_ids"] > 0).ravel())
    assert shown == examples.sizes["targets"].sum()


def test_unshuffled_and_unpacked_rows_are_the_examples_in_order():
    examples = random_examples(30)
    arrays = whole_round(source(examples, pack=False, shuffle=False))
    for index in range(30):
        tokens = examples.read([index])[0]["targets"][:16]
        np.testing.assert_array_equal(arrays["decoder_target_tokens"][index, : len(tokens)], tokens)


def test_it_may_be_sent_to_another_process():
    rows = source(random_examples(90))
    expected, _ = rows.take(np.arange(50))
    arrays, _ = pickle.loads(pickle.dumps(rows)).take(np.arange(50))
    for name in arrays:
        np.testing.assert_array_equal(arrays[name], expected[name])


def test_nothing_to_read_is_an_error():
    with pytest.raises(UserError, match="task 'a_task' has no examples to read"):
        source(random_examples(0))
    with pytest.raises(UserError, match="'a_task' has no examples to read: none of 2 is kept"):
        long = {"inputs": np.zeros(99, int), "targets": np.zeros(99, int)}
        source(InMemory([long, long]), converter=EncoderDecoder(overlong="skip"))


@pytest.mark.parametrize("wrong", [-1, 1000, 2**31 - 1])
@pytest.mark.parametrize("converter", [EncoderDecoder(), LanguageModel(), SpanCorruption()])
@pytest.mark.parametrize("pack", [True, False])
def test_an_id_that_the_vocabulary_has_not_is_refused(wrong, converter, pack):
    names = ("targets",) if isinstance(converter, LanguageModel) else ("inputs", "targets")
    examples = random_examples(20, names, longest=9)
    spoilt = {name: array.copy() for name, array in examples.read([13])[0].items()}
    spoilt["targets"] = np.array([5, wrong, 3], np.int64)
    all_of_them = [*examples.read(range(13)), spoilt, *examples.read(range(14, 20))]
    sizes = dict.fromkeys(names, 1000)
    lengths = {name: LENGTHS[name] for name in names}
    rows = source(InMemory(all_of_them), pack, converter, lengths, vocabulary_sizes=sizes)
    said = (
        f"task 'a_task', example 13: feature 'targets' holds the token id {wrong}, but its vocabulary has 1,000 ids, 0 "
        "to 999"
    )
    with pytest.raises(UserError, match=said):
        whole_round(rows)
    unpacked = source(InMemory(all_of_them), False, converter, lengths, shuffle=False, vocabulary_sizes=sizes)
    if isinstance(converter, EncoderDecoder):
        unpacked.take(np.arange(13))  # only what is read is looked at
    whole_round(source(examples, pack, converter, lengths, vocabulary_sizes=sizes))


def test_the_rows_of_one_pool_come_in_a_fresh_order_each_round():
    rows = source(random_examples(30, longest=9))
    rounds = [[row.tobytes() for row in whole_round(rows, n)["decoder_target_tokens"]] for n in range(4)]
    assert len(rounds[0]) > 5 and all(sorted(each) == sorted(rounds[0]) for each in rounds)
    assert len({tuple(each) for each in rounds}) == 4


def test_parts_of_an_example_draw_for_themselves():
    """Windows of the same tokens are hidden in different places."""
    examples = InMemory([{"targets": np.full(4 * 16, 7)}])
    rows = source(examples, False, MaskedLanguageModel(mask_rate=0.4), {"targets": 16}, shuffle=False)
    assert len(np.unique(whole_round(rows)["encoder_loss_weights"], axis=0)) == 4
