import contextlib
import functools
import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tasks_in_memory import task

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.rows.online_source import BUFFER, StreamedSource
from meshway.framework.data.seqio_loader import SeqioData
from meshway.framework.data.task_metrics import plain_values
from meshway.framework.errors import UserError
from meshway.framework.telemetry.writers import TensorBoardWriter

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
    assert found == (dict(metrics.result()["tiny_kinds"]), {}, {})
    assert mine.has_metrics and mine.has_score_metrics and mine.left_out == []


def test_metric_objects_find_what_seqio_s_evaluator_finds(seqio):
    """Of each kind of model output; a CollectingMetric, one that a function was made of, and one with a state."""
    import clu.metrics
    import flax

    kinds, metrics = seqio.metrics.ModelOutputType, seqio.metrics

    @flax.struct.dataclass
    class Longest(metrics.Metric):
        model_output_type: kinds = kinds.PREDICTION
        longest: int = 0

        @classmethod
        def from_model_output(cls, inputs, model_output, features, target_field_name="targets", mask=None):
            assert target_field_name in features and len(list(inputs)) == len(model_output)
            return cls(longest=max(int((row > 0).sum()) for row in model_output))

        def merge(self, other):
            return self.replace(longest=max(self.longest, other.longest))

        def compute(self):
            return {"longest": self.longest}

    @flax.struct.dataclass
    class Last(metrics.CollectingMetric):
        model_output_type: kinds = kinds.SCORE_WITH_INTERMEDIATES

        def actual_compute(self, task_dataset_as_numpy, features, target_field_name="targets", cached_targets=None):
            scores, beside = self.values["model_output"]
            # seqio hands these to the next metric in place of its own targets.
            texts = [example["targets_pretokenized"].decode() for example in task_dataset_as_numpy]
            return {"last": scores[-1] + beside["decoder"]["token_scores"][0].sum()}, {"targets": texts}

    def agreement(targets, predictions, aux_values):
        return {"agreement": np.mean([a == b for a, b in zip(targets, predictions)]) + aux_values["scores"].sum()}

    def total(targets, scores):
        return {"total": metrics.Scalar(float(sum(scores)))}

    upper = functools.partial(lambda text, example, is_target: text.upper())
    objects = [
        Longest, Last, metrics.PassthroughLegacyMetric.from_metric_fn(agreement),
        metrics.LegacyMetric.empty(total, upper),
    ]  # fmt: skip
    kept = seqio.TaskRegistry.get("tiny_c")
    functions = list(kept.metric_fns)
    seqio.TaskRegistry.remove("tiny_objects")
    add = functools.partial(seqio.TaskRegistry.add, source=kept.source, output_features=kept.output_features)
    add("tiny_objects", preprocessors=kept.preprocessors, metric_fns=functions, metric_objs=objects)
    tokens = [np.array([*map(lambda b: b + 3, b"on %d" % i), 1, 0]) for i in range(7)]
    scores, beside = [-0.5 * i for i in range(7)], {"decoder": {"token_scores": [[0.25, -float(i)] for i in range(7)]}}
    fns = {
        kinds.PREDICTION: lambda dataset: list(enumerate(tokens)),
        kinds.SCORE: lambda dataset: list(enumerate(scores)),
        kinds.PREDICTION_WITH_AUX: lambda dataset: (list(enumerate(tokens)), {"scores": scores}),
        kinds.SCORE_WITH_INTERMEDIATES: lambda dataset: (
            list(enumerate(scores)),
            {"decoder": {"token_scores": (beside["decoder"]["token_scores"],)}},
        ),
    }
    evaluator = seqio.Evaluator("tiny_objects", seqio.EncDecFeatureConverter(pack=False), async_compute_metrics=False)
    theirs = evaluator.evaluate(compute_metrics=True, model_fns=fns)[0].result()["tiny_objects"]
    (mine,) = data("tiny_objects").eval_tasks()
    assert mine.has_metrics and mine.has_score_metrics and mine.needs_intermediates and mine.left_out == []
    predictions = [mine.postprocess(index, row) for index, row in enumerate(tokens)]
    beside = {"decoder": {"token_scores": (np.array(beside["decoder"]["token_scores"]),)}}
    found = mine.metrics(predictions, {"scores": scores}, dict(enumerate(scores)), np.stack(tokens), beside)
    assert found.failures == {} and {"longest", "last", "agreement", "total", "accuracy"} <= found.values.keys()
    names = ("longest", "last", "agreement", "total", "accuracy")
    assert {name: found.values[name] for name in names} == pytest.approx(
        {name: float(getattr(theirs[name], "value", theirs[name])) for name in names}
    )
    merged = mine.merging()  # Longest has a `merge`; the others are computed of all examples at once
    assert (merged.needs_predictions, merged.needs_tokens, merged.needs_intermediates) == (True, True, True)
    for part in (slice(0, 4), slice(4, 7)):
        merged.predicted(range(7)[part], np.stack(tokens)[part], scores[part])
        merged.scored(range(7)[part], scores[part], None)
    given = (predictions, {"scores": scores}, dict(enumerate(scores)), np.stack(tokens), beside)
    assert mine.metrics(*given, merged=merged) == found
    seqio.TaskRegistry.remove("tiny_objects")
    add("tiny_objects", preprocessors=kept.preprocessors, metric_objs=[clu.metrics.Average])
    (task,) = data("tiny_objects").eval_tasks()
    with pytest.raises(UserError, match="its metric object Average has no model_output_type of seqio.metrics.Model"):
        task.has_metrics  # noqa: B018


def summaries(folder):
    """Returns tag -> (plugin, its content, tensor) of all events in a folder."""
    import tensorflow as tf
    from tensorboardX.proto import event_pb2

    found = {}
    for path in folder.rglob("*tfevents*"):
        for record in tf.data.TFRecordDataset(str(path)):
            for value in event_pb2.Event.FromString(record.numpy()).summary.value:
                tensor = tf.make_tensor_proto(0)
                tensor.ParseFromString(value.tensor.SerializeToString())
                found[value.tag] = value.metadata.plugin_data.plugin_name, tf.make_ndarray(tensor)
    return found


def test_values_besides_numbers_are_what_tensorflow_writes(seqio, tmp_path):
    """Text, Image, Audio, Histogram and Generic; where tensorboard is installed, as seqio's own logger writes them."""
    import tensorflow as tf

    metrics, random = seqio.metrics, np.random.default_rng(0)
    metadata = tf.compat.v1.SummaryMetadata()
    metadata.plugin_data.plugin_name = "scalars"
    images, sounds = random.integers(0, 256, (4, 5, 7, 3), np.uint8), random.uniform(-1, 1, (2, 50, 2))
    values = {
        "text": metrics.Text("# a heading, é"),
        "bytes": metrics.Text(b"plain"),
        "image": metrics.Image(images, max_outputs=2),
        "floats": metrics.Image(random.random((1, 3, 2, 1), np.float32)),
        "audio": metrics.Audio(sounds.astype(np.float32), sample_rate=8000),
        "histogram": metrics.Histogram(np.array([0.0, 1.0, 1.5, 10.0]), bins=10),
        "generic": metrics.Generic(np.float32(1.5), metadata),
    }
    scalars, shown = plain_values(values)
    assert scalars == {} and list(shown) == list(values) and json.loads(json.dumps(shown)) == shown
    with contextlib.closing(TensorBoardWriter(tmp_path / "ours")) as writer:
        writer.write_values(3, {f"eval/{name}": value for name, value in shown.items()})
    ours = summaries(tmp_path / "ours")
    assert {name.removeprefix("eval/"): plugin for name, (plugin, _) in ours.items()} == {
        "text": "text", "bytes": "text", "image": "images", "floats": "images", "audio": "audio",
        "histogram": "histograms", "generic": "scalars",
    }  # fmt: skip
    assert ours["eval/text"][1].item().decode() == "# a heading, é" and ours["eval/bytes"][1].item() == b"plain"
    width, height, *pngs = ours["eval/image"][1]
    assert (width, height) == (b"7", b"5")
    np.testing.assert_array_equal([tf.image.decode_png(each) for each in pngs], images[:2])
    wav, rate = tf.audio.decode_wav(ours["eval/audio"][1][1, 0])
    np.testing.assert_allclose(wav, sounds[1], atol=1 / 32768)
    assert int(rate) == 8000 and ours["eval/generic"][1] == np.float32(1.5)
    rows = ours["eval/histogram"][1]
    assert rows[:, 2].tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1] and rows[1, :2].tolist() == [1.0, 2.0]
    if not importlib.util.find_spec("tensorboard"):
        return
    seqio.TensorBoardLogger(str(tmp_path / "theirs"))("ids", 3, values, None, None, None)
    theirs = summaries(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, (plugin, array) in theirs.items():
        assert (ours[name][0], ours[name][1].shape) == (plugin, array.shape)
        if plugin == "images":  # compressed otherwise
            pairs = zip(ours[name][1][2:], array[2:], strict=True)
            assert all(np.array_equal(tf.image.decode_png(one), tf.image.decode_png(other)) for one, other in pairs)
        elif plugin == "histograms":
            np.testing.assert_allclose(ours[name][1], array, rtol=1e-6)
        else:
            assert ours[name][1].tolist() == array.tolist(), name


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"image": np.zeros((2, 2, 3))}, r"an Image has shape \(2, 2, 3\), not"),
        ({"audiodata": np.zeros(5)}, r"an Audio has shape \(5,\), not"),
        ({"textdata": 3}, "a seqio Text is int, not str"),
        ({"tensor": np.array(["a"]), "metadata": None}, "tensor of a Generic is <U1, not numbers"),
    ],
)
def test_values_that_are_not_what_they_say_are_told(value, said):
    with pytest.raises(ValueError, match=f"f1: .*{said}"):
        plain_values({"f1": SimpleNamespace(**value)})


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
    assert read_whole(task) is None, "nothing is trimmed, so nothing is read a second time to see what was"
    short = opened(eval_lengths={"inputs": 4, "targets": None})
    assert short.lengths == {"inputs": 4, "targets": task.lengths["targets"]} and short.overlong(0, 7) == (7, 0)
    batch, _ = next(short.batches())
    assert batch["encoder_input_tokens"].shape == (4, 4)


def read_whole(task):
    """What reads a task's examples once more, untrimmed, where they are read with TensorFlow."""
    return getattr(task._examples, "_read_whole", None)


def test_directories_of_caches_that_nothing_reads_are_refused(seqio):
    with pytest.raises(
        UserError, match="seqio_cache_dirs .SEQIO_CACHE_DIRS. is 'here', .* SeqioData.use_cached = True"
    ):
        data("tiny_a", seqio_cache_dirs="here")


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
