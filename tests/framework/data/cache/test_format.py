"""The record codec and the reader of a split: whatever numpy holds comes back, and damage is told."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from meshway.framework.data.cache import format as cache_format
from meshway.framework.data.cache import shards as cache_shards
from meshway.framework.data.cache.shards import write_index, write_shard
from meshway.framework.data.objective import FeatureInfo, VocabularyInfo
from meshway.framework.errors import UserError

DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)


@st.composite
def features_and_example(draw):
    """Features of every kind, and an example that fits them; some dimensions are declared, some left open."""
    infos, example = {}, {}
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=5)):
        dtype = draw(st.sampled_from([*DTYPES, "bytes", "bytes"]))
        shape = draw(SHAPES)
        if dtype == "bytes":
            texts = draw(st.lists(st.binary(max_size=9), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
            value = np.array(texts, object).reshape(shape)
            value = value[()] if not shape else value
        else:
            value = draw(hnp.arrays(dtype, shape))
        example[name] = value
        infos[name] = FeatureInfo(dtype, tuple(draw(st.sampled_from([size, None])) for size in shape))
    return infos, example


@settings(max_examples=200, deadline=None)
@given(features_and_example())
def test_an_example_comes_back_as_it_was(drawn):
    infos, example = drawn
    found = cache_format.decode(cache_format.encode(example, infos), infos)
    assert list(found) == list(infos)
    for name, info in infos.items():
        if info.dtype == "bytes":
            assert np.array_equal(np.asarray(found[name], object), np.asarray(example[name], object))
        else:
            assert found[name].dtype == example[name].dtype and found[name].shape == example[name].shape
            assert found[name].tobytes() == example[name].tobytes()  # NaN and -0.0 included
    assert cache_format.encode(found, infos) == cache_format.encode(example, infos)


def test_text_keeps_its_zero_bytes_and_its_letters():
    infos = {"image": FeatureInfo("bytes", ()), "name": FeatureInfo("bytes", ())}
    found = cache_format.decode(cache_format.encode({"image": b"\x89PNG\0\0", "name": "naïve"}, infos), infos)
    assert found == {"image": b"\x89PNG\0\0", "name": "naïve".encode()}


def test_arrays_of_big_endian_and_strided_memory_are_written_alike():
    infos = {"x": FeatureInfo("int32", (None,))}
    plain = np.arange(10, dtype=np.int32)
    assert cache_format.encode({"x": plain.astype(">i4")}, infos) == cache_format.encode({"x": plain}, infos)
    assert cache_format.encode({"x": plain[::2]}, infos) == cache_format.encode({"x": plain[::2].copy()}, infos)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"y": 1}, "no feature 'x'; it has ['y']"),
        ({"x": np.zeros(3, np.int64)}, "'x' is int64 [3], but the task's is int32 [None]"),
        ({"x": np.zeros((3, 1), np.int32)}, "'x' is int32 [3, 1], but the task's is int32 [None]"),
        ({"x": np.array(["a"], object)}, "'x' is bytes [1], but the task's is int32 [None]"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example, message):
    with pytest.raises(ValueError) as raised:
        cache_format.encode(example, {"x": FeatureInfo("int32", (None,))})
    assert message in str(raised.value)


def test_features_survive_json():
    infos = {
        "targets": FeatureInfo("int32", (None,), VocabularyInfo(100, 1, 10)),
        "image": FeatureInfo("uint8", (8, 8, 3)),
        "weight": FeatureInfo("float32", ()),
    }
    assert cache_format.features_from_json(cache_format.features_to_json(infos)) == infos


@pytest.fixture
def split(tmp_path):
    """A cache of one split in 3 shards: example i is range(i)."""
    infos = {"x": FeatureInfo("int32", (None,)), "text": FeatureInfo("bytes", ())}
    directory, work = tmp_path / "task" / "train", tmp_path / "work"
    work.mkdir()
    examples = [{"x": np.arange(i, dtype=np.int32), "text": f"text {i}".encode()} for i in range(20)]
    cuts = [examples[:9], [], examples[9:]]
    shards = [write_shard(part, infos, directory, k, 3, "f", [], work) for k, part in enumerate(cuts)]
    write_index(directory, shards, "f", work)
    info = {"task": "task", "features": cache_format.features_to_json(infos)}
    (tmp_path / "task" / "info.json").write_text(json.dumps(info))
    return tmp_path / "task"


def test_a_split_reads_any_example_in_any_order(split):
    cached = cache_format.CachedSplit(split, "train")
    assert len(cached) == 20 and list(cached.sizes) == ["x"]
    assert cached.sizes["x"].tolist() == list(range(20)) and cached.sizes["x"].dtype == np.int32
    for indices in ([19, 0, 9, 8, 8], [], list(range(20))):
        assert [len(example["x"]) for example in cached.read(indices)] == indices
    assert [example["text"] for example in cached] == [f"text {i}".encode() for i in range(20)]
    again = pickle.loads(pickle.dumps(cached))
    assert len(again[7]["x"]) == 7


def test_damage_is_told_with_the_file_and_the_way_out(split):
    shard = split / "train" / cache_format.shard_name(2, 3)
    content = shard.read_bytes()

    def refused(act):
        with pytest.raises(UserError) as raised:
            act()
        assert "run `meshway cache` again" in str(raised.value)
        return str(raised.value)

    told = 0
    for at in range(0, len(content), 499):
        shard.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        cached = cache_format.CachedSplit(split, "train")
        try:
            assert [len(example["x"]) for example in cached] == list(range(20))  # the byte was padding
        except UserError as error:
            told += 1
            assert str(shard) in str(error) and "corrupt" in str(error)
    assert told
    shard.write_bytes(content[:-1])
    assert f"{len(content) - 1:,} bytes" in refused(lambda: cache_format.CachedSplit(split, "train"))
    shard.unlink()
    assert str(shard) in refused(lambda: cache_format.CachedSplit(split, "train"))
    shard.write_bytes(content)
    (split / "train" / "sizes.x.npy").write_bytes(b"no numpy file")
    assert "sizes.x.npy" in refused(lambda: cache_format.CachedSplit(split, "train").sizes)
    np.save(split / "train" / "sizes.x.npy", np.zeros(3, np.int32))
    assert "3 sizes for 20 examples" in refused(lambda: cache_format.CachedSplit(split, "train").sizes)
    (split / "train" / "index.json").write_text("{")
    assert "index.json" in refused(lambda: cache_format.CachedSplit(split, "train"))


def test_sizes_of_some_examples_leave_few_pages_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_format, "_MAPPED", 64)  # bytes: 16 sizes
    monkeypatch.setattr(cache_format, "_SCANNED", 7)
    infos = dict.fromkeys(("x", "none"), FeatureInfo("int32", (None,)))
    made = ({"x": np.zeros(7 * i % 13, np.int32), "none": np.zeros(0, np.int32)} for i in range(100))
    directory = tmp_path / "task" / "train"
    tmp_path.joinpath("work").mkdir()
    write_index(directory, [write_shard(made, infos, directory, 0, 1, "f", [], tmp_path / "work")], "f", tmp_path)
    info = {"task": "task", "features": cache_format.features_to_json(infos)}
    (tmp_path / "task" / "info.json").write_text(json.dumps(info))
    found = cache_format.CachedSplit(tmp_path / "task", "train")
    assert found.empty == {"none"}
    numbers = np.random.default_rng(0).integers(0, 100, 300)
    for which in (numbers, np.sort(numbers), numbers[:1], numbers[:0], slice(0, 100), slice(90, 120), slice(5, 6)):
        expected = 7 * np.arange(100)[which] % 13
        assert found.sizes_at(which)["x"].tolist() == found.sizes["x"][which].tolist() == expected.tolist()


def test_records_that_were_written_one_by_one_are_read(split, tmp_path, monkeypatch):
    """As all were before groups of eight."""
    monkeypatch.setattr(cache_shards, "_WRITER", "group_size:1")
    found = cache_format.CachedSplit(split, "train")
    directory, examples = tmp_path / "old" / "train", list(found)
    shard = write_shard(examples, found.features, directory, 0, 1, "f", [], tmp_path / "work")
    write_index(directory, [shard], "f", tmp_path / "work")
    (tmp_path / "old" / "info.json").write_text((split / "info.json").read_text())
    old = cache_format.CachedSplit(tmp_path / "old", "train")
    assert [e["x"].tolist() for e in old.read([19, 3, 3])] == [e["x"].tolist() for e in found.read([19, 3, 3])]
    assert old.identity != found.identity
