"""Tiny seqio tasks over bytes, for tests of both loaders."""

import functools

import numpy as np
import pytest

from meshway.framework.data.seqio_adapter import import_seqio

COUNTS = {"train": 23, "validation": 7}


def texts(split, shuffle_files, seed=None):
    import tensorflow as tf

    inputs = [f"{split} {i}" for i in range(COUNTS[split])]
    return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": [text[-4:] for text in inputs]})


@pytest.fixture(scope="module")
def seqio():
    """Tiny tasks, registered for a module's tests and removed after them."""
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

    def add(name, splits=("train", "validation"), preprocessors=steps, counts=COUNTS, **more):
        source = seqio.FunctionDataSource(texts, splits=splits, num_input_examples=counts)
        more = {"output_features": features, "metric_fns": [accuracy, kinds]} | more
        seqio.TaskRegistry.add(name, source, preprocessors=preprocessors, **more)

    add("tiny_a")
    plain = [seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos_after_trim]
    add("tiny_c", preprocessors=plain)
    add("tiny_few", preprocessors=plain)
    add("tiny_b", preprocessors=plain, postprocess_fn=lambda text, example, is_target: text.upper(), metric_fns=[])
    add("tiny_train_only", splits=("train",))
    add("tiny_broken", preprocessors=[crash])
    add("tiny_twice", metric_fns=[accuracy, accuracy])
    lm_steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    add("tiny_lm", preprocessors=lm_steps, output_features={"targets": feature}, metric_fns=[])
    add(
        "tiny_float",
        preprocessors=plain,
        output_features=features | {"inputs": seqio.ContinuousFeature(dtype=tf.float32, rank=2)},
    )
    seqio.MixtureRegistry.add("tiny_mix", [("tiny_a", 1), ("tiny_b", 3)])
    seqio.MixtureRegistry.add("tiny_part", ["tiny_a", "tiny_train_only"], default_rate=1.0)
    by_size = functools.partial(seqio.mixing_rate_num_examples, temperature=2.0, maximum=9)
    seqio.MixtureRegistry.add("tiny_by_size", [("tiny_b", by_size), ("tiny_c", 4.0)])

    def long(dataset):  # "train 10" to "train 22" of 23
        return dataset.filter(lambda example: tf.strings.length(example["inputs"]) > 7)

    add("tiny_uncounted", preprocessors=[long, *plain], counts=None)
    counted = [("tiny_uncounted", by_size), ("tiny_c", seqio.mixing_rate_num_examples)]
    seqio.MixtureRegistry.add("tiny_by_count", counted)
    seqio.MixtureRegistry.add("tiny_of_counted", [("tiny_by_count", 1), ("tiny_few", 1)])
    seqio.MixtureRegistry.add("tiny_below_0", [("tiny_b", 1), ("tiny_c", -1.0)])
    seqio.MixtureRegistry.add("tiny_no_number", [("tiny_b", 1), ("tiny_c", lambda task: float("nan"))])
    seqio.MixtureRegistry.add("tiny_below_0_twice", [("tiny_below_0", -1.0), ("tiny_b", 9)])
    seqio.MixtureRegistry.add("tiny_of_below_0", [("tiny_few", 1), ("tiny_mix", -2)])
    spelled = seqio.map_over_dataset(lambda example: example | {"targets": tf.concat([[1], example["targets"]], 0)})
    add("tiny_spelled", preprocessors=[plain[0], spelled], output_features={"targets": feature}, metric_fns=[])
    silent = [seqio.map_over_dataset(lambda example: example | {"targets": ""}), plain[0], plain[1]]
    add("tiny_silent", preprocessors=silent)
    seqio.MixtureRegistry.add("tiny_of_mixtures", [("tiny_by_size", 3), ("tiny_few", 4)])
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
