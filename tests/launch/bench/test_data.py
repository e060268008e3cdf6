"""`meshway bench data`: what it prints is complete, and both sides did the same work."""

import functools
import json
import multiprocessing
import os

import numpy as np
import pytest
from tasks_in_memory import random_examples, task

from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.rows.examples import InMemory
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.launch.bench import caching, corpus, data, stages
from meshway.launch.bench.stages import Packing, Sample, Stage, batch_counts, log_normal
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import config

LENGTHS = {"inputs": 32, "targets": 16}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return str(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def make_data(caches, monkeypatch):
    """The recipe's `CachedData`, to be called; synthetic examples are as short as its own."""
    monkeypatch.setattr(data, "_MIXES", (LENGTHS,))
    known = {"mixture_or_task_name": "kept_plain", "lengths": LENGTHS, "batch_size": 2, "module": "cached_tasks"}
    return functools.partial(CachedData, **known, converter=EncoderDecoder(), cache_dir=caches)


@pytest.mark.slow
def test_a_run_measures_every_stage_and_prints_it(make_data, capsys):
    make_data = functools.partial(make_data, train_split="train[:50%]")
    found = data.measure(make_data, seconds=1, batches=30, workers=0, as_json=True)
    ours = {"cache", "read", "seek", "load kept_plain: thread"}
    tasks = ("kept_plain", "log-normal 32/16")
    ours |= {f"{stage} {name}" for name in tasks for stage in ("plan", "pack")}
    theirs = {f"pack {name}: seqio" for name in tasks}
    theirs |= {f"load kept_plain: seqio, {source}" for source in ("its source", "from memory")} | {"cache: seqio"}
    assert found["stages"].keys() == ours | theirs
    assert found["notes"] == ["caches, and what seqio reads from its source, are of all of 'train'"]
    assert {entry["seqio"] for entry in found["ratios"]} == theirs
    assert all(stage["tokens/s"] > 0 for name, stage in found["stages"].items() if name != "seek")
    assert all(0.1 < d <= 1 for stage in found["stages"].values() for d in stage.get("density", {}).values())
    memory = found["memory"]
    assert memory["batches"] == 30 and 0 < memory["start MiB"] <= 1.5 * memory["10 % MiB"]
    printed = capsys.readouterr().out
    table, _, result = printed.partition("\nRESULT ")
    assert json.loads(result) == found
    for name in ours | theirs:
        assert f"{name} " in table
    assert "resident MiB over 30 batches" in table and "times as fast" in table
    assert table.count("examples/s a core") == 2 and "times as fast a core" in table


@pytest.mark.slow
def test_worker_processes_are_timed_and_stopped(make_data):
    found = data.measure(make_data, seconds=1, batches=2, workers=1)
    assert found["stages"]["load kept_plain: 1 process"]["batches/s"] > 0
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_seqio_caches_what_we_cache(make_data, tmp_path):
    """In files of seqio's, which hold as many examples and tokens as ours do."""
    import tensorflow as tf

    both = caching.measure(make_data(train_split="train[10:]"))
    ours, theirs = both["cache"], both["cache: seqio"]
    assert ours.counts["examples"] == theirs.counts["examples"] > 0
    assert ours.counts["tokens"] == theirs.counts["tokens"] > 0
    assert min(both[name].core_seconds for name in both) > 0
    caching.write_as_seqio(make_data().tasks[0].task, "train", tmp_path, ["targets"])
    files = [str(path) for path in tmp_path.glob("train.tfrecord-*")]
    read = tf.data.TFRecordDataset(files).map(
        lambda record: tf.io.parse_single_example(record, {"targets": tf.io.VarLenFeature(tf.int64)})["targets"].values
    )
    assert len(files) == 8 and sum(1 for _ in read) == theirs.counts["examples"]
    assert sum(len(each) for each in read.as_numpy_iterator()) > 0


def test_without_a_twin_a_recipe_stands_alone(make_data, monkeypatch):
    monkeypatch.setattr(stages, "twin", lambda objective, sizes: None)
    made = data.Bench(make_data, 1, 0, 1)
    made.add_stages()
    assert not [stage.name for stage in made.stages if "seqio" in stage.name] and not made.pairs
    assert any("stands alone" in note for note in made.notes)


@pytest.mark.parametrize(
    ("converter", "features", "twin"),
    [
        (EncoderDecoder(), ("inputs", "targets"), "EncDecFeatureConverter"),
        (LanguageModel(), ("targets",), "LMFeatureConverter"),
        (PrefixLanguageModel(), ("inputs", "targets"), "PrefixLMFeatureConverter"),
        (SpanCorruption(), ("inputs", "targets"), "EncDecFeatureConverter"),
        (SpanCorruption(decoder_only=True), ("inputs", "targets"), "PrefixLMFeatureConverter"),
        (SpanCorruption(), ("targets",), None),
    ],
)
def test_seqio_has_a_twin_where_examples_pass_through(converter, features, twin):
    lengths = LENGTHS if len(converter.task_features) == 2 else {"targets": 16}
    sizes = {name: np.array([3, 5]) for name in features}
    assert stages.twin(converter.bind(task(*features), lengths), sizes) == twin


def test_both_sides_pack_the_same_tokens_but_those_that_seqio_loses():
    examples = random_examples(40, longest=40).read(range(40))
    examples = [{n: v + i % 2 for n, v in e.items()} for i, e in enumerate(examples)]  # half of them without zeros
    objective = EncoderDecoder().bind(task("inputs", "targets"), LENGTHS)
    ours = Packing("ours", objective, InMemory(examples))
    theirs = stages.SeqioPacking("theirs", ours.converted, LENGTHS, 4)
    items = [e[n][:length] for e in examples for n, length in LENGTHS.items()]
    assert ours.once(0).counts["tokens"] == sum(map(len, items))
    kept = [np.count_nonzero(item[: np.count_nonzero(item)]) for item in items]  # as if zeros came last
    assert theirs.once(0).counts["tokens"] == sum(kept) < sum(map(len, items))


def test_a_batch_is_counted_as_its_rows_say():
    segments = np.array([[1, 1, 2, 0], [1, 2, 3, 3], [0, 0, 0, 0]])
    batch = {"encoder_segment_ids": segments, "decoder_segment_ids": segments[:, :1], "other": segments}
    assert batch_counts(batch) == {"examples": 5, "tokens": 3 + 4 + 2}
    assert batch_counts({"decoder_target_tokens": np.array([[5, 0], [6, 7]])}) == {"examples": 2, "tokens": 3}
    assert batch_counts({"images": np.zeros((3, 8, 8))}) == {"examples": 3, "tokens": 0}


def test_stages_take_turns_and_figures_are_medians():
    turns = []

    class Fake(Stage):
        def __init__(self, name):
            self.name = name

        def once(self, seconds):
            turns.append(self.name)
            return Sample(1.0, {"tokens": len(turns)}, {"inputs": 0.5})

    samples = data.interleaved([Fake("a"), Fake("b")], 0.005)
    assert turns[:6] == ["a", "b", "b", "a", "a", "b"] and len(samples["a"]) == len(samples["b"])
    assert data.summary([Sample(2.0, {"tokens": n}) for n in (2, 8, 4)]) == {"seconds": 2.0, "tokens/s": 2.0}


def test_synthetic_examples_are_log_normal_without_zeros():
    examples = log_normal({"inputs": 512, "targets": 114}, 2000)
    sizes = examples.sizes
    assert 130 < np.median(sizes["inputs"]) < 165 and 17 < np.median(sizes["targets"]) < 23
    assert sizes["inputs"].max() == 512 and all(e["targets"].all() for e in examples.read(range(50)))


def test_a_recipe_names_its_data_and_the_bench_may_ask_for_it_in_other_ways():
    recipe = config.load(Invocation("bench", "data", ("quickstart",), ("bench.data.measure.seconds=5",)))
    arguments = recipe.build("bench.data.measure")
    assert arguments["seconds"] == 5
    data = arguments["data"](mixture_or_task_name="pydocs_text", num_workers=0)
    assert (data.name, data.lengths, data.batch_size) == ("pydocs_text", {"inputs": 128, "targets": 64}, 16)


def test_an_argument_out_of_range_is_refused():
    with pytest.raises(UserError, match="bench.data.measure.batches must be at least 1, not 0"):
        data.measure(None, batches=0)


@pytest.mark.slow
def test_a_corpus_of_any_size_is_made_and_measured(make_data, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "_SHARD", 1000)
    arguments = functools.partial(make_data, converter=SpanCorruption(), mixture_or_task_name="no_such_task")
    (found,) = data.measure(arguments, corpus_size=3000, as_json=True)["corpora"]
    assert found["examples"] == 3000 and found["rows"]["rows"] > 500
    last = found["rows"]["rows"] // 2 - 1
    assert [figure["batch"] for figure in found["figures"].values()] == [0, last, 5 * last + 1]
    assert all(0 < figure["open"] < figure["seconds"] for figure in found["figures"].values())
    table, _, result = capsys.readouterr().out.partition("\nRESULT ")
    assert json.loads(result) == {"corpora": [found]} and "fifth pass" in table
    with pytest.raises(EnvironmentFailure, match="measures a corpus died .exit code 3;"):
        corpus._in_fresh_process(os._exit, 3)


@pytest.mark.parametrize("wrong", ["many", "0", "10,", "-5"])
def test_a_corpus_size_that_is_none(make_data, wrong):
    with pytest.raises(UserError, match=f"must be numbers of examples, such as 1000000,50000000, not '{wrong}'"):
        data.measure(make_data, corpus_size=wrong)
