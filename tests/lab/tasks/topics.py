"""Tasks of one's own: lines of Python's reference, as bytes."""

import pydoc_data.topics

import seqio
import tensorflow as tf

LINES = [line.strip() for text in pydoc_data.topics.topics.values() for line in text.splitlines() if len(line) > 60]
SPLITS = {"train": LINES[64:832], "validation": LINES[:64]}
TOKENS = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)


def lines(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"targets": SPLITS[split]})


def halves(split, shuffle_files, seed=None):
    middles = [len(line) // 2 for line in SPLITS[split]]
    return tf.data.Dataset.from_tensor_slices(
        {
            "inputs": [line[:middle] for line, middle in zip(SPLITS[split], middles)],
            "targets": [line[middle:] for line, middle in zip(SPLITS[split], middles)],
        }
    )


def openings(split, shuffle_files, seed=None):
    words = [line.split() for line in SPLITS[split]]
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": [" ".join(line[:3]) for line in words], "targets": [line[3] for line in words]}
    )


def same_length(targets, predictions):
    return {"same_length": sum(len(t) == len(p) for t, p in zip(targets, predictions)) / len(targets)}


STEPS = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
seqio.TaskRegistry.add(
    "lab_lines",
    source=seqio.FunctionDataSource(lines, splits=list(SPLITS)),
    preprocessors=STEPS,
    output_features={"targets": TOKENS},
)
seqio.TaskRegistry.add(
    "lab_halves",
    source=seqio.FunctionDataSource(halves, splits=list(SPLITS)),
    preprocessors=STEPS,
    output_features={"inputs": TOKENS, "targets": TOKENS},
    metric_fns=[same_length],
)
seqio.TaskRegistry.add(
    "lab_openings",
    source=seqio.FunctionDataSource(openings, splits=list(SPLITS)),
    preprocessors=[
        seqio.preprocessors.tokenize,
        seqio.CacheDatasetPlaceholder(),
        seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={"inputs": TOKENS, "targets": TOKENS},
)
seqio.MixtureRegistry.add("lab_mix", [("lab_halves", 1.0), ("lab_openings", 3.0)])
