import functools
import subprocess
import sys

import numpy as np
import pytest

from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.seqio_loader import SeqioData, import_seqio
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 16, "targets": 12}


def texts(split, shuffle_files, seed=None):
    import tensorflow as tf

    count = {"train": 23, "validation": 7}[split]
    inputs = [f"{split} {i}" for i in range(count)]
    return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": [text[-4:] for text in inputs]})


@pytest.fixture(scope="module")
def seqio():
    """Tiny tasks over bytes, registered for this module's tests and removed after them."""
    seqio = import_seqio()
    import tensorflow as tf

    @seqio.map_over_dataset(num_seeds=1)
    def add_noise(example, seed):
        noise = tf.random.stateless_uniform([1], seed, 3, 200, tf.int32)
        return example | {"inputs": tf.concat([example["inputs"], noise], axis=0)}

    def crash(dataset):
        raise KeyError("no such field")

    vocabulary = seqio.ByteVocabulary(10)
    feature = seqio.Feature(vocabulary, add_eos=True)
    steps = [seqio.preprocessors.tokenize, add_noise, seqio.preprocessors.append_eos]
    features = {"inputs": feature, "targets": feature}

    def add(name, splits=("train", "validation"), preprocessors=steps, **more):
        source = seqio.FunctionDataSource(texts, splits=splits)
        more = {"output_features": features, "metric_fns": [accuracy, kinds]} | more
        seqio.TaskRegistry.add(name, source, preprocessors=preprocessors, **more)

    add("tiny_a")
    add("tiny_b", postprocess_fn=lambda text, example, is_target: text.upper(), metric_fns=[])
    add("tiny_train_only", splits=("train",))
    add("tiny_broken", preprocessors=[crash])
    add("tiny_twice", metric_fns=[accuracy, accuracy])
    lm_steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    add("tiny_lm", preprocessors=lm_steps, output_features={"targets": feature}, metric_fns=[])
    add("tiny_float", output_features=features | {"inputs": seqio.ContinuousFeature(dtype=tf.float32, rank=2)})
    seqio.MixtureRegistry.add("tiny_mix", [("tiny_a", 1), ("tiny_b", 3)])
    seqio.MixtureRegistry.add("tiny_part", ["tiny_a", "tiny_train_only"], default_rate=1.0)
    own = functools.partial(lambda datasets, rates, seed: datasets[0])
    seqio.MixtureRegistry.add("tiny_own", ["tiny_a"], default_rate=1.0, sample_fn=own)
    yield seqio
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        for name in [name for name in registry.names() if name.startswith("tiny_")]:
            registry.remove(name)


def accuracy(targets, predictions):
    return {"accuracy": 100.0 * np.mean([t == p for t, p in zip(targets, predictions, strict=True)])}


def kinds(targets, predictions):
    import seqio

    return {
        "scalar": seqio.metrics.Scalar(2),
        "nested": {"inner": np.float32(0.5)},
        "text": seqio.metrics.Text("left out"),
        "array": np.ones(3),
    }


def data(name="tiny_a", converter=None, lengths=LENGTHS, batch_size=4, **more):
    return SeqioData(name, lengths, batch_size, converter or EncoderDecoder(), **more)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_mix"])
def test_a_stream_is_the_same_each_time_and_after_any_restart(seqio, name):
    whole = data(name, seed=3).train(slice(None))
    batches, states = [], [whole.state()]
    for _ in range(8):
        batches.append(next(whole))
        states.append(whole.state())
    assert_same(take(data(name, seed=3).train(slice(None)), 5), batches[:5])
    again = data(name, seed=3).train(slice(None))
    for at in (7, 2):
        again.restore(states[at])
        assert_same([next(again)], [batches[at]])
    other = take(data(name, seed=4).train(slice(None)), 1)
    assert not np.array_equal(other[0]["encoder_input_tokens"], batches[0]["encoder_input_tokens"])


def test_an_epoch_holds_every_example_and_fresh_randomness(seqio):
    epochs = []
    stream = data(converter=EncoderDecoder(pack=False), batch_size=23).train(slice(None))
    vocabulary = seqio.TaskRegistry.get("tiny_a").output_features["targets"].vocabulary
    for batch in take(stream, 3):
        targets = sorted(vocabulary.decode(row.tolist()) for row in batch["decoder_target_tokens"])
        assert targets == sorted(f"train {i}"[-4:] for i in range(23))
        epochs.append(sorted(map(tuple, batch["encoder_input_tokens"].tolist())))
    assert epochs[0] != epochs[1] != epochs[2]


def test_slices_of_two_processes_join_to_the_batch(seqio):
    whole = take(data("tiny_mix").train(slice(None)), 5)
    halves = [take(data("tiny_mix").train(rows), 5) for rows in (slice(0, 2), slice(2, 4))]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, whole)


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


def test_predictions_go_through_the_task_s_own_functions(seqio):
    (task,) = data().eval_tasks()
    assert task.has_metrics
    right = [np.array([*map(lambda b: b + 3, b"on %d" % i), 1, 88, 0]) for i in range(7)]
    predictions = [task.postprocess(index, tokens) for index, tokens in enumerate(right)]
    assert predictions == [task.target(index) for index in range(7)] == [f"on {i}" for i in range(7)]
    assert task.metrics(predictions) == {"accuracy": 100.0, "scalar": 2.0, "nested/inner": 0.5}
    assert task.metrics(["wrong", *predictions[1:4]])["accuracy"] == 75.0
    upper = data("tiny_b").eval_tasks()[0]
    assert upper.target(2) == "ON 2" and upper.postprocess(2, right[2]) == "ON 2"
    assert not upper.has_metrics
    with pytest.raises(UserError, match="two metric functions return 'accuracy'"):
        data("tiny_twice").eval_tasks()[0].metrics(predictions)


def test_eval_examples_takes_the_first(seqio):
    (task,) = data(eval_examples=3).eval_tasks()
    assert task.num_examples == 3
    assert [task.target(i) for i in range(3)] == ["on 0", "on 1", "on 2"]


def test_a_mixture_is_evaluated_task_by_task(seqio, capsys):
    assert [task.name for task in data("tiny_mix").eval_tasks()] == ["tiny_a", "tiny_b"]
    assert [task.name for task in data("tiny_part").eval_tasks()] == ["tiny_a"]
    assert "evaluation leaves out tiny_train_only: no split 'validation'" in capsys.readouterr().err


def test_vocabularies_include_the_extra_ids(seqio):
    assert data().vocabularies() == {"inputs": 269, "targets": 269}
    assert data("tiny_lm", LanguageModel(), {"targets": 8}).vocabularies() == {"targets": 269}


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
            "task 'tiny_broken', split 'train': KeyError.*no such field.*test_seqio_loader",
        ),
        ({"name": "tiny_float"}, "feature 'inputs' has rank 2 and dtype float32"),
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
        from meshway.framework.data.seqio_loader import import_seqio
        assert "tensorflow" not in sys.modules
        import_seqio()
        assert "tensorflow" in sys.modules
        sys.stderr.write("heard")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "heard"
