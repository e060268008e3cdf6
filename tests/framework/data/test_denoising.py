import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.denoising import UL2, Denoiser, MixtureOfDenoisers, RandomPrefix, SpanCorruption
from meshway.framework.data.features import EncoderDecoder, PrefixLanguageModel
from meshway.framework.data.objective import FeatureInfo, Items, TaskInfo, VocabularyInfo
from meshway.framework.data.rows.packing import best_fit, one_each
from meshway.framework.data.windowed_text import Room
from meshway.framework.errors import UserError

VOCABULARY = VocabularyInfo(size=1000, eos_id=1, extra_ids=100)
TOKENS = FeatureInfo("int32", (None,), VOCABULARY)
TEXT = TaskInfo("a_text", {"targets": TOKENS})
BOTH = TaskInfo("a_task", {"inputs": TOKENS, "targets": TOKENS})
LENGTHS = {"inputs": 64, "targets": 48}
CONVERTERS = {
    "span corruption": SpanCorruption(),
    "no EOS": SpanCorruption(add_eos=False),
    "short windows": SpanCorruption(window=40),
    "one decoder": SpanCorruption(decoder_only=True),
    "UL2": MixtureOfDenoisers(),
    "UL2 with modes": MixtureOfDenoisers(mode_tokens="sentinels"),
    "UL2 in one decoder": MixtureOfDenoisers(mode_tokens={"R": 7, "S": 8, "X": 9}, decoder_only=True),
    "random prefix": RandomPrefix(),
    "random prefix in one decoder": RandomPrefix(decoder_only=True),
}
quick = settings(max_examples=50, deadline=None)
every_converter = pytest.mark.parametrize("converter", CONVERTERS.values(), ids=CONVERTERS)


def text_of(size):
    return (np.arange(size, dtype=np.int32) * 3) % 40 * (np.arange(size) % 5 > 0)  # zeros are data


def items_of(index, parts, epoch):
    return Items(np.full(parts, index), np.arange(parts), np.full(parts, epoch))


def converted(objective, example, index=0, epoch=0, seed=0):
    """Returns every item of an example."""
    sizes = {name: np.array([len(tokens)]) for name, tokens in example.items()}
    parts = int(objective.parts(sizes)[0])
    return [objective.convert(example, index, part, epoch, seed + part) for part in range(parts)]


def pair_of(item):
    """Returns an item's (inputs, targets), whatever its rows."""
    if "sequence" not in item:
        return item["inputs"].tolist(), item["targets"].tolist()
    size = int(item["is_input"].sum())
    return item["sequence"][:size].tolist(), item["sequence"][size:].tolist()


def window_of(item, converter):
    """Returns the text that an item was made of."""
    inputs, targets = pair_of(item)
    if converter.add_eos:
        assert targets.pop() == VOCABULARY.eos_id
        if not converter.decoder_only:
            assert inputs.pop() == VOCABULARY.eos_id
    if isinstance(converter, RandomPrefix):
        return inputs + targets
    if getattr(converter, "mode_tokens", None):
        assert inputs.pop(0) in (7, 8, 9, 900, 901, 902)
    spans, text = {}, []
    for token in targets:
        if token >= 903:
            spans[token] = []
        else:
            spans[min(spans)].append(token)
    assert list(spans) == list(range(999, 999 - len(spans), -1))
    for token in inputs:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@quick
@given(st.sampled_from(list(CONVERTERS)), st.integers(0, 300), st.integers(0, 50), st.integers(0, 20), st.integers(0))
def test_every_token_is_shown_once_and_measured_exactly(name, size, index, epoch, seed):
    converter, text = CONVERTERS[name], text_of(size)
    objective = converter.bind(TEXT, LENGTHS)
    items = converted(objective, {"targets": text}, index, epoch, seed % 2**63)
    assert [token for item in items for token in window_of(item, converter)] == text.tolist()
    sizes = {"targets": np.full(len(items), size)}
    measured = objective.measure(sizes, items_of(index, len(items), epoch))
    assert set(measured) == set(objective.row_lengths)
    for feature, lengths in measured.items():
        assert [len(item[feature]) for item in items] == lengths.tolist()
        assert (lengths <= objective.row_lengths[feature]).all()
    assert not objective.lost({"targets": np.array([size])}).any()


@quick
@given(
    st.integers(2, 40),
    st.integers(3, 40),
    st.integers(0, 200),
    st.sampled_from([0.01, 0.15, 0.5, 0.9]),
    st.sampled_from([1.0, 3.0, 64.0]),
)
def test_any_lengths_from_the_smallest(inputs, targets, size, density, mean):
    converter = SpanCorruption(noise_density=density, mean_span_length=mean)
    objective = converter.bind(TEXT, {"inputs": inputs, "targets": targets})
    items = converted(objective, {"targets": text_of(size)})
    assert [token for item in items for token in window_of(item, converter)] == text_of(size).tolist()
    assert all(len(item["inputs"]) <= inputs and len(item["targets"]) <= targets for item in items)


def test_windows_may_be_shorter():
    for converter in (SpanCorruption(window=11), MixtureOfDenoisers(window=11), RandomPrefix(window=11)):
        assert converter.bind(TEXT, LENGTHS).parts({"targets": np.array([0, 11, 12, 60])}).tolist() == [0, 1, 2, 6]
    longest = SpanCorruption(window=10_000).bind(TEXT, LENGTHS)
    assert longest.parts({"targets": np.array([500])}) == SpanCorruption().bind(TEXT, LENGTHS).parts({"targets": [500]})


def test_noise_rate_and_span_length_are_as_asked():
    objective = SpanCorruption(add_eos=False).bind(TEXT, {"inputs": 100_000, "targets": 300})
    ((inputs, targets),) = map(pair_of, converted(objective, {"targets": np.full(600, 5)}))
    sentinels = sum(token > 900 for token in targets)
    assert (len(targets) - sentinels) / 600 == 0.15
    assert (len(targets) - sentinels) / sentinels == 3.0
    assert len(inputs) == 600 - 90 + 30


@every_converter
def test_convert_is_pure_and_random_by_seed_or_epoch(converter):
    objective, text = converter.bind(TEXT, LENGTHS), {"targets": text_of(40)}
    again = [objective.convert(text, 5, 0, 3, 17) for _ in range(2)]
    for feature, tokens in again[0].items():
        assert tokens.tobytes() == again[1][feature].tobytes()
    # The loader gives every epoch a seed of its own.
    found = {str(pair_of(objective.convert(text, 5, 0, epoch, 17 + epoch))) for epoch in range(8)}
    assert len(found) >= 5


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 3), (4, 2, 2)])
def test_an_item_meets_all_denoisers_by_their_weights_over_a_cycle(weights):
    converter = MixtureOfDenoisers(
        denoisers=[(mode, 3.0, 0.15, weight) for mode, weight in zip("ABC", weights, strict=True)],
        mode_tokens={"A": 10, "B": 11, "C": 12},
    )
    objective = converter.bind(TEXT, LENGTHS)
    assert objective.cycle == sum(weights) // np.gcd.reduce(weights)
    first = collections.Counter()
    for index in range(600):
        heads = [
            int(objective.convert({"targets": text_of(90)}, index, index % 2, epoch, 0)["inputs"][0])
            for epoch in range(3, 3 + 2 * objective.cycle)
        ]
        assert heads[: objective.cycle] == heads[objective.cycle :]
        shares = [heads.count(mode) / len(heads) for mode in (10, 11, 12)]
        np.testing.assert_allclose(shares, np.array(weights) / sum(weights))
        first[heads[0]] += 1
    np.testing.assert_allclose(
        [first[mode] / 600 for mode in (10, 11, 12)], np.array(weights) / sum(weights), atol=0.06
    )


def test_windows_of_one_text_meet_different_denoisers():
    objective = MixtureOfDenoisers(mode_tokens={"R": 7, "S": 8, "X": 9}).bind(TEXT, LENGTHS)
    heads = [int(item["inputs"][0]) for item in converted(objective, {"targets": text_of(30_000)})]
    shares = [heads.count(mode) / len(heads) for mode in (7, 8, 9)]
    np.testing.assert_allclose(shares, [2 / 7, 1 / 7, 4 / 7], atol=0.06)


def test_sizes_repeat_with_the_cycle_and_windows_do_not_depend_on_the_epoch():
    for converter in (MixtureOfDenoisers(), RandomPrefix()):
        objective = converter.bind(TEXT, LENGTHS)
        count = 500
        sizes = {"targets": np.full(count, 50)}
        measured = [
            objective.measure(sizes, Items(np.arange(count), np.zeros(count, int), np.full(count, epoch)))["targets"]
            for epoch in range(2 * objective.cycle)
        ]
        np.testing.assert_array_equal(measured[: objective.cycle], measured[objective.cycle :])
        assert len({column.tobytes() for column in measured}) == objective.cycle
    objective = RandomPrefix(decoder_only=True).bind(TEXT, LENGTHS)
    assert objective.cycle == 1


def test_ul2_by_table():
    """Tay et al. 2022, table 1, at a text of 512 tokens."""
    modes = [denoiser._replace(mode=str(number)) for number, denoiser in enumerate(UL2)]
    converter = MixtureOfDenoisers(
        denoisers=modes, mode_tokens={mode.mode: 10 + number for number, mode in enumerate(modes)}, add_eos=False
    )
    objective = converter.bind(TEXT, {"inputs": 512, "targets": 512})
    found = {}
    for epoch in range(7):
        inputs, targets = pair_of(objective.convert({"targets": np.full(512, 5)}, 0, 0, epoch, 1))
        spans = sum(token > 900 for token in targets)
        found[inputs[0] - 10] = (len(targets) - spans, spans)
    assert found == {0: (77, 26), 1: (77, 10), 2: (128, 1), 3: (256, 85), 4: (256, 32), 5: (77, 1), 6: (256, 4)}


def test_the_s_denoiser_is_a_prefix_language_model():
    converter = MixtureOfDenoisers(denoisers=[("S", None, 0.25)], add_eos=False)
    item = converter.bind(TEXT, LENGTHS).convert({"targets": np.arange(8)}, 0, 0, 0, 0)
    assert pair_of(item) == ([0, 1, 2, 3, 4, 5, 999], [999, 6, 7])


def test_the_cut_of_a_random_prefix_is_uniform():
    objective = RandomPrefix(add_eos=False).bind(TEXT, {"inputs": 10, "targets": 10})
    text = {"targets": np.arange(1, 9)}
    cuts = collections.Counter(
        len(objective.convert(text, index, 0, epoch, 0)["inputs"]) for index in range(250) for epoch in range(8)
    )
    assert sorted(cuts) == list(range(1, 8))
    assert max(abs(count - 2000 / 7) for count in cuts.values()) < 30
    assert pair_of(objective.convert({"targets": np.array([4])}, 0, 0, 0, 0)) == ([], [4])


@pytest.mark.parametrize("policy", ["truncate", "skip", "error"])
@every_converter
def test_supervised_examples_pass_through_beside_texts(converter, policy):
    converter = type(converter)(overlong=policy, decoder_only=converter.decoder_only)
    plain = (PrefixLanguageModel if converter.decoder_only else EncoderDecoder)(overlong=policy)
    objective, expected = converter.bind(BOTH, LENGTHS), plain.bind(BOTH, LENGTHS)
    long = 200 if policy != "error" else 20
    sizes = {"inputs": np.array([3, 0, long, 0]), "targets": np.array([2, 500, 5, 0])}
    parts = objective.parts(sizes)
    assert parts[1] > 1 and parts[3] == 0
    for at in (0, 2):
        one = {name: column[[at]] for name, column in sizes.items()}
        assert parts[at] == expected.parts(one)[0]
        assert objective.lost(sizes)[at] == expected.lost(one)[0]
        example = {name: np.arange(int(column[0])) for name, column in one.items()}
        for name, column in expected.measure(one, items_of(at, 1, 4)).items():
            np.testing.assert_array_equal(objective.measure(one, items_of(at, 1, 4))[name], column)
        for name, column in expected.convert(example, at, 0, 4, 9).items():
            np.testing.assert_array_equal(objective.convert(example, at, 0, 4, 9)[name], column)
    assert not objective.lost(sizes)[[1, 3]].any()
    empty = np.zeros(0, np.int32)
    items = converted(objective, {"inputs": empty, "targets": text_of(500)})
    assert [token for item in items for token in window_of(item, converter)] == text_of(500).tolist()


def test_overlong_supervised_examples_may_be_an_error():
    objective = SpanCorruption(overlong="error").bind(BOTH, LENGTHS)
    with pytest.raises(UserError, match="'a_task': 1 of 2 examples"):
        objective.parts({"inputs": np.array([65, 0]), "targets": np.array([1, 500])})


@pytest.mark.parametrize("packed", [True, False])
@every_converter
def test_rows_are_what_spec_says(converter, packed):
    objective = converter.bind(TEXT, LENGTHS)
    items = converted(objective, {"targets": text_of(200)})
    sizes = objective.measure({"targets": np.full(len(items), 200)}, items_of(0, len(items), 0))
    placement = best_fit(sizes, objective.row_lengths) if packed else one_each(len(items), list(sizes))
    rows = objective.lay(items, placement)
    assert {n: (a.shape, a.dtype) for n, a in rows.items()} == converter.spec(LENGTHS, placement.num_rows)
    targets = sum(len(pair_of(item)[1]) for item in items)
    assert rows["decoder_loss_weights"].sum() == targets


def test_the_decoder_reads_bos_then_the_targets():
    objective = SpanCorruption().bind(TEXT, LENGTHS)
    item = objective.convert({"targets": text_of(30)}, 0, 0, 0, 0)
    rows = objective.lay([item], one_each(1, ["inputs", "targets"]))
    targets = item["targets"].tolist()
    assert rows["decoder_input_tokens"][0, : len(targets)].tolist() == [0, *targets[:-1]]
    assert rows["decoder_target_tokens"][0, : len(targets)].tolist() == targets


def test_prompts_are_those_of_supervised_examples():
    example = {"inputs": np.arange(5), "targets": np.arange(3)}
    for name, array in EncoderDecoder().bind(BOTH, LENGTHS).prompts([example]).items():
        np.testing.assert_array_equal(SpanCorruption().bind(BOTH, LENGTHS).prompts([example])[name], array)
    with pytest.raises(UserError, match="'a_text' has text without inputs"):
        SpanCorruption().bind(TEXT, LENGTHS).prompts([{"targets": np.arange(3)}])


def vocabulary(**changes):
    info = FeatureInfo("int32", (None,), VocabularyInfo(**({"size": 1000, "eos_id": 1, "extra_ids": 100} | changes)))
    return TaskInfo("a_text", {"targets": info})


@pytest.mark.parametrize(
    ("converter", "task", "lengths", "message"),
    [
        (SpanCorruption(), TaskInfo("t", {"text": TOKENS}), LENGTHS, "'t' has no feature 'targets'"),
        (SpanCorruption(), TEXT, {"targets": 48}, "'a_text', but .* lacks .'inputs'.; give --gin.TASK_FEATURE"),
        (SpanCorruption(), TEXT, LENGTHS | {"target": 5}, "'target', which the task has not"),
        (SpanCorruption(), TEXT, {"inputs": 1, "targets": 48}, "'a_text'.*leaves 0 tokens of inputs"),
        (SpanCorruption(), TEXT, {"inputs": 8, "targets": 2}, "1 of targets beside EOS"),
        (SpanCorruption(), vocabulary(extra_ids=2), LENGTHS, "'a_text': SpanCorruption drops up to 3 spans.* has 2"),
        (SpanCorruption(), vocabulary(eos_id=None), LENGTHS, "vocabulary of task 'a_text' has none"),
        (SpanCorruption(), TaskInfo("t", {"targets": FeatureInfo("int32", (None,))}), LENGTHS, "has no vocabulary"),
        (
            SpanCorruption(),
            TaskInfo("t", {"targets": FeatureInfo("float32", (None, 3), VOCABULARY)}),
            LENGTHS,
            "feature 'targets' has dtype float32 and shape",
        ),
        (MixtureOfDenoisers(mode_tokens="sentinels"), vocabulary(extra_ids=13), LENGTHS, "3 of them for modes"),
        (MixtureOfDenoisers(mode_tokens={"R": 7, "S": 999, "X": 9}), TEXT, LENGTHS, "token 999 of mode 'S'"),
        (RandomPrefix(), TEXT, {"inputs": 1, "targets": 8}, "RandomPrefix needs 1 of each"),
    ],
)
def test_what_does_not_fit_is_named(converter, task, lengths, message):
    with pytest.raises(UserError, match=message):
        converter.bind(task, lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"denoisers": [("R", 3.0)]}, "must be a list of"),
        ({"denoisers": []}, "weights that sum to 1 to 256"),
        ({"denoisers": [Denoiser("R", 0.5, 0.15)]}, r"denoisers\[0\]: mean_span_length must be at least 1"),
        ({"denoisers": [*UL2, ("R", 3.0, 15)]}, r"denoisers\[7\]: noise_density must be between 0 and 1, not 15"),
        ({"denoisers": [("R", 3.0, 0.15, 0.5)]}, "weight must be a whole number"),
        ({"denoisers": [(1, 3.0, 0.15)]}, "mode must be a name"),
        ({"mode_tokens": "sentinel"}, "did you mean 'sentinels'"),
        ({"mode_tokens": {"R": 1, "S": 2}}, "no id for mode 'X'"),
        ({"mode_tokens": {"R": 1, "S": 2, "X": 3, "Y": 4}}, "mode 'Y', which no denoiser has"),
        ({"mode_tokens": {"R": 1, "S": 2, "X": "<x>"}}, "must be an id"),
        ({"window": 0}, "MixtureOfDenoisers.window must be a whole number of tokens or None, not 0"),
        ({"overlong": "split"}, "MixtureOfDenoisers.overlong is 'split'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        MixtureOfDenoisers(**arguments)


def test_sentinels_that_are_not_the_highest_ids():
    """Spans are replaced by `<extra_id_0>`, `<extra_id_1>`, ... wherever their ids lie, and nothing else is."""
    ids = (500, 700, 600, *range(800, 900))
    end = np.array([1], np.int32)
    scheme = SpanCorruption().scheme(Room("task", VocabularyInfo(1000, 1, len(ids), ids), 60, 30, end, end, 1000))
    tokens = np.arange(2, 52, dtype=np.int32)
    inputs, targets = scheme.pair(tokens, Items(np.array([0]), np.array([0]), np.array([0])), seed=5)
    spans = int(scheme.spans[0, len(tokens)])
    assert spans > 2
    for side in (inputs, targets):
        assert [token for token in side.tolist() if token >= 500] == list(ids[:spans])
