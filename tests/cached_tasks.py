"""seqio tasks with everything a cache must bear; importing this module registers them, in workers too."""

import functools

import numpy as np
import seqio
import tensorflow as tf

COUNTS = {"train": 50, "validation": 7}
BYTES = seqio.ByteVocabulary(10)
TOKENS = seqio.Feature(BYTES, add_eos=True)
FEATURES = {"inputs": TOKENS, "targets": TOKENS}
steps = seqio.preprocessors


def pairs(split, shuffle_files, seed=None, counts=None):
    """Texts of all lengths; the last of them is empty."""
    count = (counts or COUNTS)[split]
    inputs = [f"{split} {i} " + "x" * (i % 13) for i in range(count)]
    targets = [text[-(i % 9) :] if i % 9 else "" for i, text in enumerate(inputs)]
    return tf.data.Dataset.from_tensor_slices({"inputs": np.array(inputs, str), "targets": np.array(targets, str)})


def everything(split, shuffle_files, seed=None):
    """One feature of each kind."""

    def example(i):
        n = tf.cast(i, tf.int32)
        return {
            "inputs": tf.range(n),
            "flag": tf.equal(i % 2, 0),
            "weights": tf.cast(tf.range(n % 4), tf.float32) / 2.0,
            "image": tf.cast(tf.fill([4, 3, 2], n), tf.uint8),
            "grid": tf.fill([n % 3, 2], tf.cast(i, tf.float64)),
            "jpeg": tf.strings.join(["\x89", tf.strings.as_string(i), "\0\0"]),
            "words": tf.strings.split("a bc \0")[: n % 4],
            "number": i,
        }

    return tf.data.Dataset.range(COUNTS[split]).map(example)


def fails_on(numbers):
    """Returns a preprocessor that raises on the examples with these numbers."""

    def check(text):
        if any(text.decode().split(" ")[1] == str(number) for number in numbers):
            raise ValueError(f"cannot parse {text.decode()!r}")
        return text

    def step(dataset):
        return dataset.map(
            lambda e: e | {"inputs": tf.ensure_shape(tf.numpy_function(check, [e["inputs"]], tf.string), [])},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    return step


@seqio.map_over_dataset
def to_int64(example):
    return example | {"targets": tf.cast(example["targets"], tf.int64)}


@seqio.map_over_dataset(num_seeds=1)
def seeded_noise(example, seed):
    noise = tf.random.stateless_uniform([1], seed, 3, 200, tf.int32)
    return example | {"inputs": tf.concat([example["inputs"], noise], axis=0)}


@seqio.map_over_dataset
def stateful_noise(example):
    some = tf.size(example["inputs"]) > 0
    noise = tf.cond(some, lambda: tf.random.uniform([1], 3, 200, tf.int32), lambda: tf.constant([7]))
    return example | {"inputs": tf.concat([example["inputs"], noise], axis=0)}


@seqio.map_over_dataset
def halved(example, sequence_length):
    return example | {"inputs": example["inputs"][: sequence_length["inputs"] // 2]}


def shuffled(dataset):
    return dataset.shuffle(10)


def long_ones(dataset):
    return dataset.filter(lambda example: tf.size(example["inputs"]) > 15)


def add(name, preprocessors, dataset_fn=pairs, splits=tuple(COUNTS), features=None, **more):
    """Registers a task in place of any of that name."""
    seqio.TaskRegistry.remove(name)
    source = more.pop("source", None) or seqio.FunctionDataSource(dataset_fn, splits=splits)
    return seqio.TaskRegistry.add(
        name, source, preprocessors=preprocessors, output_features=features or FEATURES, **more
    )


PLAIN = [steps.tokenize, steps.append_eos]
add("kept_plain", PLAIN)
add("kept_trimmed", [steps.tokenize, steps.append_eos_after_trim])
add("kept_noisy", [steps.tokenize, seeded_noise, steps.append_eos])
add("kept_everything", [], everything, features={"inputs": TOKENS})
add("kept_empty", PLAIN, functools.partial(pairs, counts={"train": 0, "validation": 0}))
add("kept_half_empty", PLAIN, functools.partial(pairs, counts={"train": 5, "validation": 0}))
add("kept_failing", [fails_on([3, 16]), *PLAIN])
add("kept_wrong", [*PLAIN, to_int64])
add("kept_large", PLAIN, functools.partial(pairs, counts={"train": 25_000, "validation": 7}))
seqio.MixtureRegistry.remove("kept_mix")
seqio.MixtureRegistry.add("kept_mix", ["kept_plain", "kept_trimmed"], default_rate=1.0)


def equal(one, other):
    """Says whether two numpy examples are the same, dtypes and all."""
    return one.keys() == other.keys() and all(
        np.asarray(one[name]).dtype.kind == np.asarray(other[name]).dtype.kind
        and np.array_equal(np.asarray(one[name], object), np.asarray(other[name], object))
        for name in one
    )
