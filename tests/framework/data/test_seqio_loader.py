import subprocess
import sys

import numpy as np
import pytest
from tasks_in_memory import task

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.rows.online_source import BUFFER, StreamedSource
from meshway.framework.data.seqio_loader import SeqioData
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 16, "targets": 12}


def data(name="tiny_a", converter=None, lengths=LENGTHS, batch_size=4, **more):
    return SeqioData(name, lengths, batch_size, converter or EncoderDecoder(), **more)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_mix"])
def test_a_restart_replays_to_where_it_was(seqio, name, capsys):
    whole = data(name, seed=3).train(slice(None))
    batches = take(whole, 8)
    again = data(name, seed=3).train(slice(None))
    again.restore({"batches": 6})
    assert_same(take(again, 2), batches[6:])
    assert again.state() == whole.state() == {"batches": 8}
    assert "a resumed run replays" in capsys.readouterr().err
    with pytest.raises(UserError, match="not one of an uncached stream"):
        again.restore({"rows": 3})


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_each_pass_has_each_example_once_and_draws_anew(seqio, name, num_processes):
    """23 examples, far fewer than seqio's shuffle buffer and ours; those of tiny_a end in a random token."""
    noise = []
    for process in range(num_processes):
        rows = data(name, EncoderDecoder(pack=False), batch_size=num_processes).train(slice(process, process + 1))
        own = len(range(process, 23, num_processes))
        batches = take(rows, 3 * own)
        found = [bytes(row - 3 for row in batch["decoder_target_tokens"][0] if row > 2) for batch in batches]
        passes = [found[begin : begin + own] for begin in range(0, 3 * own, own)]
        assert all(sorted(each) == sorted(passes[0]) and len(set(each)) == own for each in passes)
        assert own < 3 or passes[0] != passes[1] != passes[2]
        inputs = {text: [] for text in passes[0]}
        for text, batch in zip(found, batches):
            inputs[text].append(batch["encoder_input_tokens"][0].tobytes())
        noise += [len(set(each)) for each in inputs.values()]
    assert (np.mean(noise) > 2.5) if name == "tiny_a" else set(noise) == {1}


def test_processes_read_different_examples_and_other_random_numbers(seqio):
    streams = [data(converter=EncoderDecoder(pack=False)).train(rows) for rows in (slice(0, 2), slice(2, 4))]
    seen = []
    for stream in streams:
        batches = take(stream, 6)
        assert all(batch["encoder_input_tokens"].shape == (2, 16) for batch in batches)
        seen.append({tuple(row) for batch in batches for row in batch["decoder_target_tokens"].tolist()})
    assert not seen[0] & seen[1]
    assert streams[0].spec()["encoder_input_tokens"][0] == (4, 16)


@pytest.mark.parametrize(
    ("converter", "lengths"),
    [(EncoderDecoder(), LENGTHS), (LanguageModel(inputs=True), LENGTHS), (PrefixLanguageModel(), LENGTHS),
     (EncoderDecoder(pack=False), LENGTHS), (SpanCorruption(), LENGTHS)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_feature_that_is_empty_in_every_example_is_refused(seqio, converter, lengths):
    """As the cache's reader does; a stream knows it with its first batch."""
    stream = data("tiny_silent", converter, lengths).train(slice(None))
    with pytest.raises(UserError, match="'tiny_silent': 'targets', which .* reads, is empty in every example"):
        next(stream)


def test_inputs_that_are_always_empty_are_none(seqio):
    """T5's text tasks, of which an objective makes inputs; from the cache or streamed."""
    kept = seqio.TaskRegistry.get("tiny_c")
    blank = seqio.map_over_dataset(lambda example: example | {"inputs": ""})
    features = {name: seqio.Feature(seqio.ByteVocabulary(10), add_eos=False) for name in ("inputs", "targets")}
    seqio.TaskRegistry.add("tiny_blank", kept.source, features, [blank, seqio.preprocessors.tokenize])
    batch = next(data("tiny_blank", SpanCorruption()).train(slice(None)))
    assert batch["encoder_segment_ids"].any() and batch["decoder_loss_weights"].any()


def test_what_was_empty_at_first_may_not_fill_later():
    """The rows before would have been others."""
    tokens, none = np.array([4, 5, 6], np.int32), np.zeros(0, np.int32)
    examples = [{"inputs": none, "targets": tokens}] * BUFFER + [{"inputs": tokens, "targets": tokens}] * 8
    objective = lambda empty: EncoderDecoder().bind(task("inputs", "targets"), LENGTHS)  # noqa: E731
    source = StreamedSource("late", iter([*examples, None]), objective(()), False, bind=objective)
    assert source.take(np.arange(BUFFER))[1] == BUFFER
    with pytest.raises(UserError, match="task 'late': 'inputs' was empty in the first examples and is not in later"):
        source.take(np.arange(BUFFER, BUFFER + 1))


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_covers_each_example_once_and_pads_the_last_batch(seqio, pack):
    (task,) = data(converter=EncoderDecoder(pack), batch_size=4).eval_tasks()
    batches = list(task.batches())
    assert task.num_examples == 7 and task.name == "tiny_a"
    assert all(batch["decoder_positions"].shape == (4, 12) for batch, _ in batches)
    tokens = sum(len(f"validation {i}"[-4:]) + 1 for i in range(7))
    assert sum(batch["decoder_loss_weights"].sum() for batch, _ in batches) == tokens
    last, real = batches[-1]
    assert not last["decoder_loss_weights"][real:].any()
    assert_same([batch for batch, _ in task.batches()], [batch for batch, _ in batches])
    fresh = data(converter=EncoderDecoder(pack), seed=99).eval_tasks()[0]
    assert_same([batch for batch, _ in fresh.batches()], [batch for batch, _ in batches])


@pytest.mark.parametrize("converter", [EncoderDecoder(), PrefixLanguageModel()])
def test_prompts_are_in_example_order_and_filled_with_the_last(seqio, converter):
    (task,) = data(converter=converter).eval_tasks()
    batches = list(task.prompt_batches(3))
    assert [indices.tolist() for _, indices in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    for batch, indices in batches:
        for array in batch.values():
            assert len(array) == 3
            for row in range(len(indices), 3):
                np.testing.assert_array_equal(array[row], array[len(indices) - 1])
    vocabulary = seqio.ByteVocabulary()
    key = "encoder_input_tokens" if "encoder_input_tokens" in batches[0][0] else "decoder_input_tokens"
    for batch, indices in batches:
        for row, index in enumerate(indices):
            read = [int(token) for token in batch[key][row] if token]
            assert vocabulary.decode(read).startswith(f"validation {index}")
            assert task.inputs_text(index).startswith(f"validation {index}")


def test_metric_functions_get_what_seqio_s_evaluator_gives_them(seqio):
    """The same tokens and scores through both: targets, predictions, scores and auxiliary values are the same."""
    seen = []

    def of_predictions(targets, predictions):
        seen.append(("predictions", targets, predictions))
        return {"one": 1}

    def of_scores(targets, scores):
        seen.append(("scores", targets, np.asarray(scores).tolist()))
        return {"two": 2}

    def of_aux(targets, predictions, aux_values):
        seen.append(("aux", targets, predictions, {name: np.asarray(v).tolist() for name, v in aux_values.items()}))
        return {"three": 3}

    kept = seqio.TaskRegistry.get("tiny_b")
    functions = [of_scores, of_aux, of_predictions]
    task = seqio.TaskRegistry.add(
        "tiny_kinds", kept.source, kept.output_features, kept.preprocessors, kept.postprocessor, functions
    )
    tokens = [np.array([*map(lambda b: b + 3, b"on %d" % i), 1, 0]) for i in range(7)]
    scores = [-0.5 * i for i in range(7)]
    evaluator = seqio.Evaluator(
        "tiny_kinds", seqio.EncDecFeatureConverter(pack=False), sequence_length=LENGTHS, async_compute_metrics=False
    )
    metrics, _ = evaluator.evaluate(
        compute_metrics=True,
        predict_fn=lambda dataset: list(enumerate(tokens)),
        score_fn=lambda dataset: list(enumerate(scores)),
        predict_with_aux_fn=lambda dataset: (list(enumerate(tokens)), {"scores": scores}),
    )
    theirs = sorted(seen, key=repr)
    seen.clear()
    (mine,) = data("tiny_kinds").eval_tasks()
    predictions = [mine.postprocess(index, row) for index, row in enumerate(tokens)]
    found = mine.metrics(predictions, {"scores": scores}, dict(enumerate(scores)))
    assert sorted(seen, key=repr) == theirs and len(theirs) == 3 == len(task.metric_fns)
    assert found == (dict(metrics.result()["tiny_kinds"]), {})
    assert mine.has_metrics and mine.has_score_metrics and mine.left_out == []


def test_predictions_go_through_the_task_s_own_functions(seqio):
    (task,) = data().eval_tasks()
    assert task.has_metrics
    right = [np.array([*map(lambda b: b + 3, b"on %d" % i), 1, 88, 0]) for i in range(7)]
    predictions = [task.postprocess(index, tokens) for index, tokens in enumerate(right)]
    assert predictions == [task.target(index) for index in range(7)] == [f"on {i}" for i in range(7)]
    assert task.metrics(predictions).values == {"accuracy": 100.0, "scalar": 2.0, "nested/inner": 0.5}
    assert task.metrics(["wrong", *predictions[1:4]]).values["accuracy"] == 75.0
    upper = data("tiny_b").eval_tasks()[0]
    assert upper.target(2) == "ON 2" and upper.postprocess(2, right[2]) == "ON 2"
    assert not upper.has_metrics
    twice = data("tiny_twice").eval_tasks()[0].metrics(predictions)
    assert twice.values["accuracy"] == 100.0
    assert twice.failures == {"accuracy": "ValueError: another metric function returns 'accuracy' too"}


@pytest.mark.parametrize("cached", [False, True])
def test_lengths_of_evaluation_are_those_that_seqio_measures(seqio, tmp_path, cached):
    """Rounded up to multiples of 8. tiny_c ends in append_eos_after_trim: what that trims is counted too."""

    def opened(**more):
        if cached:
            return CachedData("tiny_c", LENGTHS, 4, EncoderDecoder(), cache_dir=str(tmp_path), **more).eval_tasks()[0]
        return data("tiny_c", **more).eval_tasks()[0]

    evaluator = seqio.Evaluator("tiny_c", seqio.EncDecFeatureConverter(pack=False))
    theirs = evaluator.model_feature_shapes
    task = opened(eval_lengths=None)
    assert task.lengths == {
        "inputs": -(-theirs["encoder_input_tokens"][0] // 8) * 8,
        "targets": -(-theirs["decoder_target_tokens"][0] // 8) * 8,
    }
    assert task.lengths != LENGTHS and task.overlong(0, 7) == (0, 0)
    short = opened(eval_lengths={"inputs": 4, "targets": None})
    assert short.lengths == {"inputs": 4, "targets": task.lengths["targets"]} and short.overlong(0, 7) == (7, 0)
    batch, _ = next(short.batches())
    assert batch["encoder_input_tokens"].shape == (4, 4)


def test_a_preprocessor_that_needs_lengths_cannot_be_measured(seqio):
    def halved(dataset, sequence_length):
        return dataset

    kept = seqio.TaskRegistry.get("tiny_b")
    seqio.TaskRegistry.remove("tiny_halved")
    steps = [*kept.preprocessors, halved]
    seqio.TaskRegistry.add("tiny_halved", kept.source, kept.output_features, steps)
    with pytest.raises(UserError, match="its preprocessor '.*halved' needs sequence_length.*give EVAL_FEATURE_LENGTHS"):
        data("tiny_halved", eval_lengths=None).eval_tasks()
    assert data("tiny_halved", eval_lengths={"inputs": 8, "targets": 8}).eval_tasks()


def test_eval_examples_takes_the_first(seqio):
    (task,) = data(eval_examples=3).eval_tasks()
    assert task.num_examples == 3
    assert [task.target(i) for i in range(3)] == ["on 0", "on 1", "on 2"]


def test_a_mixture_is_evaluated_task_by_task(seqio, capsys):
    assert [task.name for task in data("tiny_mix").eval_tasks()] == ["tiny_a", "tiny_b"]
    assert [task.name for task in data("tiny_part").eval_tasks()] == ["tiny_a"]
    assert "evaluation leaves out tiny_train_only: no split 'validation'" in capsys.readouterr().err


def test_vocabularies_include_the_extra_ids(seqio):
    assert {name: found.size for name, found in data().vocabularies().items()} == {"inputs": 269, "targets": 269}
    assert list(data("tiny_lm", LanguageModel(), {"targets": 8}).vocabularies()) == ["targets"]


def test_a_language_model_task_has_neither_prompts_nor_inputs(seqio):
    (task,) = data("tiny_lm", LanguageModel(), {"targets": 8}).eval_tasks()
    assert not task.has_metrics and task.inputs_text(0) == ""
    with pytest.raises(UserError, match="no inputs to predict from"):
        next(task.prompt_batches())


def test_a_missing_evaluation_split_is_an_error_only_when_asked_for(seqio):
    only = data("tiny_train_only")
    next(only.train(slice(None)))
    with pytest.raises(UserError, match="no split 'validation' for evaluation; it has \\['train'\\]"):
        only.eval_tasks()
    with pytest.raises(UserError, match="'validate' for evaluation.*did you mean 'validation'"):
        data(eval_split="validate").eval_tasks()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tiny_aa"}, "registered as 'tiny_aa'.*did you mean 'tiny_a'"),
        ({"module": "no_such_package.tasks"}, "'no_such_package.tasks'.*not found: no 'no_such_package'"),
        ({"train_split": "trian"}, "no split 'trian' for training.*did you mean 'train'"),
        ({"lengths": {"inputs": 4}}, "TASK_FEATURE_LENGTHS lacks 'targets'"),
        (
            {"name": "tiny_broken"},
            "task 'tiny_broken', split 'train': KeyError.*no such field.*conftest",
        ),
        ({"name": "tiny_float"}, "feature 'inputs' has dtype float32 and shape .None, None."),
        ({"name": "tiny_own"}, "mixture 'tiny_own' has a sample_fn of its own"),
        ({"use_cached": True}, "task 'tiny_a' cannot be read with use_cached=True"),
        ({"seed": -1}, "SeqioData.seed must be a whole number of at least 0"),
        ({"batch_size": 0}, "SeqioData.batch_size must be"),
        ({"eval_examples": 0}, "SeqioData.eval_examples must be"),
    ],
)
def test_mistakes_end_in_one_message(seqio, arguments, message):
    with pytest.raises(UserError, match=message):
        next(data(**arguments).train(slice(None)))


def test_a_module_that_fails_is_named_with_the_place(seqio, tmp_path, monkeypatch):
    (tmp_path / "their_tasks.py").write_text("import math\n1 / 0\n")
    (tmp_path / "their_other.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="their_tasks.*ZeroDivisionError.*their_tasks.py:2"):
        data(module="their_tasks").vocabularies()
    with pytest.raises(UserError, match="'their_other'.*fails to import: No module named 'not_installed_anywhere'"):
        data(module=["math", "their_other"]).vocabularies()


def test_tensorflow_comes_in_when_it_is_called_for_and_without_a_word():
    code = """if True:
        import sys
        from meshway.framework.data.seqio_adapter import import_seqio
        assert "tensorflow" not in sys.modules
        import_seqio()
        assert "tensorflow" in sys.modules
        sys.stderr.write("heard")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "heard"


def test_a_text_that_begins_with_its_start_has_it_once(seqio):
    source = data("tiny_spelled", LanguageModel(pack=False), {"targets": 8}, start=[1])
    (task,) = source.eval_tasks()
    for batch in (next(source.train(slice(None))), next(task.batches())[0]):
        assert (batch["decoder_input_tokens"][:, :2] == 1).sum(axis=1).tolist() == [1] * 4
        assert batch["decoder_input_tokens"][:, 0].tolist() == [1] * 4
        assert (batch["decoder_target_tokens"][:, 0] == batch["decoder_input_tokens"][:, 1]).all()
