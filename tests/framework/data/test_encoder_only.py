import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.framework.data.encoder_only import MaskedLanguageModel
from meshway.framework.data.objective import FeatureInfo, Items, TaskInfo, VocabularyInfo
from meshway.framework.data.rows.packing import best_fit, one_each
from meshway.framework.errors import UserError

VOCABULARY = VocabularyInfo(size=1000, eos_id=1, extra_ids=100)
TOKENS = FeatureInfo("int32", (None,), VOCABULARY)
TEXT = TaskInfo("a_text", {"targets": TOKENS})
LENGTHS = {"targets": 20}
quick = settings(max_examples=50, deadline=None)


@quick
@given(st.integers(0, 90), st.sampled_from(["split", "truncate"]), st.floats(0.01, 1), st.integers(0, 2**64 - 1))
def test_the_text_is_kept_and_only_chosen_tokens_change(size, overlong, rate, seed):
    objective = MaskedLanguageModel(mask_rate=rate, overlong=overlong).bind(TEXT, LENGTHS)
    text = np.arange(size, dtype=np.int32) % 7  # 0 and EOS among them
    sizes = {"targets": np.array([size])}
    parts = int(objective.parts(sizes)[0])
    items = [objective.convert({"targets": text}, 0, part, 0, seed) for part in range(parts)]
    shown = [token for item in items for token in item["targets"]]
    assert shown == text[: size if overlong == "split" else 20].tolist()
    assert len(shown) + objective.lost(sizes)[0] == size
    measured = objective.measure(
        {"targets": np.full(parts, size)}, Items(*np.zeros((1, parts), int), np.arange(parts), 0)
    )
    assert [len(item["targets"]) for item in items] == measured["targets"].tolist()
    for item in items:
        same = item["inputs"] == item["targets"]
        assert same[item["weights"] == 0].all()
        assert not item["weights"][item["targets"] == VOCABULARY.eos_id].any()
        maskable = int((item["targets"] != VOCABULARY.eos_id).sum())
        assert item["weights"].sum() == min(maskable, max(1, round(maskable * rate)))


def test_eight_of_ten_are_masked_one_random_one_kept():
    objective = MaskedLanguageModel().bind(TEXT, {"targets": 100_000})
    item = objective.convert({"targets": np.full(100_000, 5)}, 0, 0, 0, seed=3)
    chosen = item["inputs"][item["weights"] == 1]
    assert len(chosen) == 15_000
    masked, kept = (chosen == 999).mean(), (chosen == 5).mean()
    np.testing.assert_allclose([masked, kept], [0.8, 0.1], atol=0.01)
    random = chosen[(chosen != 999) & (chosen != 5)]
    assert random.min() < 20 and 880 < random.max() < 900  # never a sentinel
    places = (item["weights"] == 1).nonzero()[0]
    np.testing.assert_allclose(places.mean(), 50_000, rtol=0.02)


def test_convert_is_pure_and_random_by_seed():
    objective, text = MaskedLanguageModel().bind(TEXT, LENGTHS), {"targets": np.arange(2, 22)}
    first, again, other = (objective.convert(text, 0, 0, epoch, seed) for epoch, seed in [(0, 5), (7, 5), (0, 6)])
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert first["inputs"].tobytes() != other["inputs"].tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_what_spec_says(packed):
    converter = MaskedLanguageModel(mask_id=2)
    objective = converter.bind(TEXT, LENGTHS)
    texts = [np.arange(10, 10 + size) for size in (20, 0, 1, 6, 7)]
    items = [objective.convert({"targets": text}, 0, 0, 0, seed) for seed, text in enumerate(texts)]
    sizes = {"targets": np.array([len(text) for text in texts])}
    placement = best_fit(sizes, objective.row_lengths) if packed else one_each(5, ["targets"])
    rows = objective.lay(items, placement)
    assert {n: (a.shape, a.dtype) for n, a in rows.items()} == converter.spec(LENGTHS, placement.num_rows)
    assert len(rows["encoder_positions"]) == (2 if packed else 5)
    real = rows["encoder_segment_ids"] > 0
    assert real.sum() == 34
    assert sorted(rows["encoder_target_tokens"][real]) == sorted(np.concatenate(texts))
    changed = rows["encoder_input_tokens"] != rows["encoder_target_tokens"]
    assert (rows["encoder_loss_weights"][changed] == 1).all()
    assert rows["encoder_loss_weights"].sum() == sum(item["weights"].sum() for item in items) == 3 + 0 + 1 + 1 + 1
    assert not rows["encoder_target_tokens"][~real].any()


def test_a_text_of_eos_alone_has_nothing_to_mask():
    item = MaskedLanguageModel().bind(TEXT, LENGTHS).convert({"targets": np.array([1, 1])}, 0, 0, 0, 0)
    assert item["inputs"].tolist() == [1, 1] and not item["weights"].any()


def test_nothing_to_predict_from():
    assert not MaskedLanguageModel().can_predict
    with pytest.raises(UserError, match="predicts nothing"):
        MaskedLanguageModel().bind(TEXT, LENGTHS).prompts([])


@pytest.mark.parametrize(
    ("arguments", "features", "lengths", "message"),
    [
        ({}, {"inputs": TOKENS, "targets": TOKENS}, LENGTHS, "'t' has 'inputs'"),
        ({}, {"text": TOKENS}, LENGTHS, "'t' has no feature 'targets'"),
        ({}, {"targets": TOKENS}, LENGTHS | {"inputs": 3}, "'inputs', which the task has not"),
        ({}, {"targets": FeatureInfo("int32", (None,))}, LENGTHS, "'targets' has no vocabulary"),
        ({}, {"targets": FeatureInfo("int32", (None,), VocabularyInfo(256, 1))}, LENGTHS, "no extra ids to mask"),
        ({"mask_id": 1000}, {"targets": TOKENS}, LENGTHS, "mask_id is 1000, .* 't' are 0 to 999"),
    ],
)
def test_what_does_not_fit_is_named(arguments, features, lengths, message):
    with pytest.raises(UserError, match=message):
        MaskedLanguageModel(**arguments).bind(TaskInfo("t", features), lengths)


def test_wrong_arguments_are_named():
    with pytest.raises(UserError, match="mask_rate must be above 0"):
        MaskedLanguageModel(mask_rate=0)
    with pytest.raises(UserError, match="did you mean 'split'"):
        MaskedLanguageModel(overlong="splitt")
