"""What is written beside the shards of a cache: the index of a split, the statistics and vocabularies of a task."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data.cache.format import FORMAT, read_json, sized
from meshway.framework.data.cache.shards import Shard, failures_of, replace
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.vocabularies import of_seqio

VOCABULARIES = "vocabularies"


def write_index(split_directory: Path, shards: Sequence[Shard], fingerprint: str, work: Path) -> None:
    """Writes a split's sizes.FEATURE.npy and, when they are there, its index.json."""
    index = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "bad_examples": sum(len(shard.bad) for shard in shards),
        "shards": [{"examples": shard.examples, "bytes": shard.bytes, "crc32": shard.crc32} for shard in shards],
    }
    with failures_of(split_directory):
        for name in shards[0].sizes:
            path = work / f"{split_directory.name}.{name}.npy"
            np.save(path, np.concatenate([shard.sizes[name] for shard in shards]))
            replace(split_directory / f"sizes.{name}.npy", path.read_bytes(), work)
        replace(split_directory / "index.json", _text(index), work)


def write_stats(task_directory: Path, features: Mapping[str, FeatureInfo], work: Path) -> None:
    """Writes a task's stats.json, of the splits that are whole."""
    stats = {}
    for path in sorted(task_directory.glob("*/index.json")):
        if path.parent.name == VOCABULARIES:  # of a feature named so
            continue
        index = read_json(path)
        sizes = {name: np.load(path.parent / f"sizes.{name}.npy") for name in _lengths(features)}
        stats[path.parent.name] = {
            "examples": sum(shard["examples"] for shard in index["shards"]),
            "bytes": sum(shard["bytes"] for shard in index["shards"]),
            "bad_examples": index["bad_examples"],
            "features": {name: _statistics(array) for name, array in sizes.items()},
        }
    info = read_json(task_directory / "info.json")
    content = {"task": info["task"], "fingerprint": info["fingerprint"], "splits": stats}
    with failures_of(task_directory):
        replace(task_directory / "stats.json", _text(content), work)


def tokens(shards: Sequence[Shard], features: Mapping[str, FeatureInfo]) -> dict[str, int]:
    """Returns the tokens of each feature in a split, of those whose lengths differ."""
    return {name: sum(int(shard.sizes[name].sum(dtype=np.int64)) for shard in shards) for name in _lengths(features)}


def save_vocabularies(task: Any, task_directory: Path, work: Path) -> dict[str, dict[str, str]]:
    """Saves the vocabularies of a seqio task's features in its cache, and returns info.json's entries for them."""
    entries = {}
    with failures_of(task_directory):
        (task_directory / VOCABULARIES).mkdir(parents=True, exist_ok=True)
        for name, feature in task.output_features.items():
            vocabulary = of_seqio(feature.vocabulary)
            vocabulary.save(work / VOCABULARIES, name)
            entries[name] = {
                "kind": vocabulary.kind,
                "text": str(vocabulary),
                "fingerprint": vocabulary.fingerprint,
            }
        for path in (work / VOCABULARIES).iterdir():
            os.replace(path, task_directory / VOCABULARIES / path.name)
    return entries


def _lengths(features: Mapping[str, FeatureInfo]) -> list[str]:
    return [name for name in sized(features) if features[name].shape[0] is None]


def _statistics(sizes: np.ndarray) -> dict[str, Any]:
    """Returns what stats.json says of a feature's sizes [examples]; the histogram's key 'a-b' counts a to b."""
    if not len(sizes):
        return {"tokens": 0, "min": None, "max": None, "mean": None, "histogram": {}}
    bins = np.ceil(np.log2(sizes.astype(np.int64) + 1)).astype(int)  # 0 | 1 | 2-3 | 4-7 | ...
    histogram = {}
    for number, count in enumerate(np.bincount(bins).tolist()):
        low, high = (1 << number) >> 1, (1 << number) - 1
        histogram[f"{low}" if low == high else f"{low}-{high}"] = count
    total = int(sizes.sum(dtype=np.int64))
    return {
        "tokens": total,
        "min": int(sizes.min()),
        "max": int(sizes.max()),
        "mean": total / len(sizes),
        "histogram": histogram,
    }


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
