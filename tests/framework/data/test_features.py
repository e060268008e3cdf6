import numpy as np
import pytest
from tasks_in_memory import lay, task

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.objective import TaskInfo
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 6, "targets": 5}
EXAMPLES = [
    {"inputs": [5, 0, 7], "targets": [3, 1]},
    {"inputs": [8, 9], "targets": [0, 4, 1]},
    {"inputs": [2] * 9, "targets": [6] * 9},
]
CONVERTERS = [EncoderDecoder(), LanguageModel(), PrefixLanguageModel(), PrefixLanguageModel(True, False)]


def lengths_of(converter):
    return {name: LENGTHS[name] for name in converter.task_features}


def rows_of(converter, examples, packed):
    objective = converter.bind(task(*converter.task_features), lengths_of(converter))
    return lay(objective, [{n: np.array(e[n]) for n in converter.task_features} for e in examples], packed)


def prompts_of(converter):
    objective = converter.bind(task(*converter.task_features), lengths_of(converter))
    return objective.prompts(EXAMPLES)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("converter", CONVERTERS)
def test_rows_are_what_spec_says(converter, packed):
    lengths = lengths_of(converter)
    rows = rows_of(converter, EXAMPLES, packed=packed)
    assert {n: (a.shape, a.dtype) for n, a in rows.items()} == converter.spec(lengths, len(rows["decoder_positions"]))


def test_encoder_decoder_by_hand():
    rows = rows_of(EncoderDecoder(), EXAMPLES, packed=True)
    np.testing.assert_array_equal(rows["encoder_input_tokens"], [[2] * 6, [5, 0, 7, 8, 9, 0]])
    np.testing.assert_array_equal(rows["encoder_segment_ids"], [[1] * 6, [1, 1, 1, 2, 2, 0]])
    np.testing.assert_array_equal(rows["decoder_target_tokens"], [[6] * 5, [3, 1, 0, 4, 1]])
    np.testing.assert_array_equal(rows["decoder_input_tokens"], [[0, 6, 6, 6, 6], [0, 3, 0, 0, 4]])
    np.testing.assert_array_equal(rows["decoder_segment_ids"], [[1] * 5, [1, 1, 2, 2, 2]])
    np.testing.assert_array_equal(rows["decoder_positions"], [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    np.testing.assert_array_equal(rows["decoder_loss_weights"], np.ones((2, 5)))


def test_unpacked_zeros_are_data_and_padding_weighs_nothing():
    rows = rows_of(LanguageModel(), EXAMPLES, packed=False)
    np.testing.assert_array_equal(rows["decoder_target_tokens"][1], [0, 4, 1, 0, 0])
    np.testing.assert_array_equal(rows["decoder_segment_ids"][1], [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(rows["decoder_loss_weights"][1], [1, 1, 1, 0, 0])


def test_prefix_language_model_by_hand():
    rows = rows_of(PrefixLanguageModel(), EXAMPLES[:2], packed=True)
    np.testing.assert_array_equal(rows["decoder_target_tokens"], [[5, 0, 7, 3, 1, 8, 9, 0, 4, 1, 0]])
    np.testing.assert_array_equal(rows["decoder_input_tokens"], [[0, 5, 0, 7, 3, 0, 8, 9, 0, 4, 0]])
    np.testing.assert_array_equal(rows["decoder_segment_ids"], [[1] * 5 + [2] * 5 + [0]])
    np.testing.assert_array_equal(rows["decoder_prefix_mask"], [[1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rows["decoder_loss_weights"], [[0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]])


def test_loss_on_inputs_makes_the_decoder_causal():
    rows = rows_of(PrefixLanguageModel(loss_on_targets_only=False), EXAMPLES, packed=True)
    assert not rows["decoder_prefix_mask"].any()
    np.testing.assert_array_equal(rows["decoder_loss_weights"], rows["decoder_segment_ids"] > 0)


@pytest.mark.parametrize("converter", CONVERTERS)
def test_packing_keeps_every_weight_and_token(converter):
    packed = rows_of(converter, EXAMPLES, packed=True)
    padded = rows_of(converter, EXAMPLES, packed=False)
    assert packed["decoder_loss_weights"].sum() == padded["decoder_loss_weights"].sum()
    real = [sorted(rows["decoder_target_tokens"][rows["decoder_segment_ids"] > 0]) for rows in (packed, padded)]
    assert real[0] == real[1]


def test_prefix_prompt_is_the_training_row_before_its_targets():
    converter = PrefixLanguageModel()
    prompts = prompts_of(converter)
    rows = rows_of(converter, EXAMPLES, packed=False)
    assert prompts["decoder_input_tokens"].shape == (3, 7)
    for index, size in enumerate((3, 2, 6)):
        seen = slice(0, size + 1)
        for name in (
            "decoder_input_tokens",
            "decoder_segment_ids",
            "decoder_positions",
            "decoder_prefix_mask",
        ):
            np.testing.assert_array_equal(prompts[name][index, seen], rows[name][index, seen], err_msg=name)
            assert not prompts[name][index, size + 1 :].any()
    assert not prompts["decoder_loss_weights"].any()


def test_encoder_decoder_prompt_is_the_encoder_of_the_training_row():
    prompts = prompts_of(EncoderDecoder())
    rows = rows_of(EncoderDecoder(), EXAMPLES, packed=False)
    assert (prompts.pop("decoder_input_tokens") == 0).all()  # the start, [examples, 1]
    assert set(prompts) == {name for name in rows if name.startswith("encoder")}
    for name, array in prompts.items():
        np.testing.assert_array_equal(array, rows[name])


def test_language_model_cannot_be_prompted():
    assert not LanguageModel().can_predict
    with pytest.raises(UserError, match="no inputs to predict from"):
        prompts_of(LanguageModel())


@pytest.mark.parametrize(
    ("converter", "has", "lengths", "message"),
    [
        (EncoderDecoder(), ["targets"], LENGTHS, "has no feature 'inputs'"),
        (
            EncoderDecoder(),
            ["inputs", "targets"],
            {"inputs": 6},
            "lacks 'targets'.*--gin.TASK_FEATURE_LENGTHS=",
        ),
        (
            EncoderDecoder(),
            ["inputs", "targets"],
            LENGTHS | {"tragets": 4},
            "'tragets'.*did you mean 'targets'",
        ),
        (EncoderDecoder(), ["inputs", "targets"], {"inputs": 6, "target": 5}, "lacks.*did you mean 'target'"),
        (
            EncoderDecoder(),
            ["inputs", "targets"],
            {"inputs": 6, "targets": 0},
            "whole number of tokens, not 0",
        ),
        (LanguageModel(), ["inputs", "targets"], {"targets": 5}, "PrefixLanguageModel"),
        (LanguageModel(), ["targets"], LENGTHS, "length for 'inputs', which the task has not"),
    ],
)
def test_what_does_not_fit_is_named(converter, has, lengths, message):
    with pytest.raises(UserError, match=message):
        converter.bind(task(*has), lengths)


def test_what_fits_passes():
    EncoderDecoder().bind(task("inputs", "targets", "extra"), LENGTHS)
    LanguageModel().bind(task("targets"), {"targets": 5})


@pytest.mark.parametrize(
    ("converter", "empty"),
    [(EncoderDecoder(), "inputs"), (PrefixLanguageModel(), "targets"), (LanguageModel(inputs=True), "inputs"),
     (LanguageModel(), "targets"), (SpanCorruption(), "targets")],
)  # fmt: skip
def test_a_feature_that_holds_nothing_in_any_example_is_said_to_be_empty(converter, empty):
    """It is there, as the task was registered; only nothing can be learned from it."""
    features = {name: info for name, info in task(*converter.task_features).features.items() if name != empty}
    info = TaskInfo("silent", features, empty=frozenset({empty}))
    with pytest.raises(UserError, match=f"task 'silent': '{empty}', which .* reads, is empty in every example"):
        converter.bind(info, LENGTHS if len(converter.task_features) == 2 else {"targets": 5})
