import numpy as np
import pytest

from meshway.framework.data.seqio_adapter import import_seqio

seqio = import_seqio()
import tensorflow as tf  # noqa: E402

from meshway.tasks import preprocessors  # noqa: E402

VOCABULARY = seqio.ByteVocabulary(60)
TEXTS = ["A first document, of some length: " + "words and more words. " * 9, "Short.", "", "The third. " * 5]
FEATURES = {name: seqio.Feature(VOCABULARY, add_eos=True) for name in ("inputs", "targets")}


def run(preprocessor, lengths, features=FEATURES, seed=1, end="\n", **options):
    dataset = preprocessors.tokenize_text(tf.data.Dataset.from_tensor_slices({"text": TEXTS}), features, end)
    with seqio.utils.map_seed_manager(seed):
        dataset = preprocessor(dataset, lengths, features, **options)
    return [{name: value.tolist() for name, value in item.items()} for item in dataset.as_numpy_iterator()]


def joined():
    return VOCABULARY.encode("".join(text + "\n" for text in TEXTS))


def splice(inputs, targets):
    """Puts each span of `targets` in the place of its sentinel in `inputs`."""
    spans, result = {}, []
    for token in targets:
        if token >= 259:
            current = spans[token] = []
        else:
            current.append(token)
    for token in inputs:
        result += spans.pop(token) if token >= 259 else [token]
    assert not spans
    return result


@pytest.mark.parametrize(
    "lengths", [{"inputs": 40, "targets": 20}, {"inputs": 40, "targets": 7}, {"inputs": 3, "targets": 3}]
)
def test_splicing_the_spans_back_restores_the_text(lengths):
    examples = run(preprocessors.span_corruption, lengths)
    restored = []
    for example in examples:
        assert example["inputs"][-1] == example["targets"][-1] == 1
        assert len(example["inputs"]) <= lengths["inputs"] and len(example["targets"]) <= lengths["targets"]
        sentinels = [token for token in example["inputs"] if token >= 259]
        assert sentinels == list(range(318, 318 - len(sentinels), -1))
        assert sentinels == [token for token in example["targets"] if token >= 259]
        restored += splice(example["inputs"][:-1], example["targets"][:-1])
    assert restored == joined()


def test_corruption_is_a_function_of_the_seed():
    lengths = {"inputs": 40, "targets": 20}
    assert run(preprocessors.span_corruption, lengths) == run(preprocessors.span_corruption, lengths)
    assert run(preprocessors.span_corruption, lengths) != run(preprocessors.span_corruption, lengths, seed=2)


def test_density_mean_span_and_filling_are_t5_s():
    window = preprocessors.corruption_window(511, 10_000, 0.15, 3.0)
    noise, spans = preprocessors.noise_counts(window, 0.15, 3.0)
    assert (window, noise + spans + 1) == (568, 114)  # the published figures for inputs of 512
    for inputs in range(10, 300):
        window = preprocessors.corruption_window(inputs, 10_000, 0.15, 3.0)
        noise, spans = preprocessors.noise_counts(window, 0.15, 3.0)
        assert inputs - 2 <= window - noise + spans <= inputs


def test_runs_are_random_compositions():
    totals, parts = tf.fill([600], 5), tf.fill([600], 3)
    runs = preprocessors._random_parts(totals, parts, 8, [7, 1]).numpy()
    assert (runs[:, 5:] > 8).all()
    lengths = np.stack([(runs == run).sum(axis=1) for run in range(3)], axis=1)
    assert (lengths.sum(axis=1) == 5).all() and (np.diff(runs[:, :5], axis=1) >= 0).all()
    counts = np.unique(lengths, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 60  # the C(4, 2) compositions, 100 each on average


def task_of(steps, dataset, features, name="preprocessors_under_test"):
    seqio.TaskRegistry.remove(name)
    source = seqio.FunctionDataSource(lambda split, shuffle_files: dataset, splits=["train"])
    return seqio.TaskRegistry.add(name, source, preprocessors=steps, output_features=features)


def test_text_to_text_trims_to_leave_room_for_eos():
    dataset = tf.data.Dataset.from_tensor_slices({"inputs": ["abcdef", "ab"], "targets": ["uvwxyz", "u"]})
    task = task_of(preprocessors.text_to_text(), dataset, FEATURES)
    examples = list(task.get_dataset({"inputs": 4, "targets": 3}, shuffle=False).as_numpy_iterator())
    assert [example["inputs"].tolist() for example in examples] == [[100, 101, 102, 1], [100, 101, 1]]
    assert [example["targets"].tolist() for example in examples] == [[120, 121, 1], [120, 1]]
    assert [example["targets_pretokenized"] for example in examples] == [b"uvwxyz", b"u"]
    untrimmed = next(task.get_dataset(None, shuffle=False).as_numpy_iterator())
    assert untrimmed["inputs"].tolist() == [100, 101, 102, 103, 104, 105, 1]
    cached = next(task.preprocess_precache(dataset).as_numpy_iterator())
    assert cached["inputs"].tolist() == [100, 101, 102, 103, 104, 105]


def test_whole_texts_are_their_tokens_without_eos():
    dataset = tf.data.Dataset.from_tensor_slices({"text": TEXTS})
    task = task_of(preprocessors.whole_text(), dataset, {"targets": FEATURES["targets"]})
    assert task.supports_caching
    read = [e["targets"].tolist() for e in task.get_dataset(None, shuffle=False).as_numpy_iterator()]
    assert read == [VOCABULARY.encode(text) for text in TEXTS]
    assert read == [e["targets"].tolist() for e in task.preprocess_precache(dataset).as_numpy_iterator()]


def test_too_few_sentinels_or_too_short_lengths_are_refused():
    with pytest.raises(ValueError, match="drops 63 spans, but the vocabulary has 60"):
        run(preprocessors.span_corruption, {"inputs": 1134, "targets": 1000})
    with pytest.raises(ValueError, match="needs lengths of at least"):
        run(preprocessors.span_corruption, {"inputs": 1, "targets": 5})
    with pytest.raises(ValueError, match="must give one for \\['targets'\\]"):
        run(preprocessors.span_corruption, {"inputs": 9})
    with pytest.raises(ValueError, match="must give one for \\['targets'\\]"):
        run(preprocessors.language_model, None, {"targets": FEATURES["targets"]})


def test_language_model_windows_join_to_the_documents_with_their_ends():
    examples = run(preprocessors.language_model, {"targets": 32}, {"targets": FEATURES["targets"]}, end="")
    assert {len(example["targets"]) for example in examples[:-1]} == {32}
    stream = sum((example["targets"] for example in examples), [])
    assert stream == sum((VOCABULARY.encode(text) + [1] for text in TEXTS), [])


@pytest.mark.parametrize(
    "lengths", [{"inputs": 30, "targets": 12}, {"inputs": 12, "targets": 30}, {"inputs": 9, "targets": 9}]
)
def test_prefix_and_rest_join_to_the_stream(lengths):
    features = {"inputs": seqio.Feature(VOCABULARY, add_eos=False), "targets": FEATURES["targets"]}
    examples = run(preprocessors.prefix_language_model, lengths, features)
    stream = []
    for example in examples:
        assert len(example["inputs"]) <= lengths["inputs"] and len(example["targets"]) <= lengths["targets"]
        stream += example["inputs"] + example["targets"][:-1]
        assert example["targets"][-1] == 1
    assert stream == joined()
    assert len({len(example["inputs"]) for example in examples[:-1]}) > 2
