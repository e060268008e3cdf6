"""Where tasks are cut, and that what is cached and what runs online make together what seqio makes."""

import functools

import numpy as np
import pytest
from tiers import tiers

from meshway.framework.data import seqio_adapter, seqio_steps
from meshway.framework.data.objective import FeatureInfo, VocabularyInfo
from meshway.framework.data.rows import examples as examples_lib
from meshway.framework.data.task_data import vocabularies_of
from meshway.framework.errors import UserError

TOKENS = FeatureInfo("int32", (None,), VocabularyInfo(269, 1, 10))
TEXT = FeatureInfo("bytes", ())


@pytest.fixture(scope="module")
def tasks():
    seqio_adapter.import_seqio()  # quietly
    import cached_tasks

    yield cached_tasks
    for registry in (cached_tasks.seqio.TaskRegistry, cached_tasks.seqio.MixtureRegistry):
        for name in [name for name in registry.names() if name.startswith("cut_")]:
            registry.remove(name)


@pytest.fixture
def kept(tasks):
    return tasks.seqio.TaskRegistry.get


CUTS = {  # what the steps are -> (cached, online, why there)
    "all": (lambda t: t.PLAIN, 2, 0, "all 2 preprocessors"),
    "nothing": (lambda t: [], 0, 0, "all 0 preprocessors"),
    "lengths": (lambda t: [*t.PLAIN, t.halved], 2, 1, "2 of 3 preprocessors; halved reads sequence_length"),
    "lengths in a partial": (
        lambda t: [t.steps.tokenize, functools.partial(t.halved)],
        1,
        1,
        "halved reads sequence_length",
    ),
    "lengths bound": (
        lambda t: [t.steps.tokenize, functools.partial(t.halved, sequence_length={"inputs": 4})],
        2,
        0,
        "all",
    ),
    "seqio's seed": (
        lambda t: [t.steps.tokenize, t.seeded_noise, t.steps.append_eos],
        1,
        2,
        "seeded_noise draws random",
    ),
    "a kernel's state": (lambda t: [t.steps.tokenize, t.stateful_noise], 1, 1, "stateful_noise draws random"),
    "order": (lambda t: [*t.PLAIN, t.shuffled], 2, 1, "shuffled draws random"),
    "a placeholder": (
        lambda t: [t.steps.tokenize, t.seeded_noise, t.seqio.CacheDatasetPlaceholder(), t.steps.append_eos],
        2,
        1,
        "2 of 3 preprocessors, up to the task's CacheDatasetPlaceholder",
    ),
    "no dict yet": (
        lambda t: [lambda ds: ds.map(lambda e: e["inputs"]), lambda ds, sequence_length: ds],
        0,
        2,
        "0 of 2 preprocessors; <lambda> reads sequence_length",
    ),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_task_is_cut_where_it_must_be(tasks, name):
    make, cached, online, why = CUTS[name]
    steps = make(tasks)
    cut = seqio_steps.divide_steps(tasks.add("cut_case", steps))
    assert (len(cut.cached), len(cut.online)) == (cached, online) and why in cut.reason
    assert list(cut.cached) == steps[:cached] and list(cut.online) == steps[cut.online_from :]


def test_a_preprocessor_that_cannot_be_put_together_is_named(tasks):
    def broken(dataset):
        raise KeyError("no such field")

    before = tasks.seqio.utils._NEXT_MAP_SEED  # of whatever test came before, in this process
    with pytest.raises(UserError) as raised:
        seqio_steps.divide_steps(tasks.add("cut_broken", [tasks.steps.tokenize, broken]))
    assert "task 'cut_broken', preprocessor 2 of 2 (broken): KeyError" in str(raised.value)
    assert before == tasks.seqio.utils._NEXT_MAP_SEED


def test_features_are_those_at_the_cut(tasks, kept):
    both = ["train", "validation"]
    text = {"inputs_pretokenized": TEXT, "targets_pretokenized": TEXT}
    assert seqio_steps.features(kept("kept_plain"), both) == {"inputs": TOKENS, "targets": TOKENS, **text}
    late = tasks.add("cut_late", [tasks.halved, *tasks.PLAIN])
    assert seqio_steps.features(late, both) == {"inputs": TEXT, "targets": TEXT}
    assert seqio_steps.declared(late) == {"inputs": TOKENS, "targets": TOKENS}
    assert seqio_steps.features(kept("kept_everything"), both) == {
        "inputs": TOKENS,
        "flag": FeatureInfo("bool", ()),
        "weights": FeatureInfo("float32", (None,)),
        "image": FeatureInfo("uint8", (4, 3, 2)),
        "grid": FeatureInfo("float64", (None, 2)),
        "jpeg": TEXT,
        "words": FeatureInfo("bytes", (None,)),
        "number": FeatureInfo("int64", ()),
    }


def test_features_that_cannot_be_cached_are_refused(tasks, kept):
    import tensorflow as tf

    def refused(task):
        with pytest.raises(UserError) as raised:
            seqio_steps.features(task, ["train", "validation"])
        return str(raised.value)

    assert "'kept_wrong'" in refused(kept("kept_wrong"))
    assert "feature 'targets'" in refused(kept("kept_wrong")) and "int64, expected int32" in refused(kept("kept_wrong"))
    ragged = tasks.add(
        "cut_ragged", [*tasks.PLAIN, lambda ds: ds.batch(2).map(lambda e: {"r": tf.ragged.range([1, 2])})]
    )
    ragged._output_features = {}
    filled = seqio_steps.features(ragged, ["train", "validation"])["r"]
    assert (filled.dtype, len(filled.shape)) == ("int32", 2)
    bare = tasks.add("cut_bare", [], lambda split, shuffle_files: tf.data.Dataset.range(3))
    bare._output_features = {}
    assert "only a dict of features can be cached" in refused(bare)

    def differing(split, shuffle_files):
        return tf.data.Dataset.from_tensors({"x": 1 if split == "train" else 1.5})

    other = tasks.add("cut_differing", [], differing)
    other._output_features = {}
    assert "'x' is float32 [] in split 'validation', but int32 [] in 'train'" in refused(other)


def test_a_rank_that_only_an_example_tells_is_found(tasks):
    import tensorflow as tf

    def opaque(dataset):
        return dataset.map(
            lambda e: e | {"extra": tf.numpy_function(lambda x: np.zeros((2, 3)), [e["inputs"]], tf.float64)}
        )

    task = tasks.add("cut_opaque", [opaque, *tasks.PLAIN])
    assert seqio_steps.features(task, ["train"])["extra"] == FeatureInfo("float64", (None, None))


def all_of(task, split, num_shards, **options):
    return [list(seqio_steps.cacheable(task, split, k, num_shards, **options)) for k in range(num_shards)]


@pytest.mark.parametrize("num_shards", tiers([1, 3, 8, 60], quick=[1, 3], slow=[8, 60]))
def test_shards_hold_every_example_once(tasks, kept, num_shards):
    whole = all_of(kept("kept_everything"), "train", 1)[0]
    shards = all_of(kept("kept_everything"), "train", num_shards)
    assert [len(shard) for shard in shards] == [len(range(k, 50, num_shards)) for k in range(num_shards)]
    for number, expected in enumerate(whole):
        assert tasks.equal(shards[number % num_shards][number // num_shards], expected)


def test_files_are_the_shards_where_there_are_enough(tasks, tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("".join(f"file {number} line {i}\n" for i in range(number)))
    source = tasks.seqio.TextLineDataSource({"train": str(tmp_path / "*.txt")})
    step = tasks.seqio.map_over_dataset(lambda line: {"inputs": line, "targets": line})
    task = tasks.add("cut_files", [step, *tasks.PLAIN], source=source)
    found = [[e["inputs_pretokenized"].decode() for e in shard] for shard in all_of(task, "train", 2)]
    assert {line.split()[1] for line in found[0]} == {"2", "4"} and {line.split()[1] for line in found[1]} == {"1", "3"}
    lines = [f"file {number} line {i}" for number in range(5) for i in range(number)]
    assert sorted(sum(found, [])) == sorted(lines)
    split_by_lines = [[e["inputs_pretokenized"].decode() for e in shard] for shard in all_of(task, "train", 6)]
    assert sorted(sum(split_by_lines, [])) == sorted(lines) and all(split_by_lines[k] for k in range(6))


def test_a_failing_example_stops_the_shard_or_is_counted(kept):
    whole = [example["inputs_pretokenized"] for example in all_of(kept("kept_plain"), "train", 1)[0]]
    with pytest.raises(UserError) as raised:
        list(seqio_steps.cacheable(kept("kept_failing"), "train", 0, 2))
    message = str(raised.value)
    assert "task 'kept_failing', split 'train', example 8 of shard 0 of 2" in message
    assert "ValueError: cannot parse 'train 16" in message and "\n" not in message and "{{" not in message
    found, bad = [], []
    for shard in range(2):
        examples = seqio_steps.cacheable(kept("kept_failing"), "train", shard, 2, max_bad=1, bad=bad)
        found += [example["inputs_pretokenized"] for example in examples]
    assert [text for text in whole if text.split()[1] not in (b"3", b"16")] == sorted(found, key=whole.index)
    assert len(bad) == 2 and "example 8 of shard 0" in bad[0] and "example 1 of shard 1" in bad[1]


def test_randomness_before_a_placeholder_is_fixed_and_differs_between_shards(tasks):
    for noise in (tasks.seeded_noise, tasks.stateful_noise):
        steps = [tasks.steps.tokenize, noise, tasks.seqio.CacheDatasetPlaceholder(), tasks.steps.append_eos]
        task = tasks.add("cut_random", steps)
        drawn = [[int(e["inputs"][-1]) for e in shard] for shard in all_of(task, "train", 2)]
        assert drawn == [[int(e["inputs"][-1]) for e in shard] for shard in all_of(task, "train", 2)]
        assert drawn[0] != drawn[1] and len({*drawn[0]}) > 10
        assert drawn != [[int(e["inputs"][-1]) for e in shard] for shard in all_of(task, "train", 2, seed=1)]


LENGTHS = {"inputs": 9, "targets": 4}


def online(task, lengths=LENGTHS, seed=0, examples=None):
    cached = all_of(task, "train", 1)[0] if examples is None else examples
    features = seqio_steps.features(task, ["train"])
    return seqio_steps.online(task, cached, features, seqio_steps.divide_steps(task).online_from, lengths, seed)


def test_cached_and_online_steps_make_together_what_seqio_makes(tasks, kept):
    several = tasks.add("cut_several", [*tasks.PLAIN, tasks.halved, tasks.long_ones, tasks.steps.append_eos])
    for task in (kept("kept_trimmed"), several, kept("kept_plain")):
        found = online(task, {"inputs": 40, "targets": 4})
        whole = task.get_dataset({"inputs": 40, "targets": 4}, "train", shuffle=False, trim_output_features=False)
        expected = list(whole.as_numpy_iterator())
        assert len(found) == len(expected) > 10
        assert all(tasks.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_online_randomness_flows_from_the_seed_alone(tasks):
    import tensorflow as tf

    for noise in (tasks.seeded_noise, tasks.stateful_noise):
        task = tasks.add("cut_noise", [tasks.steps.tokenize, noise, tasks.steps.append_eos])
        cached = all_of(task, "train", 1)[0]
        first = [e["inputs"].tolist() for e in online(task, seed=3, examples=cached)]
        tf.random.uniform([3])
        assert first == [e["inputs"].tolist() for e in online(task, seed=3, examples=cached)]
        assert first != [e["inputs"].tolist() for e in online(task, seed=4, examples=cached)]
        assert online(task, examples=[]) == []


def test_online_steps_that_fail_or_break_the_declaration_are_told(tasks):
    noisy = tasks.add("cut_lengths", [*tasks.PLAIN, tasks.halved])
    with pytest.raises(UserError, match="task 'cut_lengths', preprocessors after the cache, lengths {'targets': 3}"):
        online(noisy, {"targets": 3})
    wrong = tasks.add("cut_wrong", [*tasks.PLAIN, tasks.halved, tasks.to_int64])
    with pytest.raises(UserError, match="feature 'targets'.*int64, expected int32"):
        online(wrong)


@pytest.mark.parametrize(("eos_id", "said"), [(None, "no EOS"), (-1, "no EOS"), (999, "its EOS would be 999")], ids=str)
def test_an_eos_that_the_vocabulary_lacks_is_told_where_it_is_appended(tasks, monkeypatch, eos_id, said):
    class Endless(tasks.seqio.ByteVocabulary):
        @property
        def eos_id(self):
            return eos_id

    features = {name: tasks.seqio.Feature(Endless(), add_eos=name == "inputs") for name in ("inputs", "targets")}
    tokenize, append, trim = (getattr(tasks.steps, name) for name in ("tokenize", *examples_lib.TWINS))
    for step in (append, trim, functools.partial(append, sequence_length={"inputs": 3})):
        task = tasks.add("cut_endless", [tokenize, step], features=features)
        for read in (
            seqio_steps.divide_steps,
            seqio_steps.check_eos,
            lambda task: vocabularies_of("", [task], None, {}),
        ):
            with pytest.raises(
                UserError, match=f"'cut_endless' appends EOS to feature 'inputs'.* {said}.*add_eos=False"
            ):
                read(task)
    seqio_steps.check_eos(tasks.add("cut_endless", [tokenize], features=features))  # nothing appends it
    features["inputs"] = features["targets"]
    seqio_steps.check_eos(tasks.add("cut_endless", [tokenize, append], features=features))


@pytest.mark.parametrize("lengths", [{}, {"inputs": 5}, {"inputs": 1, "targets": 2}, {"targets": 0}, {"targets": 100}])
@pytest.mark.parametrize("after_trim", [False, True])
def test_numpy_twins_append_what_seqio_appends(tasks, lengths, after_trim):
    step = tasks.steps.append_eos_after_trim if after_trim else tasks.steps.append_eos
    steps = [tasks.steps.tokenize, tasks.seqio.CacheDatasetPlaceholder(), step, step]
    only_targets = {"inputs": tasks.seqio.Feature(tasks.BYTES, add_eos=False), "targets": tasks.TOKENS}
    task = tasks.add("cut_twin", steps, features=only_targets)
    features = seqio_steps.features(task, ["train"])
    entries = seqio_steps.online_entries(task)
    assert entries == [{"step": step.__name__, "features": {"targets": 1}}] * 2
    cached = all_of(task, "train", 1)[0]
    twins = examples_lib.numpy_steps(entries, features)
    sizes = {name: np.array([len(example[name]) for example in cached]) for name in ("inputs", "targets")}
    found = cached
    for twin in twins:
        found = [twin.apply(example, lengths) for example in found]
        sizes = twin.sizes(sizes, lengths)
    expected = online(task, lengths, examples=cached)
    assert all(tasks.equal(one, other) for one, other in zip(found, expected, strict=True))
    for name, column in sizes.items():
        assert column.tolist() == [len(example[name]) for example in expected]


def test_other_steps_have_no_twins(tasks, kept):
    assert seqio_steps.online_entries(kept("kept_plain")) == []
    assert examples_lib.numpy_steps([], {}) == []
    assert seqio_steps.online_entries(kept("kept_noisy")) == examples_lib.TENSORFLOW
    assert examples_lib.numpy_steps(examples_lib.TENSORFLOW, {}) is None


def test_the_twin_appends_along_the_last_axis():
    (twin,) = examples_lib.numpy_steps(
        [{"step": "append_eos_after_trim", "features": {"x": 1, "absent": 1}}],
        {"x": FeatureInfo("int32", (None, None))},
    )
    example = {"x": np.zeros((2, 5), np.int32)}
    assert twin.apply(example, {"x": 4})["x"].tolist() == [[0, 0, 0, 1]] * 2
    assert twin.sizes({"x": np.array([2])}, {"x": 4})["x"].tolist() == [2]


@pytest.mark.parametrize(("wrong", "feature"), [(-1, "targets"), (269, "inputs"), (10**6, "targets")])
def test_ids_that_the_vocabulary_has_not_are_no_examples(tasks, wrong, feature):
    """Of 269 ids; a task of ids, and one whose ids come from a step of its own."""
    import tensorflow as tf

    @tasks.seqio.map_over_dataset
    def spoil(example):
        is_it = tf.equal(example["inputs_pretokenized"], "train 16 xxx")
        return example | {feature: tf.where(is_it, tf.concat([[wrong], example[feature][1:]], 0), example[feature])}

    task = tasks.add("cut_wrong", [tasks.steps.tokenize, spoil, tasks.steps.append_eos])
    said = (
        rf"task 'cut_wrong', split 'train', example 8 of shard 0 of 2: feature '{feature}' holds the token id {wrong}, "
        "but its vocabulary has 269 ids, 0 to 268"
    )
    with pytest.raises(UserError, match=said):
        list(seqio_steps.cacheable(task, "train", 0, 2))
    bad = []
    kept = list(seqio_steps.cacheable(task, "train", 0, 2, max_bad=1, bad=bad))
    assert len(kept) == 24 and len(bad) == 1 and [e["inputs_pretokenized"] for e in kept].count(b"train 16 xxx") == 0
