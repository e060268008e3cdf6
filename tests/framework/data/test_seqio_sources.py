"""A source that every shard passes over is read once where it is small, and told truly where it fails."""

import pytest

from meshway.framework.data import seqio_adapter, seqio_sources, seqio_steps
from meshway.framework.errors import UserError

ROWS, SHARDS = 40, 4


@pytest.fixture
def made():
    """Makes a task of ROWS numbers, whose source counts what is read of it, and fails at number `bad`."""
    seqio = seqio_adapter.import_seqio()
    import numpy as np
    import tensorflow as tf

    def task(knows=True, bad=None, steps=()):
        read = []

        def row(number):
            read.append(int(number))
            if number == bad:
                raise ValueError(f"row {number} is broken")
            return np.full(int(number) % 5 + 1, 3, np.int32)

        def source(split, shuffle_files, seed=None):
            numbers = tf.data.Dataset.range(ROWS)
            numbers = numbers if knows else numbers.filter(lambda number: number >= 0)

            def example(number):
                ids = tf.numpy_function(row, [number], tf.int32)
                return {"targets": tf.ensure_shape(ids, [None])}

            return numbers.map(example)

        seqio.TaskRegistry.remove("sources_of")
        found = seqio.TaskRegistry.add(
            "sources_of",
            source=seqio.FunctionDataSource(source, splits=["train"]),
            preprocessors=list(steps),
            output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
        )
        seqio_sources.release()
        return found, read

    yield task
    seqio.TaskRegistry.remove("sources_of")
    seqio_sources.release()


def shards(task):
    return [list(seqio_steps.cacheable(task, "train", shard, SHARDS)) for shard in range(SHARDS)]


@pytest.mark.parametrize("knows", [True, False], ids=["counted", "uncounted"])
def test_a_small_source_is_read_once_for_all_shards(made, knows, monkeypatch):
    task, read = made(knows)
    found = shards(task)
    assert [[len(example["targets"]) for example in shard] for shard in found] == [
        [number % 5 + 1 for number in range(shard, ROWS, SHARDS)] for shard in range(SHARDS)
    ]
    looked_at = ROWS * (1 if knows else 2)  # for its size, and where it does not say how many it has, for their number
    assert len(read) <= ROWS + looked_at

    monkeypatch.setattr(seqio_sources, "_MEMORY", 100)
    task, read = made(knows)
    again = shards(task)
    assert [[example["targets"].tolist() for example in shard] for shard in again] == [
        [example["targets"].tolist() for example in shard] for shard in found
    ], "too large to be held, it is read again, to the same"
    assert len(read) >= ROWS * SHARDS


def test_a_source_that_fails_is_told_by_its_example(made):
    task, _ = made(bad=6)
    with pytest.raises(UserError, match="(?s)train.*row 6 is broken"):
        list(seqio_steps.cacheable(task, "train", 6 % SHARDS, SHARDS))


def few(dataset):
    import tensorflow as tf

    def checked(example):
        with tf.control_dependencies([tf.debugging.assert_less(tf.size(example["targets"]), 5)]):
            return {"targets": tf.identity(example["targets"])}

    return dataset.map(checked)


def test_examples_that_fail_in_a_preprocessor_leave_the_source_held(made):
    task, read = made(steps=[few])
    bad = []
    kept = [list(seqio_steps.cacheable(task, "train", at, SHARDS, max_bad=ROWS, bad=bad)) for at in range(SHARDS)]
    assert len(bad) == ROWS // 5 and sum(map(len, kept)) == ROWS - ROWS // 5
    assert len(read) <= 2 * ROWS, "looked at for its size, and read once"
