"""Tasks that seqio's script has cached, whose raw data and preprocessors are of no use any more."""

import json
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf
from cached_tasks import equal as equal
from cached_tasks import pairs

COUNTS = {"train": 21, "validation": 5}
SHARDS = {"train": 3, "validation": 2}
VOCABULARY = seqio.ByteVocabulary(10)
TOKENS = seqio.Feature(VOCABULARY, add_eos=True)
steps = seqio.preprocessors


def never(dataset):
    raise AssertionError("a preprocessor runs that a cache makes needless")


def other(dataset):
    raise AssertionError("neither does this one")


def gone(split, shuffle_files, seed=None):
    raise FileNotFoundError(f"the raw data of {split} is gone")


def add(name, preprocessors, dataset_fn=gone, **more):
    seqio.TaskRegistry.remove(name)
    source = seqio.FunctionDataSource(dataset_fn, splits=("train", "validation"))
    features = {"inputs": TOKENS, "targets": TOKENS}
    return seqio.TaskRegistry.add(
        name, source, preprocessors=preprocessors, output_features=features, metric_fns=[], **more
    )


OLD = add("old_pairs", [never, seqio.CacheDatasetPlaceholder(), steps.append_eos_after_trim])
add("old_other", [never, seqio.CacheDatasetPlaceholder(required=True)])
add("old_uncached", [steps.tokenize], pairs)
add("old_later", [steps.tokenize, seqio.CacheDatasetPlaceholder(), steps.append_eos], pairs)
seqio.MixtureRegistry.remove("old_mix")
seqio.MixtureRegistry.add("old_mix", ["old_pairs", "old_later"], default_rate=1.0)


def example(split, i):
    """An example as the preprocessors before the cache made it."""
    text = f"{'pair' if split == 'validation' else 'text'} {i}" + "!" * (1 + i % 3 if split == "train" else 1)
    return {
        "inputs": np.array(VOCABULARY.encode(f"{split} " + "y" * (i % 14)), np.int32),
        "targets": np.array(VOCABULARY.encode(text), np.int32),
        "targets_pretokenized": text.encode(),
        "grid": np.full([i % 3, 2], i / 4, np.float32),
        "flag": np.array(i % 2, np.int64),  # seqio cannot write bool with today's protobuf
    }


def write(directory):
    """Writes what `seqio_cache_tasks` leaves of `old_pairs`, without Beam; returns split -> examples by file.

    `beam_utils.GetInfo`, `GetStats` and `WriteExampleTfRecord` make these files: of tf.Examples by
    `seqio.dict_to_tfexample`, of shapes without the first dimension, of tokens that are neither EOS nor padding.
    """
    folder = Path(directory) / seqio.get_task_dir_from_name("old_pairs")
    folder.mkdir(parents=True)
    found = {}
    for split, count in COUNTS.items():
        made = [example(split, i) for i in range(count)]
        info = {"num_shards": SHARDS[split], "features": {}, "seqio_version": seqio.__version__}
        for name, value in made[1].items():
            tensor = tf.constant(value)
            shape = tensor.shape.as_list()
            shape = [None, *shape[1:]] if shape else shape
            info["features"][name] = {"shape": shape, "dtype": tensor.dtype.name}
        info["features"]["flag"]["dtype"] = "bool"
        stats = {"examples": count}
        for name in ("inputs", "targets"):
            tokens = [int((each[name] > 1).sum()) for each in made]
            stats |= {f"{name}_tokens": sum(tokens), f"{name}_max_tokens": max(tokens)}
        Path(seqio.get_cached_info_path(folder, split)).write_text(json.dumps(info, sort_keys=True, indent=2) + "\n")
        Path(seqio.get_cached_stats_path(folder, split)).write_text(json.dumps(stats, sort_keys=True, indent=2) + "\n")
        found[split] = []
        for shard in range(SHARDS[split]):
            path = f"{seqio.get_cached_tfrecord_prefix(folder, split)}-{shard:05d}-of-{SHARDS[split]:05d}"
            with tf.io.TFRecordWriter(path) as writer:
                for each in made[shard :: SHARDS[split]]:
                    writer.write(seqio.dict_to_tfexample(each).SerializeToString())
                    found[split].append(each | {"flag": np.array(each["flag"], bool)})
    (folder / "COMPLETED").write_text("")
    return found
