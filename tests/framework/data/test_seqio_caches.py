"""Caches that seqio's script wrote: their examples come as they are, and what is wrong with one is told."""

import json
import os
import shutil

import pytest
from tiers import tiers

from meshway.framework.data import seqio_caches
from meshway.framework.data.cache import builder as cache_builder
from meshway.framework.data.cache import fingerprint as task_fingerprint
from meshway.framework.data.cache.format import CachedSplit, read_json
from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.seqio_loader import SeqioData
from meshway.framework.errors import UserError
from meshway.launch import cache as cache_verb

MODULES = ["seqio_cached_tasks"]
LENGTHS = {"inputs": 16, "targets": 16}
BUILD = {"num_workers": 1, "progress": False}


@pytest.fixture(scope="module")
def tasks():
    from meshway.framework.data.seqio_adapter import import_seqio

    import_seqio()  # quietly
    import seqio_cached_tasks

    return seqio_cached_tasks


@pytest.fixture(scope="module")
def written(tasks, tmp_path_factory):
    """What seqio's script leaves of `old_pairs`, and the examples in the order of its files; not to be changed."""
    directory = tmp_path_factory.mktemp("seqio") / "cache"
    return directory, tasks.write(directory)


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "seqio")


def refused(act):
    with pytest.raises(UserError) as raised:
        act()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_examples_come_in_their_order_and_no_preprocessor_runs(tasks, written, tmp_path):
    directory, examples = written
    built = cache_builder.build(["old_pairs"], MODULES, tmp_path, from_seqio=str(directory), **BUILD)
    assert {one.split: one.examples for one in built} == tasks.COUNTS
    for split, expected in examples.items():
        cached = CachedSplit(tmp_path / "old_pairs", split)
        assert len(cached) == len(expected)
        assert all(tasks.equal(one, other) for one, other in zip(cached, expected, strict=True))
        stats = json.loads((directory / "old_pairs" / f"stats.{split}.json").read_text())
        # EOS is appended after the cache.
        assert cached.sizes["targets"].sum() == stats["targets_tokens"]
    info = read_json(tmp_path / "old_pairs" / "info.json")
    assert info["features"]["grid"] == {"dtype": "float32", "shape": [None, 2], "vocabulary": None}
    assert info["features"]["flag"]["dtype"] == "bool" and info["features"]["targets"]["dtype"] == "int32"


@pytest.mark.slow
def test_fewer_shards_hold_the_same_order(tasks, written, tmp_path):
    directory, examples = written
    options = BUILD | {"num_workers": 2}
    cache_builder.build(["old_pairs"], MODULES, tmp_path, num_shards=2, from_seqio=str(directory), **options)
    cached = CachedSplit(tmp_path / "old_pairs", "train")
    assert all(tasks.equal(one, other) for one, other in zip(cached, examples["train"], strict=True))


def test_a_run_finds_a_cache_in_seqios_directories(tasks, written, tmp_path, monkeypatch):
    directory, examples = written
    monkeypatch.setattr(tasks.seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [])
    monkeypatch.setattr(tasks.OLD, "_cache_dir", None)
    arguments = {"lengths": LENGTHS, "batch_size": 4, "converter": EncoderDecoder(pack=False), "module": MODULES}
    arguments |= {"shuffle": False, "seqio_cache_dirs": str(directory)}
    data = CachedData("old_pairs", cache_dir=str(tmp_path / "ours"), num_workers=0, **arguments)
    dry = data.for_dry_run()
    assert dry.train(slice(None)).spec() == data.train(slice(None)).spec()
    assert [read.examples for read in dry.reads(True)] == list(tasks.COUNTS.values())
    batch = next(data.train(slice(None)))
    streamed = next(SeqioData("old_pairs", use_cached=True, **arguments).train(slice(None)))
    assert {name: array.shape for name, array in batch.items()} == {name: x.shape for name, x in streamed.items()}
    for row, example in zip(batch["encoder_input_tokens"], examples["train"], strict=False):
        assert row[row > 0].tolist() == [*example["inputs"][:15].tolist(), 1]
    (task,) = data.eval_tasks()
    assert task.num_examples == tasks.COUNTS["validation"] and task.target(0) == "pair 0!"


@pytest.mark.slow
def test_an_imported_cache_outlives_its_origin_and_its_preprocessors(tasks, copied, tmp_path):
    ours = tmp_path / "ours"
    cache_builder.build(["old_pairs"], MODULES, ours, ["train"], from_seqio=str(copied), **BUILD)
    later = tasks.OLD.replace(preprocessors=[tasks.other, *tasks.OLD.preprocessors[1:]])
    assert task_fingerprint.stale(ours / "old_pairs", later) == []
    cache_builder.ensure("old_pairs", MODULES, ours, **BUILD)  # the other split
    shutil.rmtree(copied)
    cache_builder.ensure("old_pairs", MODULES, ours, **BUILD)
    assert len(CachedSplit(ours / "old_pairs", "validation")) == tasks.COUNTS["validation"]
    other = tasks.seqio.Feature(tasks.seqio.ByteVocabulary(3), add_eos=True)
    later = later.replace(output_features=dict(later.output_features) | {"targets": other})
    assert task_fingerprint.stale(ours / "old_pairs", later) == ["vocabulary of 'targets' changed"]


def test_a_cache_made_anew_has_the_splits_of_what_it_is_made_from(tasks, written, copied, tmp_path, monkeypatch):
    directory, _ = written
    (copied / "old_pairs" / "info.validation.json").unlink()
    cache_builder.build(["old_pairs"], MODULES, tmp_path, from_seqio=str(copied), **BUILD)
    monkeypatch.setattr(tasks.seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(directory)])
    monkeypatch.setattr(tasks.OLD, "_cache_dir", None)
    (built,) = cache_builder.build(["old_pairs"], MODULES, tmp_path, ["validation"], overwrite=True, **BUILD)
    assert built.examples == tasks.COUNTS["validation"]


def _cut(folder):
    path = folder / "train.tfrecord-00001-of-00003"
    path.write_bytes(path.read_bytes()[:-7])


def _flip(folder):
    path = folder / "train.tfrecord-00002-of-00003"
    data = bytearray(path.read_bytes())
    data[20] ^= 255
    path.write_bytes(data)


def _edit(name, change):
    def act(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return act


MISTAKES = [
    (_cut, r"train.tfrecord-00001-of-00003 of the seqio cache of task 'old_pairs' is damaged: truncated record"),
    (_flip, r"train.tfrecord-00002-of-00003 of the seqio cache of task 'old_pairs' is damaged: corrupted record"),
    (lambda folder: (folder / "train.tfrecord-00001-of-00003").unlink(), "has 2 of the 3 files.*00001-of-00003"),
    (lambda folder: (folder / "COMPLETED").unlink(), "old_pairs is incomplete: COMPLETED"),
    (lambda folder: (folder / "stats.train.json").unlink(), "stats.train.json of a seqio cache cannot be read"),
    (_edit("stats.train.json", lambda x: x.update(examples=99)), "hold 21 examples, but stats.train.json says 99"),
    (
        _edit("info.train.json", lambda x: x["features"]["targets"].update(dtype="float32")),
        "incorrect type for feature 'targets'.*Got float32, expected int32",
    ),
    (
        _edit("info.train.json", lambda x: x["features"].pop("targets")),
        "'old_pairs', split 'train' of the seqio cache.*missing expected output feature.*targets",
    ),
]


@pytest.mark.parametrize(("harm", "message"), tiers(MISTAKES, quick=MISTAKES[1::3], slow=MISTAKES))
def test_a_damaged_or_different_cache_is_one_message(tasks, copied, tmp_path, harm, message):
    harm(copied / "old_pairs")
    with pytest.raises(UserError, match=message) as raised:
        cache_builder.build(["old_pairs"], MODULES, tmp_path / "ours", from_seqio=str(copied), **BUILD)
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_told(tasks, written, tmp_path):
    directory, _ = written

    def build(name, where=directory, **more):
        return lambda: cache_builder.build([name], MODULES, tmp_path, from_seqio=str(where), **BUILD | more)

    message = refused(build("old_other"))
    assert "has no seqio cache of task 'old_other'" in message and "it has ['old_pairs']" in message
    assert "has no CacheDatasetPlaceholder" in refused(build("old_uncached"))
    assert "has no split 'tests' to cache; it has ['train', 'validation']" in refused(
        build("old_pairs", splits=["tests"])
    )
    cache_builder.build(["old_pairs"], MODULES, tmp_path, from_seqio=str(directory / "old_pairs"), **BUILD)
    assert seqio_caches.origin(tasks.OLD, tmp_path / "old_pairs").directory == f"{directory}/old_pairs"


@pytest.mark.slow
def test_parts_together_are_the_whole(tasks, written, tmp_path, monkeypatch, capsys):
    directory, _ = written

    def cache(where, part=None):
        cache_verb.cache("old_mix", MODULES, str(tmp_path / where), workers=1, part=part)
        return capsys.readouterr().out

    monkeypatch.setattr(tasks.seqio.utils, "_GLOBAL_CACHE_DIRECTORIES", [str(directory)])
    cache("whole")
    assert "part 2/3 is built" in cache("shared", "2/3")
    assert not list((tmp_path / "shared").glob("*/*/index.json"))
    # A machine that died between two shards, and does its part again.
    usual, calls = os.replace, []

    def die(source, target, **more):
        calls.append(target)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return usual(source, target, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        cache("shared", "3/3")
    cache("shared", "3/3")
    assert "old_later" in cache("shared", "1/3")  # the last completes it
    assert files(tmp_path / "shared") == files(tmp_path / "whole")
    for part in ("1/2", "2/2"):  # without a shared disk
        cache(f"alone{part[0]}", part)
        shutil.copytree(tmp_path / f"alone{part[0]}", tmp_path / "merged", dirs_exist_ok=True)
    cache("merged")
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    assert "parts are numbered from 1" in refused(lambda: cache("more", "0/2"))
    assert "give all parts --num_shards=9 or more" in refused(lambda: cache("more", "2/9"))
    assert "--part must be as 1/4" in refused(lambda: cache("more", "2 of 9"))


def files(directory):
    """Returns path -> bytes of every file below a folder."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith("seqio")
    }
