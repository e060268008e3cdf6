"""Sources and splits as seqio's users write them: TFDS, files, slices, ragged and sparse features."""

import numpy as np
import pytest

from meshway.framework.data.cache import builder as cache_builder
from meshway.framework.data.cache.format import CachedSplit
from meshway.framework.data.cached_task import bare_split, slice_of
from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 16, "targets": 8}


@pytest.mark.slow
def test_slices_are_those_of_tensorflow_datasets(seqio):
    import tensorflow_datasets as tfds

    for text in ("", "[:90%]", "[90%:]", "[33%:67%]", "[:7]", "[-5:]", "[-10%:]", "[3:-2]", "[:999]"):
        for count in (1, 7, 10, 23):
            info = {"train": tfds.core.SplitInfo(name="train", shard_lengths=[count], num_bytes=0)}
            try:
                (whole,) = tfds.core.ReadInstruction.from_spec(f"train{text}").to_absolute(info)
            except ValueError:
                with pytest.raises(UserError, match="fewer than this slice asks for"):
                    slice_of(f"train{text}", count)
                continue
            expected = range(whole.from_ or 0, count if whole.to is None else whole.to)
            assert list(slice_of(f"train{text}", count)) == list(expected), (text, count)


def test_slices_of_a_cached_split_are_apart_and_together_the_whole(seqio, tmp_path):
    def data(train, evaluate):
        splits = {"train_split": train, "eval_split": evaluate}
        arguments = {"cache_dir": str(tmp_path), "num_workers": 0, "shuffle": False} | splits
        return CachedData("tiny_c", LENGTHS, 4, EncoderDecoder(pack=False), **arguments)

    one = data("train[:80%]", "train[80%:]")
    assert [read.examples for read in one.for_dry_run().reads(True)] == [18, 5]  # not cached yet
    cached = CachedSplit(tmp_path / "tiny_c", "train") if next(one.train(slice(None))) else None
    assert [read.examples for read in one.reads(True)] == [18, 5]
    (evaluation,) = one.eval_tasks()
    texts = [each["inputs_pretokenized"] for each in cached]
    assert [example["inputs_pretokenized"] for example in evaluation.read(range(5))] == texts[18:]
    assert evaluation.inputs_text(0) == texts[18].decode()
    stream = one.train(slice(None))
    rows = np.concatenate([next(stream)["encoder_input_tokens"] for _ in range(5)])
    assert np.array_equal(rows[18:], rows[:2])  # the next pass
    with pytest.raises(
        UserError, match=r"'tiny_c': .* is of examples 0 to 17, and this run reads examples 5 to 22 of split 'train'"
    ):
        data("train[5:]", "train").train(slice(None)).restore(stream.state())  # as many, but others
    with pytest.raises(
        UserError, match=r"is of another split, and this run reads examples 0 to 6 of split 'validation'"
    ):
        data("validation", "train").train(slice(None)).restore(stream.state())
    older = {key: value for key, value in stream.state().items() if not key.endswith((".split", ".from", ".to"))}
    one.train(slice(None)).restore(older)
    (whole,) = data("train", "train").eval_tasks()
    assert whole.num_examples == 23
    for split in ("train[90%]", "train[a:b]", "train[:90%"):
        with pytest.raises(UserError, match="is no slice: write train.FROM:TO."):
            bare_split(split)
    with pytest.raises(UserError, match="has no split 'trian' for training.*did you mean 'train'"):
        data("trian[:9]", "train").train(slice(None))


@pytest.mark.slow
def test_sources_of_seqio_are_cached(seqio, tmp_path):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    class Numbers(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"inputs": text, "targets": text})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(30):
                yield i, {"inputs": f"in {i}", "targets": f"{i}"}

    Numbers(data_dir=str(tmp_path / "tfds")).download_and_prepare()
    for shard in range(3):
        lines = "".join(f"in {i}\n" for i in range(shard, 30, 3))
        (tmp_path / f"lines-{shard}.txt").write_text(lines)
    with tf.io.TFRecordWriter(str(tmp_path / "examples.tfrecord")) as writer:
        for i in range(30):
            example = {"inputs": f"in {i}".encode(), "targets": f"{i}".encode()}
            writer.write(seqio.dict_to_tfexample(example).SerializeToString())

    def of_line(dataset):
        return dataset.map(lambda line: {"inputs": line, "targets": tf.strings.substr(line, 3, 2)})

    kept = tf.io.FixedLenFeature([], tf.string)
    lines, slices = {"train": str(tmp_path / "lines-*.txt")}, {"train": "train[:20]", "validation": "train[20:]"}
    sources = {
        "tiny_tfds": (seqio.TfdsDataSource("numbers:1.0.0", tfds_data_dir=str(tmp_path / "tfds")), []),
        "tiny_sliced": (
            seqio.TfdsDataSource("numbers:1.0.0", tfds_data_dir=str(tmp_path / "tfds"), splits=slices),
            [],
        ),
        "tiny_lines": (seqio.TextLineDataSource(lines), [of_line]),
        "tiny_files": (seqio.FileDataSource(tf.data.TextLineDataset, lines), [of_line]),
        "tiny_records": (
            seqio.TFExampleDataSource(
                {"train": str(tmp_path / "examples.tfrecord")}, {"inputs": kept, "targets": kept}
            ),
            [],
        ),
    }
    feature = seqio.Feature(seqio.ByteVocabulary(10), add_eos=True)
    for name, (source, steps) in sources.items():
        steps = [*steps, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
        features = {"inputs": feature, "targets": feature}
        seqio.TaskRegistry.add(name, source, preprocessors=steps, output_features=features, metric_fns=[])
        cache_builder.build([name], [], tmp_path / "cache", num_workers=1, progress=False)
        splits = [path.parent.name for path in (tmp_path / "cache" / name).glob("*/index.json")]
        assert len(splits) == (2 if name == "tiny_sliced" else 1)
        cached = [example for split in splits for example in CachedSplit(tmp_path / "cache" / name, split)]
        assert sorted(each["inputs_pretokenized"] for each in cached) == sorted(f"in {i}".encode() for i in range(30))


def test_ragged_and_sparse_features_are_filled_up(seqio, tmp_path):
    import tensorflow as tf

    def texts(split, shuffle_files, seed=None):
        def example(i):
            lengths = [i % 4, 3]
            return {
                "inputs": tf.strings.as_string(i),
                "targets": "x",
                "words": tf.RaggedTensor.from_row_lengths(1 + tf.range(tf.cast(sum(lengths), tf.int32)), lengths),
                "marks": tf.sparse.from_dense(tf.cast(tf.equal(tf.range(5, dtype=tf.int64), i % 5), tf.int32)),
            }

        return tf.data.Dataset.range(9).map(example)

    feature = seqio.Feature(seqio.ByteVocabulary(10), add_eos=True)
    steps = [seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(), seqio.preprocessors.append_eos]
    words = seqio.Feature(seqio.PassThroughVocabulary(20), rank=2, add_eos=False)
    features = {"inputs": feature, "targets": feature, "words": words}
    source = seqio.FunctionDataSource(texts, splits=("train",))
    seqio.TaskRegistry.add("tiny_ragged", source, preprocessors=steps, output_features=features, metric_fns=[])
    cache_builder.build(["tiny_ragged"], [], tmp_path, num_shards=1, num_workers=1, progress=False)
    for i, example in enumerate(CachedSplit(tmp_path / "tiny_ragged", "train")):
        assert example["marks"].tolist() == [int(place == i % 5) for place in range(5)]
        first = list(range(1, i % 4 + 1))
        assert example["words"].tolist() == [first + [0] * (3 - len(first)), [i % 4 + 1, i % 4 + 2, i % 4 + 3]]
    later = [*steps, lambda dataset: dataset.map(lambda example: example)]
    seqio.TaskRegistry.add("tiny_later", source, preprocessors=later, output_features=features, metric_fns=[])
    with pytest.raises(UserError, match="feature '(marks|words)' is .*only dense tensors can be cached where steps in"):
        cache_builder.build(["tiny_later"], [], tmp_path, num_workers=1, progress=False)
