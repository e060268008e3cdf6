"""What stands around texts comes from the vocabulary or the recipe: the same in training, evaluation and inference."""

import json

import numpy as np
import pytest
import small_vocabularies
from tasks_in_memory import TOKENS, lay

from meshway.framework.data.denoising import RandomPrefix
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.objective import FeatureInfo, TaskInfo
from meshway.framework.data.task_data import framing_of
from meshway.framework.data.vocabularies import Bytes, HuggingFace, Opaque, read_framing
from meshway.framework.data.vocabulary import Framing
from meshway.framework.errors import UserError
from meshway.framework.inference.rows import RowFormat, load_text
from meshway.framework.training.run_directory import RunDirectory

LENGTHS = {"inputs": 5, "targets": 6}
INPUTS, TARGETS = [[5, 6, 7], [8], [9, 9]], [[3, 0, 256], [4], [2, 7, 0, 256]]
EXAMPLES = [{"inputs": np.array(known), "targets": np.array(new)} for known, new in zip(INPUTS, TARGETS)]
STARTS = [(0,), (257,), ()]


def bound(converter, start, lengths=LENGTHS, bos=(), **features):
    features = dict.fromkeys(converter.task_features, TOKENS) | features
    return converter.bind(
        TaskInfo("t", features, start, bos=bos), {name: lengths[name] for name in converter.task_features}
    )


@pytest.mark.parametrize("bos", [(), (8,)], ids=["plain", "spelled"])
@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("prefix", [False, True])
def test_training_reads_what_scoring_and_predicting_read(start, prefix, bos):
    start = bos or start  # the second example begins with 8
    objective = bound(PrefixLanguageModel() if prefix else LanguageModel(inputs=True), start, bos=bos)
    rows = RowFormat(has_encoder=False, has_prefix=prefix, start=start, bos=bos)
    trained, scored = lay(objective, EXAMPLES, packed=False), rows.scored(INPUTS, TARGETS, {"targets": 11})
    assert set(trained) == set(scored)
    weights = scored["decoder_loss_weights"]
    np.testing.assert_array_equal(trained["decoder_loss_weights"], weights)
    assert weights.sum() == sum(map(len, TARGETS))
    assert not bos or trained["decoder_input_tokens"][1].tolist()[:3] == [8, 4, 0]
    for name in ("decoder_input_tokens", "decoder_target_tokens", "decoder_positions"):
        np.testing.assert_array_equal(trained[name] * (weights > 0), scored[name] * (weights > 0), name)
    seen = scored["decoder_segment_ids"] > 0  # without a start, training also reads a row's last token, for nothing
    for name in sorted(set(scored) - {"decoder_segment_ids", "decoder_positions"}):
        np.testing.assert_array_equal(trained[name] * seen, scored[name] * seen, name)
    for name, array in objective.prompts(EXAMPLES).items():
        np.testing.assert_array_equal(array, rows.prompts(INPUTS, 5 + len(start))[name], name)


@pytest.mark.parametrize("start", STARTS, ids=str)
def test_packed_segments_start_alike(start):
    alone = lay(bound(LanguageModel(), start), [{"targets": np.array(each)} for each in TARGETS], packed=False)
    packed = lay(bound(LanguageModel(), start), [{"targets": np.array(each)} for each in TARGETS], packed=True)
    assert len(packed["decoder_input_tokens"]) < 3

    def pairs(rows):
        kept = rows["decoder_loss_weights"] > 0
        return sorted(zip(rows["decoder_input_tokens"][kept].tolist(), rows["decoder_target_tokens"][kept].tolist()))

    assert pairs(alone) == pairs(packed)
    assert len(pairs(alone)) == sum(len(each) - (not start) for each in TARGETS)


def learned(rows, prefix=False):
    """What each token that carries loss is predicted from: the pairs (tokens read up to it, the token)."""
    found = []
    for row in range(len(rows["decoder_input_tokens"])):
        for place in np.flatnonzero(rows["decoder_loss_weights"][row]):
            begin = place - rows["decoder_positions"][row, place]
            read = rows["decoder_input_tokens"][row, begin : place + 1].tolist()
            seen = rows["decoder_prefix_mask"][row, begin : place + 1].tolist() if prefix else []
            found.append((read, seen, int(rows["decoder_target_tokens"][row, place])))
    return sorted(found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "converter",
    [
        LanguageModel(),
        LanguageModel(inputs=True),
        PrefixLanguageModel(),
        PrefixLanguageModel(loss_on_targets_only=False),
        EncoderDecoder(),
        LanguageModel(weights=True),
    ],
    ids=lambda converter: f"{type(converter).__name__} {converter.task_features}",
)
def test_a_text_that_spells_out_its_start_has_it_once(converter, packed):
    """Rows teach of [BOS, a, b] what they teach of [a, b], whatever stands beside it, and nothing of BOS."""
    weights = {"weights": FeatureInfo("float32", (None,))} if getattr(converter, "weights", False) else {}
    objective = bound(converter, (7,), {"inputs": 9, "targets": 9}, bos=(7,), **weights)
    head = "inputs" if "inputs" in converter.task_features and not isinstance(converter, EncoderDecoder) else "targets"
    plain = [[5, 6], [0, 8, 7, 7], [9]]

    def rows(spelled):
        begins = [[7] if each in spelled else [] for each in range(len(plain))]
        examples = [
            {name: np.array([*(begins[n] if name == head else []), *plain[n - (name != head)]]) for name in LENGTHS}
            | {"weights": np.array([*([0] if begins[n] else []), *[0.5] * len(plain[n])])}
            for n in range(len(plain))
        ]
        kept = (*converter.task_features, *weights)
        return lay(objective, [{name: each[name] for name in kept} for each in examples], packed)

    prefix = isinstance(converter, PrefixLanguageModel)
    for spelled in ({0}, {1, 2}, {0, 1, 2}):
        assert learned(rows(spelled), prefix) == learned(rows(()), prefix)
    if converter.can_predict and head == "inputs":
        prompts = objective.prompts(
            [{"inputs": np.array(ids), "targets": np.array([9])} for ids in ([7, 5, 6], [5, 6])]
        )
        assert prompts["decoder_input_tokens"][:, :4].tolist() == [[7, 5, 6, 0]] * 2
    twice = bound(converter, (7,), {"inputs": 9, "targets": 9}, **weights)  # where 7 is a token like any other
    names = (*converter.task_features, *weights)
    read = lay(twice, [{name: np.array([7, 5]) for name in names}], packed=False)["decoder_input_tokens"]
    assert read[0, :2].tolist() == [7, 7]


def test_an_encoders_decoder_starts_where_the_recipe_says():
    trained = lay(bound(EncoderDecoder(), (5,)), EXAMPLES, packed=False)
    rows = RowFormat(has_encoder=True, start=(5,))
    for name, array in rows.scored(INPUTS, TARGETS, LENGTHS).items():
        np.testing.assert_array_equal(trained[name], array, name)
    for found in (bound(EncoderDecoder(), (5,)).prompts(EXAMPLES), rows.prompts(INPUTS, 5)):
        np.testing.assert_array_equal(found["decoder_input_tokens"], [[5]] * 3)
    text = bound(RandomPrefix(), (5,)).prompts(EXAMPLES)
    np.testing.assert_array_equal(text["decoder_input_tokens"], [[5]] * 3)


@pytest.mark.parametrize(
    ("converter", "start"),
    [(EncoderDecoder(), ()), (LanguageModel(), (1, 2)), (PrefixLanguageModel(), (1, 2)), (RandomPrefix(), ())],
)
def test_starts_that_cannot_be_trained_are_refused(converter, start):
    with pytest.raises(UserError, match="a decoder starts from one id.*CachedData.start"):
        bound(converter, start)


@pytest.mark.parametrize("start", STARTS, ids=str)
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_say_which_targets_carry_loss(start, inputs, packed):
    weights = FeatureInfo("float32", (None,))
    objective = bound(LanguageModel(inputs=inputs, weights=True), start, weights=weights)
    examples = [each | {"weights": np.array([0, *[0.5] * (len(each["targets"]) - 1)])} for each in EXAMPLES]
    rows = lay(objective, [{n: e[n] for n in e if inputs or n != "inputs"} for e in examples], packed=packed)
    assert "decoder_prefix_mask" not in rows
    kept = rows["decoder_loss_weights"] > 0
    assert set(rows["decoder_loss_weights"][kept].tolist()) == {0.5}
    expected = sorted(token for each in TARGETS for token in each[1:])
    assert sorted(rows["decoder_target_tokens"][kept].tolist()) == expected


def test_weights_follow_their_window_and_their_number():
    weights = FeatureInfo("int32", (None,))
    objective = bound(LanguageModel(weights=True, pack=False), (0,), weights=weights)
    tokens = np.arange(10, 20)
    rows = lay(objective, [{"targets": tokens, "weights": tokens % 2}], packed=False)
    np.testing.assert_array_equal(rows["decoder_loss_weights"].sum(), 5)
    assert (rows["decoder_target_tokens"][rows["decoder_loss_weights"] > 0] % 2 == 1).all()
    with pytest.raises(UserError, match="10 targets and 9 weights"):
        objective.convert({"targets": tokens, "weights": tokens[1:]}, 0, 0, 0, 0)
    with pytest.raises(UserError, match="needs a feature 'weights'.*it has none"):
        bound(LanguageModel(weights=True), (0,))


def hugging_face(eos_id, added=(), template=None):
    vocab = {"a": 0, "b": 1} | {token: 2 + n for n, token in enumerate(added)}
    post = None
    if template:
        post = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": template, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {template: {"id": template, "ids": [vocab[template]], "tokens": [template]}},
        }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "decoder", "truncation", "padding"))
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}} | parts
    content |= {"added_tokens": [{"id": vocab[token], "content": token} | flags for token in added]}
    return HuggingFace(json.dumps(content | {"post_processor": post}).encode(), eos_id)


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (Bytes(), ((0,), (1,))),
        (Opaque("letters that end with 256", 257, 256), ((0,), (256,))),
        (Opaque("with a BOS", 257, 256, bos_id=255), ((255,), (256,))),
        (hugging_face(3, ["<s>", "</s>"], template="<s>"), ((2,), (3,))),  # Llama's
        (hugging_face(2, ["<|endoftext|>"]), ((2,), (2,))),  # GPT-2's: id 0 is a letter
        (hugging_face(None), ((), ())),
        (small_vocabularies.vocabulary("SentencePiece"), ((1,), (2,))),
    ],
    ids=str,
)
def test_a_vocabulary_says_where_texts_start_and_end(vocabulary, expected, tmp_path):
    framing = Framing.of(vocabulary)
    assert (framing.start, framing.stop) == expected
    assert framing.bos == (() if isinstance(vocabulary, Opaque) and framing.start == (0,) else framing.start)
    RunDirectory(tmp_path).save_vocabularies({"targets": vocabulary}, framing)
    assert read_framing(tmp_path) == framing
    text = load_text(tmp_path, has_encoder=False)
    assert (text.start, text.stop, text.bos) == (*expected, framing.bos)


def test_a_recipe_may_say_otherwise_and_a_run_keeps_it(tmp_path):
    framing, run = Framing.of(Bytes(), [7], [1, 9]), RunDirectory(tmp_path)
    assert (framing.start, framing.stop) == ((7,), (1, 9))
    run.save_vocabularies({"targets": Bytes()}, framing)
    run.check_vocabularies({"targets": Bytes()}, framing)
    with pytest.raises(UserError, match=r"trained to start from \[7\].*now starts it from \[0\]"):
        run.check_vocabularies({"targets": Bytes()}, Framing.of(Bytes()))
    assert load_text(tmp_path, False).write([100, 101, 9, 102]) == Bytes().decode([100, 101])
    for wrong in ("x", [259], [-1], [True], 1.0):
        with pytest.raises(UserError, match="must be a list of ids below 259"):
            Framing.of(Bytes(), stop_ids=wrong)


@pytest.mark.parametrize(
    ("vocabulary", "stop_ids", "stop"),
    [
        (
            hugging_face(3, ["<|eot|>", "<|im_end|>"]),
            [2],
            (2, 3),
        ),  # a converted model's, and a task that ends otherwise
        (Opaque("letters", 257, 256), [], (256,)),
        (Bytes(), [9, 1], (9, 1)),
        (Bytes(), None, (1,)),
        (hugging_face(None), [1], (1,)),
    ],
    ids=str,
)
def test_what_ends_a_tasks_targets_ends_a_prediction_too(vocabulary, stop_ids, stop):
    """Else a model would be trained to end where no prediction does."""
    assert framing_of({"targets": vocabulary}, None, stop_ids).stop == stop
    assert framing_of({"inputs": vocabulary}, None, stop_ids) is None
