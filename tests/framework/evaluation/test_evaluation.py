import itertools
import json
import types

import bigram_table
import jax
import numpy as np
import pytest
import tiny

from meshway.framework.data.features import LanguageModel, PrefixLanguageModel
from meshway.framework.errors import UserError
from meshway.framework.evaluation.evaluation import Evaluation, Evaluator, TaskResult
from meshway.framework.evaluation.records import Records
from meshway.framework.evaluation.schedule import evaluated
from meshway.framework.inference.sampling import Sampling
from meshway.framework.telemetry.profiler import Compilations

EXAMPLES = [([2 + i, 3], [*range(4, 5 + i % 3), 1]) for i in range(6)]
KINDS = ("predict_metric_fns", "score_metric_fns", "predict_with_aux_metric_fns")


@pytest.fixture(scope="module")
def params():
    return bigram_table.BigramTable().init(jax.random.key(3))


def evaluate(params, *tasks, data=1, **settings):
    settings = Evaluation(**{"max_predictions": None} | settings)
    return evaluated(Evaluator(bigram_table.sharded(data), tasks, settings), params)


def log_prob(params, inputs, targets):
    """The log-probability of targets after inputs, in numpy."""
    table = np.asarray(params["table"], np.float64)
    table = table - np.log(np.exp(table).sum(1, keepdims=True))
    sequence = [0, *inputs, *targets]
    pairs = list(itertools.pairwise(sequence))[-len(targets) :]
    return sum(table[pair] for pair in pairs)


def greedy(params, inputs):
    """What greedy search says after inputs, before EOS, in numpy."""
    table, found = np.asarray(params["table"]), [inputs[-1]]
    for _ in range(bigram_table.LENGTHS["targets"]):
        found.append(int(table[found[-1]].argmax()))
        if found[-1] == 1:
            break
    return [token for token in found[1:] if token != 1]


def recorders():
    """Metric functions of each kind, and what they were given."""
    seen = {}

    def of_predictions(targets, predictions):
        seen["predictions"] = (targets, predictions)
        return {"count": len(predictions)}

    def of_scores(targets, scores):
        seen["scores"] = (targets, scores)
        return {"scored": len(scores)}

    def of_aux(targets, predictions, aux_values):
        seen["aux"] = aux_values["scores"]
        return {"aux": len(predictions)}

    return seen, dict(zip(KINDS, ([of_predictions], [of_scores], [of_aux])))


@pytest.mark.parametrize(("data", "pack"), [(1, True), (1, False), (4, False)])
def test_what_is_found_is_what_a_hand_counts(params, data, pack):
    """Six examples in batches of four: the last batch is padded, and padding counts nowhere."""
    seen, functions = recorders()
    task = bigram_table.task(EXAMPLES, PrefixLanguageModel(pack=pack), **functions)
    scalars, reports = evaluate(params, task, data=data)
    report = reports["ids"]
    scores = [log_prob(params, *example) for example in EXAMPLES]
    tokens = sum(len(targets) for _, targets in EXAMPLES)
    assert report["counts"] == {
        "rows": task.num_rows if pack else 6,
        "tokens": tokens,
        "predictions": 6,
        "scores": 6,
        "truncated": 0,
    }
    assert pack == (task.num_rows < 6)
    assert report["metrics"]["loss"] == pytest.approx(-sum(scores) / tokens, rel=1e-5)
    assert scalars["validation/loss"] == scalars["validation/ids/loss"] == report["metrics"]["loss"]
    assert {name: report["metrics"][name] for name in ("count", "scored", "aux")} == {"count": 6, "scored": 6, "aux": 6}
    targets = [example[1][:-1] for example in EXAMPLES]
    assert seen["predictions"] == (targets, [greedy(params, inputs) for inputs, _ in EXAMPLES])
    assert seen["scores"][0] == targets
    np.testing.assert_allclose(seen["scores"][1], scores, rtol=1e-5)
    ended = [[*greedy(params, inputs), 1][: bigram_table.LENGTHS["targets"]] for inputs, _ in EXAMPLES]
    np.testing.assert_allclose(
        seen["aux"], [log_prob(params, e[0], p) for e, p in zip(EXAMPLES, ended, strict=True)], rtol=1e-5
    )
    assert report["predictions"][0] == {
        "input": str(EXAMPLES[0][0]),
        "target": str(targets[0]),
        "prediction": str(seen["predictions"][1][0]),
    }


def test_the_score_of_a_split_example_is_that_of_all_its_parts(params):
    seen, functions = recorders()
    lengths = {"targets": 4}
    long, short = [5, 6, 7, 8, 9, 10, 1], [3, 1]
    task = bigram_table.task(
        [([], long), ([], short)], LanguageModel(), lengths=lengths, score_metric_fns=functions["score_metric_fns"]
    )
    report = evaluate(params, task)[1]["ids"]
    windows = log_prob(params, [], long[:4]) + log_prob(params, [], long[4:])
    np.testing.assert_allclose(seen["scores"][1], [windows, log_prob(params, [], short)], rtol=1e-5)
    assert report["counts"]["scores"] == 2 and report["counts"]["tokens"] == 9


def test_examples_that_are_truncated_are_counted_and_said(params):
    short, long = bigram_table.task(EXAMPLES), bigram_table.task([*EXAMPLES, ([2] * 9, [3, 1])], name="long")
    results = Evaluator(bigram_table.sharded(), [short, long], Evaluation()).results(params)
    (report, note), (longer, said) = [(result.report, result.note) for result in results]
    assert report["counts"]["truncated"] == 0 and not note
    assert longer["counts"]["truncated"] == 1
    lengths = "{'inputs': 3, 'targets': 7}"
    assert said == f"long: 1 example was truncated, longer than {lengths}; EVAL_FEATURE_LENGTHS=None has room for all"


def test_each_task_has_lengths_and_batches_of_its_own(params):
    """What is found does not hang on them."""
    functions = recorders()[1]
    other = {"batch_size": 2, "lengths": {"inputs": 8, "targets": 16}}
    tasks = [bigram_table.task(EXAMPLES, **functions), bigram_table.task(EXAMPLES, name="other", **other, **functions)]
    reports = evaluate(params, *tasks)[1]
    assert reports["ids"]["metrics"] == pytest.approx(reports["other"]["metrics"], rel=1e-6)


def test_a_bound_on_predictions_bounds_scores_too(params):
    seen, functions = recorders()
    counts = evaluate(params, bigram_table.task(EXAMPLES, **functions), max_predictions=5)[1]["ids"]["counts"]
    assert (counts["predictions"], counts["scores"]) == (5, 5) and counts["tokens"] == sum(len(t) for _, t in EXAMPLES)
    assert len(seen["scores"][0]) == len(seen["predictions"][0]) == 5
    report = evaluate(params, bigram_table.task(EXAMPLES, **functions), max_predictions=0)[1]["ids"]
    assert "predictions" not in report["counts"] and "count" not in report["metrics"]


def test_what_fails_in_one_task_stops_nothing_else(params):
    def bad(targets, predictions):
        raise ZeroDivisionError("no predictions")

    def broken(output, example, is_target):
        if not is_target and example["inputs"][0] == 5:
            raise KeyError("label")
        return output

    def broken_target(output, example, is_target):
        return {}["label"] if is_target else output

    _, functions = recorders()
    functions["predict_metric_fns"] = [bad, *functions["predict_metric_fns"]]
    tasks = [
        bigram_table.task(EXAMPLES, name="bad", **functions),
        bigram_table.task(EXAMPLES, name="broken", postprocess=broken, **functions),
        bigram_table.task(EXAMPLES, name="target", postprocess=broken_target, **functions),
        bigram_table.task(EXAMPLES, name="good", **recorders()[1]),
    ]
    _, reports = evaluate(params, *tasks)
    assert reports["bad"]["failed"] == {"bad": "ZeroDivisionError: no predictions"}
    assert {"count": 6.0, "scored": 6.0, "aux": 6.0}.items() <= reports["bad"]["metrics"].items()
    assert reports["broken"]["failed"] == {"postprocess_fn": "on example 3: KeyError: 'label'"}
    assert reports["broken"]["metrics"]["scored"] == 6 and "count" not in reports["broken"]["metrics"]
    assert reports["target"]["failed"]["postprocess_fn"].endswith("KeyError: 'label'")
    assert "failed" not in reports["good"] and reports["good"]["metrics"]["count"] == 6
    assert {report["metrics"]["loss"] for report in reports.values()} == {reports["good"]["metrics"]["loss"]}


def test_progress_is_told_to_the_last_example(params):
    told = []
    task = bigram_table.task(EXAMPLES, PrefixLanguageModel(pack=False), **recorders()[1])
    evaluator = Evaluator(bigram_table.sharded(), [task], Evaluation(max_predictions=5))
    list(evaluator.results(params, lambda *what: told.append(what)))
    assert [what[2:] for what in told if what[1] == "loss"] == [(4, 6), (6, 6)]
    for what in ("predictions", "scores"):
        assert [each[2:] for each in told if each[1] == what] == [(4, 5), (5, 5)]


def test_the_loss_of_all_tasks_is_over_their_tokens():
    results = [
        TaskResult("long", {"metrics": {}}, np.array([60.0, 30.0])),
        TaskResult("short", {"metrics": {}}, np.array([5.0, 1.0])),
    ]
    scalars, reports = evaluated(types.SimpleNamespace(results=lambda params: results), {})
    assert scalars == {"validation/loss": 65 / 31} and list(reports) == ["long", "short"]


def test_the_likeliest_of_several_predictions_counts(params):
    """It is told with its own score: the log-probability of what it predicts, its end included."""
    seen, functions = recorders()
    task = bigram_table.task(EXAMPLES, PrefixLanguageModel(), **functions)
    evaluate(params, task, decoder=Sampling(temperature=1.0, num_decodes=4))
    ended = [[*prediction, 1][: bigram_table.LENGTHS["targets"]] for prediction in seen["predictions"][1]]
    found = [log_prob(params, example[0], tokens) for example, tokens in zip(EXAMPLES, ended, strict=True)]
    np.testing.assert_allclose(seen["aux"], found, rtol=1e-5)


def test_nothing_is_dropped(params, monkeypatch):
    loss, keys = bigram_table.BigramTable.loss, []

    def with_key(self, params, batch, rng):
        keys.append(rng)
        return loss(self, params, batch, rng)

    monkeypatch.setattr(bigram_table.BigramTable, "loss", with_key)
    evaluate(params, bigram_table.task(EXAMPLES, PrefixLanguageModel()), max_predictions=0)
    assert keys and all(key is None for key in keys)


@pytest.mark.parametrize("stop_ids", [(), (5,), (6, 9, 3), None], ids=str)
def test_a_prediction_ends_at_any_stop_id_of_its_task(params, stop_ids):
    """Id 1 ends nothing by itself: a task's vocabulary (here its EOS is 1) or its recipe says what does."""
    seen, functions = recorders()
    task = bigram_table.task(EXAMPLES, stop_ids=stop_ids, **functions)
    evaluate(params, task)
    table, ends = np.asarray(params["table"]), (1,) if stop_ids is None else stop_ids
    for (inputs, _), found in zip(EXAMPLES, seen["predictions"][1], strict=True):
        expected, last = [], inputs[-1]
        for _ in range(bigram_table.LENGTHS["targets"]):
            last = int(table[last].argmax())
            if last in ends:
                break
            expected.append(last)
        expected = expected[: expected.index(1)] if 1 in expected else expected  # as the vocabulary decodes
        assert list(found) == expected


def test_a_model_that_does_not_decode_is_told_so_at_once_where_tasks_have_metrics_of_predictions(params, monkeypatch):
    monkeypatch.delattr(bigram_table.BigramTable, "prefill")
    _, functions = recorders()
    task = bigram_table.task(EXAMPLES, **functions)
    with pytest.raises(UserError, match=r"BigramTable does not decode.* no method prefill .*max_predictions to 0"):
        Evaluator(bigram_table.sharded(), [task], Evaluation())
    assert evaluate(params, task, max_predictions=0)[1]["ids"]["counts"]["rows"]
    assert evaluate(params, bigram_table.task(EXAMPLES))[1]["ids"]["counts"]["rows"]


def test_metrics_get_all_decodes_of_an_example_the_likeliest_last(params):
    seen, functions = recorders()
    task = bigram_table.task(EXAMPLES, postprocess=lambda output, example, is_target: output, **functions)
    decoder = Sampling(temperature=1.0, num_decodes=3)
    evaluate(params, task, decoder=decoder, all_decodes=True)
    every, scores = seen["predictions"][1], np.array(seen["aux"])
    assert all(len(decodes) == 3 for decodes in every) and scores.shape == (len(EXAMPLES), 3)
    assert (np.diff(scores, axis=1) >= 0).all()
    for (inputs, _), decodes, row in zip(EXAMPLES, every, scores):
        ended = [[*tokens, 1][: bigram_table.LENGTHS["targets"]] for tokens in decodes]
        np.testing.assert_allclose([log_prob(params, inputs, tokens) for tokens in ended], row, rtol=1e-5)
    evaluate(params, task, decoder=decoder)
    assert seen["predictions"][1] == [decodes[-1] for decodes in every]


def test_a_prediction_goes_on_from_its_target_where_that_is_the_prompt(params):
    seen, functions = recorders()
    examples = [([2], [4, 6, 1]), ([3], [1]), ([5], [7, 8, 9, 10, 11, 2, 3, 1])]  # the last is longer than fits
    evaluate(params, bigram_table.task(examples, **functions), prompt_with_targets=True)
    first, second, third = seen["predictions"][1]
    assert first == [4, 6, *greedy(params, [6])][: len(first)] and len(first) >= 2
    assert second == greedy(params, [3]) and third == [7, 8, 9, 10, 11, 2, 3]


def test_metrics_of_scores_get_what_was_computed_beside_them(params):
    seen = {}

    def of_scores(targets, scores):
        seen["scores"] = scores
        return {"scored": len(targets)}

    task = bigram_table.task(EXAMPLES, score_metric_fns=[of_scores])
    evaluate(params, task)
    plain = seen["scores"]
    evaluate(params, task, return_intermediates=True)
    scores, beside = seen["scores"]
    np.testing.assert_array_equal(scores, plain)
    (tokens,), (weights,), (ids,) = (beside["decoder"][n] for n in ("token_scores", "loss_weights", "target_tokens"))
    np.testing.assert_allclose((tokens * weights).sum(1), scores, rtol=1e-6)
    assert [row[mask > 0].tolist() for row, mask in zip(ids, weights)] == [targets for _, targets in EXAMPLES]


def metric_objects(merge):
    """A metric object of each kind of model output, which adds up what it is given; and how many examples at a time."""
    seen = []

    class Total:
        def __init__(self, total):
            self.total = total

        @classmethod
        def from_model_output(cls, inputs, model_output, features, target_field_name):
            kind = cls.model_output_type
            seen.append((kind, [len(example[target_field_name]) for example in inputs]))
            values, beside = model_output if kind > 2 else (model_output, {"scores": np.zeros(len(inputs))})
            assert len(values) == len(inputs)
            beside = beside["scores"] if "scores" in beside else beside["decoder"]["token_scores"][0]
            return cls(float(np.sum(values)) + 2 * float(np.sum(beside)))

        def compute(self):
            return {type(self).__name__: self.total}

    if merge:
        Total.merge = merge
    names = {1: "predicted", 2: "scored", 3: "with_aux", 4: "with_intermediates"}
    return seen, [type(name, (Total,), {"model_output_type": kind}) for kind, name in names.items()]


@pytest.mark.parametrize("settings", [{}, {"max_predictions": 5}, {"max_predictions": 0}], ids=str)
def test_metric_objects_are_merged_batch_by_batch_and_nothing_else_of_a_batch_is_kept(params, settings, monkeypatch):
    """They find what they find of all examples at once, of an example in several rows too, which batches divide."""
    lengths = {"targets": 4}
    examples = [([], target) for target in ([2, 3, 1], [5, 6, 7, 8, 9, 10, 5, 6, 7, 1], [3, 4, 1], [4, 1], [8, 1], [1])]
    found, counts, real = {}, {}, bigram_table.TaskEvaluation.metrics
    for merges in (False, True):
        merge = (lambda self, other: type(self)(self.total + other.total)) if merges else None
        seen, objects = metric_objects(merge)
        of_scores = bigram_table.task(
            examples, LanguageModel(), batch_size=2, lengths=lengths, metric_objs=[objects[1], objects[3]]
        )
        of_predictions = bigram_table.task(EXAMPLES, metric_objs=[objects[0], objects[2]], name="predicted")
        given = []

        def metrics(self, given=given, **all_at_once):
            given.append(all_at_once)
            return real(self, **all_at_once)

        monkeypatch.setattr(bigram_table.TaskEvaluation, "metrics", metrics)
        reports = evaluate(params, of_scores, of_predictions, **settings)[1]
        found[merges] = {name: value for report in reports.values() for name, value in report["metrics"].items()}
        counts[merges] = [report["counts"] for report in reports.values()]
        assert not any("failed" in report for report in reports.values())
        for each in given if merges else ():
            assert [each.get(name) for name in ("predictions", "tokens", "intermediates")] == [None] * 3
    if settings.get("max_predictions") != 0:
        count = settings.get("max_predictions", 6)
        sizes = [len(target) for _, target in examples][:count]
        assert len(found[True]) == 5
        assert sum((lengths for kind, lengths in seen if kind == 2), []) == sizes
        assert [len(lengths) for kind, lengths in seen if kind == 1] == [4, count - 4]
    assert found[True] == pytest.approx(found[False]) and counts[True] == counts[False]


def test_a_metric_object_that_cannot_be_merged_is_named(params):
    def merge(self, other):
        raise ValueError("of other shapes")

    _, objects = metric_objects(merge)
    report = evaluate(params, bigram_table.task(EXAMPLES, metric_objs=objects[:2]))[1]["ids"]
    assert report["failed"] == dict.fromkeys(("predicted", "scored"), "ValueError: of other shapes")


def test_all_predictions_of_a_task_are_kept_on_request(params, tmp_path):
    _, functions = recorders()
    task = bigram_table.task(EXAMPLES, **functions)
    report = evaluate(params, task, num_samples=2)[1]["ids"]
    kept = evaluate(params, task, num_samples=2, keep_predictions=True)[1]["ids"]
    assert "kept" not in report and kept["predictions"] == report["predictions"] and len(kept["predictions"]) == 2
    records = Records(tmp_path)
    records.add(5, {"ids": kept})
    lines = [json.loads(line) for line in (tmp_path / "ids.predictions" / "5.jsonl").read_text().splitlines()]
    assert [line["example"] for line in lines] == list(range(6)) and "kept" not in records.read("ids")[5]
    assert [eval(line["prediction"]) for line in lines] == [greedy(params, inputs) for inputs, _ in EXAMPLES]
    assert lines[0]["input"] == report["predictions"][0]["input"] and lines[0]["score"] < 0
    records.keep_up_to(4)
    assert not list((tmp_path / "ids.predictions").iterdir())


@pytest.mark.slow
def test_predictions_read_weights_by_layer_and_nothing_is_compiled_again():
    """Losses and scores read them as they are stored; those that the run goes on with stay."""
    made = tiny.program(
        "lm", "NUM_LAYERS=3", "D_MODEL=96", "D_FF=160", "objectives.DecoderOnly.prefix=True", layout="model_1d"
    )
    params, seen = made.init().params, {}
    _, functions = recorders()

    def found(**settings):
        kept = []
        own = {"predict_metric_fns": [lambda targets, predictions: kept.append(predictions) or {"count": 1.0}]}
        task = bigram_table.task(EXAMPLES, PrefixLanguageModel(), **functions | own)
        evaluator = Evaluator(made.sharded, [task], Evaluation(max_predictions=None, **settings))
        scalars, _ = evaluated(evaluator, params)
        (program,) = evaluator._decoding[task.batch_size]._programs.values()
        seen[bool(settings)] = program.compiled.memory_analysis().temp_size_in_bytes
        return evaluator, scalars, kept

    _, *wanted = found(by_layer=False)
    evaluator, *whole = found()
    assert whole == wanted
    assert seen[False] + 4 * 96 * 160 / 4 < seen[True]  # no copy of a layer's kernel, a quarter of it a device
    others = jax.tree.map(lambda leaf: leaf * 2, params)
    with Compilations() as compilations:
        assert evaluated(evaluator, params)[0] == whole[0] != evaluated(evaluator, others)[0]
    assert compilations.count == 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
