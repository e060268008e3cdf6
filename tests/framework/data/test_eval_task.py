import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tasks_in_memory

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.eval_task import TaskEvaluation, measured_lengths
from meshway.framework.data.features import EncoderDecoder, LanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.rows.examples import AppendEos, First, InMemory, Stepped
from meshway.framework.data.vocabularies import Bytes
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 4, "targets": 4}


def make(examples, metric_fns=(), score_fns=(), aux_fns=(), converter=EncoderDecoder(), lengths=LENGTHS, batch_size=2):
    """An evaluation of a task whose vocabulary hands ids through, with EOS 1."""
    vocabulary = SimpleNamespace(eos_id=1, decode=list)
    feature = SimpleNamespace(vocabulary=vocabulary)
    task = SimpleNamespace(
        name="ids",
        output_features={"inputs": feature, "targets": feature},
        predict_metric_fns=list(metric_fns),
        score_metric_fns=list(score_fns),
        predict_with_aux_metric_fns=list(aux_fns),
        postprocess_fn=lambda output, example, is_target: output,
    )
    objective = converter.bind(tasks_in_memory.task(*converter.task_features), lengths)
    return TaskEvaluation("ids", InMemory(examples), objective, converter, lengths, batch_size, {}, task)


EXAMPLES = [{"inputs": np.array([7, 8]), "targets": np.array([5, 0, 6, 1])}]


def test_predictions_and_targets_end_before_eos():
    task = make(EXAMPLES)
    assert task.target(0) == [5, 0, 6]
    assert task.postprocess(0, np.array([5, 0, 6, 1, 9, 9])) == [5, 0, 6]
    assert task.postprocess(0, np.array([5, 0, 6])) == [5, 0, 6]


def test_scalars_are_what_seqio_gives_which_can_be_keys():
    """The t5 package's metrics of MultiRC and ReCoRD group examples by `idx/question`."""
    task = make([EXAMPLES[0] | {"idx/question": np.array(3, np.int32), "score": np.array(0.5)}])
    task._task.postprocess_fn = lambda output, example, is_target: {example["idx/question"]: example["score"]}
    assert task.postprocess(0, np.array([5])) == task.target(0) == {3: 0.5}
    (example,) = task.read([0])
    assert isinstance(example["idx/question"], np.int32) and isinstance(example["inputs"], np.ndarray)


def test_a_pretokenized_target_is_not_trimmed():
    (example,) = EXAMPLES
    assert make([example | {"targets_pretokenized": b"whole \xc3\xa9"}]).target(0) == "whole é"


def test_more_predictions_than_examples_are_refused():
    with pytest.raises(UserError, match="2 predictions for 1 examples"):
        make(EXAMPLES).metrics([[], []])


def test_score_rows_hold_one_example_each_and_know_which():
    """Training rows of this converter hold several examples; an example's score must be told from its neighbours'."""
    examples = [{"inputs": np.array([i]), "targets": np.array([i, 1])} for i in range(2, 7)]
    task = make(examples, score_fns=[lambda targets, scores: {}])
    assert task.has_score_metrics and not task.has_metrics
    assert task.num_rows == sum(real for _, real in task.batches()) < 5
    batches = list(task.score_batches())
    assert [indices.tolist() for _, indices in batches] == [[0, 1], [2, 3], [4]]
    rows = np.concatenate([batch["decoder_target_tokens"] for batch, _ in batches])
    np.testing.assert_array_equal(rows, [[i, 1, 0, 0] for i in range(2, 7)] + [[0] * 4])
    assert not batches[-1][0]["decoder_loss_weights"][1].any()


def test_the_parts_of_a_split_example_are_rows_of_it_and_one_left_out_has_none():
    def targets(size):
        return {"targets": np.full(size, 5)}

    given = {"score_fns": [lambda targets, scores: {}], "lengths": {"targets": 4}, "batch_size": 4}
    task = make([targets(9), targets(4), targets(2)], converter=LanguageModel(), **given)
    assert np.concatenate([i for _, i in task.score_batches()]).tolist() == [0, 0, 0, 1, 2]
    weights = np.concatenate([batch["decoder_loss_weights"].sum(1) for batch, _ in task.score_batches()])
    assert weights.tolist() == [4, 4, 1, 4, 2, 0, 0, 0]
    skipping = make([targets(9), targets(4)], converter=LanguageModel(overlong="skip"), **given)
    assert np.concatenate([i for _, i in skipping.score_batches()]).tolist() == [1]


def test_each_kind_of_metric_function_gets_what_it_asks_for():
    seen = {}

    def of_predictions(targets, predictions):
        seen["predictions"] = (targets, predictions)
        return {"predicted": 1}

    def of_aux(targets, predictions, aux_values):
        seen["aux"] = (targets, predictions, aux_values["scores"].tolist())
        return {"with_aux": {"inner": 2}}

    def of_scores(targets, scores):
        seen["scores"] = (targets, scores.tolist())
        return {"scored": scores.sum()}

    examples = [{"inputs": np.array([7]), "targets": np.array([i, 1])} for i in (5, 6, 8)]
    task = make(examples, [of_predictions], [of_scores], [of_aux])
    found = task.metrics([[5], [9]], {"scores": [-1.0, -2.0]}, {2: -0.5, 0: -0.25})
    assert found == ({"predicted": 1.0, "with_aux/inner": 2.0, "scored": -0.75}, {}, {})
    assert seen["predictions"] == ([[5], [6]], [[5], [9]]) and seen["aux"] == ([[5], [6]], [[5], [9]], [-1.0, -2.0])
    assert seen["scores"] == ([[5], [8]], [-0.25, -0.5])
    assert task.metrics([[5]]).values == {"predicted": 1.0} and task.metrics(scores={0: -1.0}).values == {"scored": -1}


def test_a_metric_function_that_fails_is_named_and_the_others_are_run():
    def bad(targets, predictions):
        raise ZeroDivisionError("division by zero\nmore")

    def good(targets, predictions):
        return {"good": 1}

    def not_a_mapping(targets, predictions):
        return 3

    task = make(EXAMPLES, [bad, good, not_a_mapping, functools.partial(good)])
    values, failures, _ = task.metrics([[5]])
    assert values == {"good": 1.0}
    assert failures["bad"] == "ZeroDivisionError: division by zero" and "AttributeError" in failures["not_a_mapping"]
    assert failures["good"] == "ValueError: another metric function returns 'good' too"


def test_what_cannot_be_run_is_said():
    def of_predictions(targets, predictions):
        return {}

    task = make([{"targets": np.array([5, 1])}], [of_predictions], converter=LanguageModel(), lengths={"targets": 4})
    assert not task.has_metrics
    assert task.left_out == ["of_predictions: LanguageModel has nothing to predict from"]
    assert make(EXAMPLES, [of_predictions]).left_out == []


@pytest.mark.parametrize("wrong", [-1, 259])
def test_ids_that_the_vocabulary_has_not_are_refused(wrong):
    vocabularies = dict.fromkeys(LENGTHS, Bytes())
    converter = EncoderDecoder()
    examples = [*EXAMPLES, {"inputs": np.array([7]), "targets": np.array([5, wrong])}]
    objective = converter.bind(tasks_in_memory.task(*converter.task_features), LENGTHS)
    task = TaskEvaluation("ids", InMemory(examples), objective, converter, LENGTHS, 2, vocabularies)
    for read in (task.batches, task.score_batches, task.prompt_batches):
        with pytest.raises(UserError, match=f"task 'ids', example 1: feature 'targets' holds the token id {wrong}"):
            list(read())
    assert len(task.read([0, 1])) == 2  # `infer` looks at each record by itself


TOO_LONG = [{"inputs": np.arange(2, 2 + n), "targets": np.array([5, 1])} for n in (2, 9, 4, 5)]


def test_examples_too_long_are_counted_where_they_were_read():
    task = make(TOO_LONG, converter=EncoderDecoder(pack=False))
    assert task.overlong(4, 0) == (2, 0) and task.overlong(0, 4) == (2, 0)
    assert task.overlong(2, 0) == task.overlong(0, 2) == (1, 0) and task.overlong(0, 0) == (0, 0)
    packed = make(TOO_LONG, converter=EncoderDecoder(pack=True))
    assert packed.overlong(packed.num_rows, 0) == (2, 0)
    skipping = make(TOO_LONG, converter=EncoderDecoder(overlong="skip"))
    assert skipping.overlong(skipping.num_rows, 0) == (0, 2) and skipping.overlong(0, 2) == (0, 1)
    windows = make(TOO_LONG, converter=LanguageModel(), lengths={"targets": 1})
    assert windows.overlong(windows.num_rows, 4) == (0, 0), "windows show all of a text"


def test_what_an_eos_after_trimming_costs_is_counted():
    """The step trims before the converter sees the example."""
    steps = [AppendEos({"inputs": 1, "targets": 1}, {"inputs": 1, "targets": 1}, trims=True)]
    objective = EncoderDecoder().bind(tasks_in_memory.task("inputs", "targets"), LENGTHS)
    whole = InMemory([example | {"targets": np.array([5])} for example in TOO_LONG])
    examples = First(Stepped(whole, steps, objective.trims), 3)
    task = TaskEvaluation("ids", examples, objective, EncoderDecoder(), LENGTHS, 2, {})
    assert task.overlong(0, 3) == (2, 0)  # 9 and 4 tokens, each with EOS
    assert measured_lengths([(objective, examples)], {}, LENGTHS) == {"inputs": 16, "targets": 8}


@pytest.mark.parametrize(("longest", "room"), [(1, 8), (8, 8), (9, 16), (100, 104), (130, 144), (1000, 1024)])
def test_the_longest_example_fits_with_at_most_an_eighth_to_spare(longest, room):
    examples = InMemory([{"inputs": np.zeros(longest, int), "targets": np.zeros(1, int)}])
    for policy in ("truncate", "skip", "error"):
        objective = EncoderDecoder(overlong=policy).bind(tasks_in_memory.task("inputs", "targets"), LENGTHS)
        found = measured_lengths([(objective, examples)], {"targets": 3}, LENGTHS)
        assert found == {"inputs": room, "targets": 3} and list(found) == ["inputs", "targets"]


def test_text_in_windows_keeps_the_lengths_of_training():
    objective = LanguageModel().bind(tasks_in_memory.task("targets"), {"targets": 4})
    examples = InMemory([{"targets": np.zeros(100, int)}])
    assert measured_lengths([(objective, examples)], {}, {"targets": 4}) == {"targets": 4}
    spans = SpanCorruption()
    lengths = {"inputs": 32, "targets": 16}
    text = [{"inputs": np.zeros(0, int), "targets": np.zeros(300, int)}]
    pair = [{"inputs": np.zeros(100, int), "targets": np.zeros(5, int)}]
    for examples, room in ((text, lengths), (text + pair, {"inputs": 104, "targets": 16})):
        objective = spans.bind(tasks_in_memory.task("inputs", "targets"), lengths)
        assert measured_lengths([(objective, InMemory(examples))], {}, lengths) == room


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input": 8}, "EVAL_FEATURE_LENGTHS gives a length for 'input', which .* did you mean 'inputs'"),
        ({"inputs": 0}, r"EVAL_FEATURE_LENGTHS\['inputs'\] must be a whole number of tokens, or None"),
        ("longest", "CachedData.eval_lengths .*EVAL_FEATURE_LENGTHS.* is 'longest': tokens by feature, None"),
    ],
)
def test_lengths_that_mean_nothing_are_refused_at_once(given, said):
    with pytest.raises(UserError, match=said):
        CachedData("a_task", LENGTHS, 2, EncoderDecoder(), eval_lengths=given)
