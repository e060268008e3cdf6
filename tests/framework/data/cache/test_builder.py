"""Building a cache: what lies there at the end is the same however it came about, and mistakes are told."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from meshway.framework.data import seqio_adapter
from meshway.framework.data.cache import builder as cache_builder
from meshway.framework.data.cache import fingerprint as task_fingerprint
from meshway.framework.data.cache import workers as cache_workers
from meshway.framework.data.cache.format import CachedSplit, shard_name
from meshway.framework.data.cache.shards import working
from meshway.framework.data.vocabularies import load
from meshway.framework.errors import EnvironmentFailure, UserError

MODULES = ["cached_tasks"]
SHARDS = 3


@pytest.fixture(scope="module")
def tasks():
    seqio_adapter.import_seqio()  # quietly
    import cached_tasks

    return cached_tasks


@pytest.fixture(scope="module")
def reference(tasks, tmp_path_factory):
    """An undisturbed cache of kept_plain; not to be changed."""
    directory = tmp_path_factory.mktemp("reference")
    build(directory)
    return directory / "kept_plain"


@pytest.fixture
def cache(reference, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(reference, tmp_path / "kept_plain"))


def build(directory, name="kept_plain", **options):
    return cache_builder.build(
        [name], MODULES, directory, **{"num_shards": SHARDS, "num_workers": 1, "progress": False} | options
    )


def files(directory):
    """Returns path -> bytes of every file below a folder."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def refused(act, kind=UserError):
    with pytest.raises(kind) as raised:
        act()
    return str(raised.value)


def test_a_cache_holds_the_examples_of_the_task(tasks, reference):
    task = tasks.seqio.TaskRegistry.get("kept_plain")
    for split, count in tasks.COUNTS.items():
        cached = CachedSplit(reference, split)
        whole = task.get_dataset(None, split, shuffle=False).as_numpy_iterator()
        expected = {example["inputs_pretokenized"]: example for example in whole}
        assert len(cached) == len(expected) == count
        assert all(tasks.equal(example, expected.pop(example["inputs_pretokenized"])) for example in cached)
        assert not expected
        for name, column in cached.sizes.items():
            assert column.tolist() == [len(example[name]) for example in cached]


def test_every_kind_of_feature_comes_back(tasks, tmp_path):
    build(tmp_path, "kept_everything")
    cached = CachedSplit(tmp_path / "kept_everything", "train")
    found = {int(example["number"]): example for example in cached}
    for expected in tasks.everything("train", False).as_numpy_iterator():
        assert tasks.equal(found[int(expected["number"])], expected)
    assert cached[0]["jpeg"].endswith(b"\0\0") and cached[0]["image"].dtype == np.uint8
    assert set(cached.sizes) == {"inputs", "weights", "image", "grid"}


def test_what_is_beside_the_shards_tells_about_them(reference, tasks):
    stats = json.loads((reference / "stats.json").read_text())
    info = json.loads((reference / "info.json").read_text())
    for split, entry in stats["splits"].items():
        cached = CachedSplit(reference, split)
        sizes = cached.sizes["targets"]
        found = entry["features"]["targets"]
        assert entry["examples"] == tasks.COUNTS[split] and entry["bad_examples"] == 0
        assert entry["bytes"] == sum(path.stat().st_size for path in (reference / split).glob("*.array_record"))
        assert (found["tokens"], found["min"], found["max"]) == (sizes.sum(), sizes.min(), sizes.max())
        assert found["mean"] == pytest.approx(sizes.mean())
        for bounds, count in found["histogram"].items():
            low, _, high = bounds.partition("-")
            assert count == ((sizes >= int(low)) & (sizes <= int(high or low))).sum()
        assert sum(found["histogram"].values()) == entry["examples"]
    assert stats["fingerprint"] == info["fingerprint"] and info["online"] == []
    assert info["cut"]["cached"] == ["seqio.preprocessors.tokenize", "seqio.preprocessors.append_eos"]
    vocabulary = load(reference / "vocabularies", "targets")
    assert vocabulary.fingerprint == info["vocabularies"]["targets"]["fingerprint"] and vocabulary.size == 269


def test_a_build_reports_what_it_built(tmp_path, capsys):
    built = build(tmp_path, "kept_mix", progress=True)
    assert [(one.task, one.split, one.examples) for one in built] == [
        (task, split, count)
        for task in ("kept_plain", "kept_trimmed")
        for split, count in (("train", 50), ("validation", 7))
    ]
    plain, trimmed = built[0].tokens, built[2].tokens
    assert plain["inputs"] == trimmed["inputs"] + 50  # EOS comes after the cache there
    said = capsys.readouterr().out
    assert "task kept_trimmed: caches 1 of 2 preprocessors; append_eos_after_trim reads sequence_length" in said


def test_building_again_changes_nothing(cache, reference):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record")}
    build(cache.parent)
    assert files(cache) == files(reference)
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record")}


@pytest.mark.slow
def test_workers_write_the_same_bytes_as_one_process(reference, tmp_path):
    build(tmp_path, num_workers=3)
    assert files(tmp_path / "kept_plain") == files(reference)


LOSSES = [
    "train/00001-of-00003.array_record",
    "train/00001-of-00003.json",
    "train/sizes.inputs.npy",
    "train/index.json",
    "validation",
    "stats.json",
]


@pytest.mark.parametrize("lost", LOSSES)
def test_what_is_lost_is_built_again_to_the_byte(cache, reference, lost):
    path = cache / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    build(cache.parent)
    assert files(cache) == files(reference)


@pytest.mark.parametrize("damage", ["flipped", "cut", "side", "foreign"])
def test_a_damaged_shard_is_told_and_built_again(cache, reference, capsys, damage):
    shard = cache / "train" / shard_name(1, SHARDS)
    content = shard.read_bytes()
    side = shard.with_suffix(".json")
    if damage == "flipped":
        shard.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        shard.write_bytes(content[:-1])
    elif damage == "side":
        side.write_text("{")
    else:
        side.write_text(json.dumps(json.loads(side.read_text()) | {"fingerprint": "other"}))
    build(cache.parent, progress=True)
    assert "it is built again" in capsys.readouterr().out
    assert files(cache) == files(reference)


def test_what_a_killed_builder_left_is_swept_and_a_living_ones_work_is_not(cache, reference):
    dead = cache / ".building-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "train.00001").write_bytes(b"half a shard")
    (cache / ".building-just-born").mkdir()
    with working(cache) as alive:
        (alive / "file").touch()
        build(cache.parent)
        assert (alive / "file").exists() and not dead.exists()
    assert files(cache) == files(reference)
    assert not list(cache.glob(".building-*"))


def test_a_builder_killed_before_it_wrote_info_is_no_obstacle(reference, tmp_path):
    begun = tmp_path / "kept_plain"
    (begun / "vocabularies").mkdir(parents=True)
    build(tmp_path)
    assert files(begun) == files(reference)


def test_two_builders_at_once_leave_one_whole_cache(reference, tmp_path):
    import threading

    failures = []

    def work():
        try:
            build(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert files(tmp_path / "kept_plain") == files(reference)


@pytest.fixture
def changed(tasks):
    """Registers kept_plain otherwise for one test."""
    original = tasks.seqio.TaskRegistry.get("kept_plain")
    yield functools.partial(tasks.add, "kept_plain")
    tasks.seqio.TaskRegistry.remove("kept_plain")
    tasks.seqio.TaskRegistry.add_provider("kept_plain", original)


def test_a_stale_cache_is_refused_by_name_of_what_changed(cache, tasks, changed):
    import tensorflow as tf

    feature = functools.partial(tasks.seqio.Feature, add_eos=True)
    larger = feature(tasks.seqio.ByteVocabulary(20))

    def longer(split, shuffle_files, seed=None):
        return tasks.pairs(split, shuffle_files).repeat(2)

    cases = [
        (
            dict(preprocessors=tasks.PLAIN, features=tasks.FEATURES | {"targets": larger}),
            "vocabulary of 'targets' changed",
        ),
        (
            dict(
                preprocessors=tasks.PLAIN, features=tasks.FEATURES | {"targets": feature(tasks.BYTES, dtype=tf.int64)}
            ),
            "feature 'targets' changed from int32, rank 1, add_eos to int64, rank 1, add_eos",
        ),
        (
            dict(preprocessors=[functools.partial(tasks.steps.tokenize, copy_pretokenized=False), tasks.PLAIN[1]]),
            "code of preprocessor 1 (tokenize) changed",
        ),
        (dict(preprocessors=tasks.PLAIN, dataset_fn=longer), "code of the source changed"),
    ]
    for registered, message in cases:
        task = changed(**registered)
        assert message in "; ".join(task_fingerprint.stale(cache, task))
        for act in (
            lambda: build(cache.parent),
            lambda: cache_builder.ensure("kept_plain", MODULES, cache.parent),
        ):
            text = refused(act)
            assert message in text and "--overwrite" in text and str(cache) in text
    build(cache.parent, overwrite=True)
    assert len(CachedSplit(cache, "train")) == 100
    assert "number of shards changed from 3 to 4" in refused(lambda: build(cache.parent, num_shards=4))
    build(cache.parent, num_shards=None)  # as many as there are


def test_steps_after_the_cut_may_change(cache, reference, tasks, changed):
    task = changed(preprocessors=[*tasks.PLAIN, tasks.halved], metric_fns=[], postprocess_fn=str)
    assert task_fingerprint.stale(cache, task) == []
    cache_builder.ensure("kept_plain", MODULES, cache.parent, progress=False)
    info = json.loads((cache / "info.json").read_text())
    assert info["online"] == "tensorflow" and info["cut"]["online"] == ["cached_tasks.halved"]
    before, after = files(reference), files(cache)
    assert {name for name in after if after[name] != before.get(name)} == {"info.json"}
    changed(preprocessors=[*tasks.PLAIN, tasks.long_ones])
    message = refused(lambda: cache_builder.ensure("kept_plain", MODULES, cache.parent))
    assert "cached preprocessors changed from" in message and "cached_tasks.long_ones" in message


def closure(number):
    def step(dataset):
        return dataset.map(lambda example: example | {"n": number})

    return step


def test_fingerprints_follow_code_constants_and_closures(tasks, monkeypatch):
    describe = task_fingerprint.describe
    assert describe(closure(3)) == describe(closure(3)) != describe(closure(4))
    assert describe(functools.partial(closure, 3)) != describe(functools.partial(closure, 4))
    before = describe(tasks.pairs)
    monkeypatch.setattr(tasks, "COUNTS", {"train": 50, "validation": 8})
    assert describe(tasks.pairs) == before  # a dict may be anything, and change while it is used
    monkeypatch.setattr(tasks, "BYTES", tasks.seqio.ByteVocabulary(11))
    assert "object at 0x" not in describe(tasks.PLAIN[0])


def test_only_the_splits_asked_for_are_built(tmp_path, tasks):
    assert [one.split for one in build(tmp_path, splits=["validation"])] == ["validation"]
    assert not (tmp_path / "kept_plain" / "train").exists()
    places = cache_builder.ensure("kept_mix", MODULES, tmp_path, ["validation"], progress=False, num_workers=1)
    assert places == {name: tmp_path / name for name in ("kept_plain", "kept_trimmed")}
    cache_builder.ensure("kept_mix", MODULES, tmp_path, progress=False, num_workers=1)
    stats = json.loads((tmp_path / "kept_plain" / "stats.json").read_text())
    assert list(stats["splits"]) == ["train", "validation"]
    assert "no split 'trian' to cache" in refused(lambda: build(tmp_path, splits=["trian"]))


def test_a_fresh_cache_is_found_without_building(reference, monkeypatch):
    monkeypatch.setattr(cache_builder, "build", None)
    found = cache_builder.ensure("kept_plain", MODULES, reference.parent)
    assert found == {"kept_plain": reference}


def test_bad_examples_are_refused_or_counted(tasks, tmp_path):
    message = refused(lambda: build(tmp_path, "kept_failing"))
    assert "task 'kept_failing', split 'train', example" in message and "cannot parse 'train 3" in message
    assert message.endswith("`meshway cache --max_bad_examples=N` leaves out up to N")
    message = refused(lambda: build(tmp_path, "kept_failing", max_bad_examples=1))
    assert "split 'train' has 2 bad examples, 1 allowed" in message
    (train, _) = build(tmp_path, "kept_failing", max_bad_examples=2)
    assert train.examples == 48 and len(train.bad) == 2
    stats = json.loads((tmp_path / "kept_failing" / "stats.json").read_text())
    assert stats["splits"]["train"]["bad_examples"] == 2
    assert "has 2 bad examples" in refused(lambda: build(tmp_path, "kept_failing"))  # what is there counts too


@pytest.mark.slow
def test_a_worker_tells_a_tasks_mistake_and_that_it_died(tmp_path, monkeypatch):
    message = refused(lambda: build(tmp_path, "kept_failing", num_workers=2))
    assert "task 'kept_failing', split 'train', example" in message
    monkeypatch.setattr(cache_workers, "_work", die)
    message = refused(lambda: build(tmp_path / "other", num_workers=2), EnvironmentFailure)
    assert "died (killed by SIGKILL); perhaps memory ran out" in message and "of task 'kept_plain'" in message
    assert not list((tmp_path / "other").rglob(".building-*"))


def die(connection, num_workers):
    os.kill(os.getpid(), 9)


def test_wrong_and_empty_tasks_are_refused(tmp_path):
    message = refused(lambda: build(tmp_path, "kept_wrong"))
    assert "task 'kept_wrong'" in message and "feature 'targets'" in message and "int64, expected int32" in message
    message = refused(lambda: build(tmp_path, "kept_empty"))
    assert "task 'kept_empty' has no examples to cache in 'train', 'validation'" in message
    assert not (tmp_path / "kept_empty" / "train" / "index.json").exists()
    assert [one.examples for one in build(tmp_path, "kept_half_empty")] == [5, 0]
    empty = CachedSplit(tmp_path / "kept_half_empty", "validation")
    assert len(empty) == 0 and list(empty) == [] and len(empty.sizes["targets"]) == 0


def test_an_example_unlike_the_others_is_refused(tasks, tmp_path):
    import tensorflow as tf

    def grows(dataset):
        def grow(text):
            return np.zeros((len(text) % 2 + 1,), np.int32) if len(text) > 12 else np.zeros((2, 2), np.int32)

        return dataset.map(lambda e: e | {"extra": tf.numpy_function(grow, [e["inputs"]], tf.int32)})

    tasks.add("kept_grows", [grows, *tasks.PLAIN])
    message = refused(lambda: build(tmp_path, "kept_grows", splits=["train"]))
    assert "task 'kept_grows', split 'train', example" in message and "feature 'extra' is int32 [" in message


def test_arguments_and_folders_are_checked(tmp_path):
    assert "num_shards must be a whole number" in refused(lambda: build(tmp_path, num_shards=0))
    assert "num_workers must be a whole number" in refused(lambda: build(tmp_path, num_workers=1.5))
    assert "did you mean 'kept_plain'" in refused(lambda: build(tmp_path, "kept_plane"))
    (tmp_path / "kept_plain").mkdir()
    (tmp_path / "kept_plain" / "thesis.tex").touch()
    assert "is not a task's cache" in refused(lambda: build(tmp_path, overwrite=True))
    assert (tmp_path / "kept_plain" / "thesis.tex").exists()
    assert "--part=3/2: parts are numbered from 1" in refused(lambda: build(tmp_path / "new", part=(3, 2)))
    assert "has 3 shards a split, too few for 9 parts" in refused(lambda: build(tmp_path / "new", part=(2, 9)))
    assert not (tmp_path / "new").exists()  # no cache is planned
    (tmp_path / "file").touch()
    assert "give another folder for caches" in refused(lambda: build(tmp_path / "file"))


def test_an_untouched_file_system_is_left_by_a_task_that_cannot_be_cached(tmp_path, tasks):
    tasks.add("kept_forbidden", tasks.PLAIN)
    tasks.seqio.TaskRegistry.get("kept_forbidden").source._caching_permitted = False
    assert "its source forbids caching" in refused(lambda: build(tmp_path, "kept_forbidden"))
    assert files(tmp_path) == {}
