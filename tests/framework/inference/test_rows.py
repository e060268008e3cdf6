"""Rows of token ids say what the feature converters say of the same examples, and targets are found again."""

import numpy as np
import pytest

from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.rows import packing
from meshway.framework.inference.rows import RowFormat

TOKENS = FeatureInfo("int32", (None,))
INPUTS, TARGETS = [[5, 0, 7], [8], []], [[9, 1], [4, 0, 6, 1], [3]]
LENGTHS = {"inputs": 5, "targets": 6}


def laid(converter, lengths, **features):
    """Returns what a converter makes of examples, one a row."""
    objective = converter.bind(TaskInfo("task", dict.fromkeys(features, TOKENS)), lengths)
    examples = [
        {name: np.array(values, np.int32) for name, values in zip(features, row)} for row in zip(*features.values())
    ]
    items = [objective.convert(example, 0, 0, 0, 0) for example in examples]
    return objective.lay(items, packing.one_each(len(items), list(objective.row_lengths))), objective, examples


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        assert found[name].dtype == wanted[name].dtype, name


def test_an_encoder_decoder_reads_what_its_converter_lays():
    rows = RowFormat(has_encoder=True)
    wanted, objective, examples = laid(EncoderDecoder(pack=False), LENGTHS, inputs=INPUTS, targets=TARGETS)
    assert_same(rows.scored(INPUTS, TARGETS, LENGTHS), wanted)
    assert_same(rows.prompts(INPUTS, 5), objective.prompts(examples))
    assert rows.scored_size([1, 2], [3]) == {"inputs": 2, "targets": 1} and rows.prompt_size([1, 2]) == 2


def test_a_prefix_language_model_reads_what_its_converter_lays():
    rows = RowFormat(has_encoder=False, has_prefix=True)
    wanted, objective, examples = laid(PrefixLanguageModel(pack=False), LENGTHS, inputs=INPUTS, targets=TARGETS)
    assert_same(rows.scored(INPUTS, TARGETS, {"targets": 11}), wanted)
    assert_same(rows.prompts(INPUTS, 6), objective.prompts(examples))


def test_a_language_model_reads_what_its_converter_lays():
    rows = RowFormat(has_encoder=False)
    wanted, _, _ = laid(LanguageModel(pack=False), {"targets": 6}, targets=TARGETS)
    assert_same(rows.scored([[]] * 3, TARGETS, {"targets": 6}), wanted)


@pytest.mark.parametrize("start", [(0,), (300,), (), (300, 301)], ids=str)
def test_targets_are_found_again_behind_any_start(start):
    rows = RowFormat(has_encoder=False, start=start)
    inputs, targets = [[5, 6, 7], [8], [2, 2]], [[9, 1], [4, 6, 1], [3]]
    batch = rows.scored(inputs, targets, {"targets": 8})
    shown = np.where(batch["decoder_loss_weights"] > 0, batch["decoder_target_tokens"], -1).astype(np.float32)
    for found, wanted in zip(rows.of_targets(shown, inputs, targets), targets):
        np.testing.assert_array_equal(found, wanted)
    for row, known, new in zip(range(3), inputs, targets):
        whole = [*start, *known, *new]
        size = rows.scored_size(known, new)["targets"]
        assert size == len(whole) - 1 == batch["decoder_segment_ids"][row].sum()
        np.testing.assert_array_equal(batch["decoder_input_tokens"][row, :size], whole[:-1])
    assert rows.prompt_size([5, 6]) == len(start) + 2


def test_without_a_start_the_first_token_is_predicted_by_nothing():
    rows = RowFormat(has_encoder=False, start=())
    batch = rows.scored([[]], [[9, 4, 1]], {"targets": 4})
    np.testing.assert_array_equal(batch["decoder_loss_weights"], [[1, 1, 0, 0]])
    scores = np.array([[-1.0, -2.0, 0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(rows.of_targets(scores, [[]], [[9, 4, 1]])[0], [0, -1, -2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 tokens does not fit into 2"):
        RowFormat(has_encoder=True).prompts([[1, 2, 3]], 2)
