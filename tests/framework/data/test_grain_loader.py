import json
import subprocess
import sys

import numpy as np
import pytest

from meshway.framework.data.cache import builder as cache_builder
from meshway.framework.data.denoising import SpanCorruption
from meshway.framework.data.encoder_only import MaskedLanguageModel
from meshway.framework.data.features import EncoderDecoder, LanguageModel, PrefixLanguageModel
from meshway.framework.data.grain_loader import CachedData
from meshway.framework.data.prefetch import WorkerStream
from meshway.framework.data.rows import row_source
from meshway.framework.data.rows.mixing import Rates
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 16, "targets": 12}


@pytest.fixture(scope="module")
def caches(seqio, tmp_path_factory):
    """Where this module's tasks are cached; each when it is first asked for."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def data(caches):
    def make(name="tiny_a", converter=None, lengths=LENGTHS, batch_size=4, **more):
        more = {"cache_dir": str(caches), "num_workers": 0} | more
        return CachedData(name, lengths, batch_size, converter or EncoderDecoder(), **more)

    return make


def take(stream, count):
    return [next(stream) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_training_says_what_is_cut(data, capsys):
    """Of texts of 7 and 8 bytes and of 4, and of their EOS."""
    data("tiny_b", lengths={"inputs": 6, "targets": 3}).train(slice(None))
    said = "'tiny_b': 23 of 23 examples are longer than TASK_FEATURE_LENGTHS, and 34 % of all tokens in no row"
    assert said in capsys.readouterr().err
    data("tiny_b").train(slice(None))
    assert "longer" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny_a", "tiny_mix", "tiny_b"])
def test_a_stream_is_the_same_each_time_and_after_any_restart(data, name):
    """tiny_a draws random numbers after its cache, in TensorFlow; tiny_mix mixes both kinds."""
    whole = data(name, seed=3).train(slice(None))
    batches, states = [], [whole.state()]
    for _ in range(8):
        batches.append(next(whole))
        states.append(whole.state())
    assert_same(take(data(name, seed=3).train(slice(None)), 5), batches[:5])
    again = data(name, seed=3).train(slice(None))
    for at in (7, 2):
        again.restore(json.loads(json.dumps(states[at])))
        assert_same([next(again)], [batches[at]])
    other = take(data(name, seed=4).train(slice(None)), 1)
    assert not np.array_equal(other[0]["encoder_input_tokens"], batches[0]["encoder_input_tokens"])


def test_an_epoch_holds_every_example_and_fresh_randomness(seqio, data):
    epochs = []
    stream = data(converter=EncoderDecoder(pack=False), batch_size=23).train(slice(None))
    vocabulary = seqio.TaskRegistry.get("tiny_a").output_features["targets"].vocabulary
    for batch in take(stream, 3):
        targets = sorted(vocabulary.decode(row.tolist()) for row in batch["decoder_target_tokens"])
        assert targets == sorted(f"train {i}"[-4:] for i in range(23))
        epochs.append(sorted(map(tuple, batch["encoder_input_tokens"].tolist())))
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_cache_gives_what_the_task_gives(seqio, data):
    stream = data("tiny_lm", LanguageModel(pack=False), {"targets": 12}, 23, shuffle=False).train(slice(None))
    mine = sorted(row[at > 0].tolist() for row, at in _rows(next(stream)))
    task = seqio.TaskRegistry.get("tiny_lm")
    theirs = task.get_dataset({"targets": 12}, "train", shuffle=False, num_epochs=1)
    assert mine == sorted(example["targets"].tolist() for example in theirs.as_numpy_iterator())


def _rows(batch):
    return zip(batch["decoder_target_tokens"], batch["decoder_segment_ids"], strict=True)


@pytest.mark.parametrize("name", ["tiny_a", "tiny_mix"])
def test_slices_of_processes_join_to_the_batch(data, name):
    whole = take(data(name).train(slice(None)), 6)
    for share in (1, 2):
        parts = [take(data(name).train(slice(at, at + share)), 6) for at in range(0, 4, share)]
        joined = [{n: np.concatenate([p[n] for p in ps]) for n in ps[0]} for ps in zip(*parts, strict=True)]
        assert_same(joined, whole)


@pytest.mark.slow
def test_worker_processes_change_nothing(data):
    plain = take(data("tiny_b").train(slice(None)), 7)
    stream = data("tiny_b", num_workers=2).train(slice(None))
    assert isinstance(stream, WorkerStream)
    assert_same(take(stream, 4), plain[:4])
    state = stream.state()
    take(stream, 1)
    stream.restore(state)
    assert_same(take(stream, 3), plain[4:])
    with pytest.raises(UserError, match="TensorFlow.*cannot run in worker processes"):
        data("tiny_a", num_workers=2).train(slice(None))


def test_rates_change_from_a_step_on(data):
    stream = data("tiny_mix", rates=[Rates(5, {"tiny_a": 0})]).train(slice(None))
    take(stream, 5)
    before = stream.state()["tiny_a.rows"]
    take(stream, 5)
    assert stream.state()["tiny_a.rows"] == before > 0


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("tiny_mix", {"tiny_a": 1 / 4, "tiny_b": 3 / 4}),
        ("tiny_by_size", {"tiny_b": 3 / 7, "tiny_c": 4 / 7}),  # at temperature 2 and most 9, tiny_b counts for 3
        ("tiny_by_count", {"tiny_uncounted": 3 / 26, "tiny_c": 23 / 26}),  # 13 are cached, of which 9 count, hence 3
        ("tiny_of_counted", {"tiny_uncounted": 3 / 52, "tiny_c": 23 / 52, "tiny_few": 1 / 2}),
        ("tiny_of_mixtures", {"tiny_b": 9 / 49, "tiny_c": 12 / 49, "tiny_few": 4 / 7}),
    ],
)
def test_shares_are_seqio_s_rates(data, name, shares):
    stream = data(name, EncoderDecoder(pack=False), batch_size=100).train(slice(None))
    drawn = stream.drawn(1000)
    assert {task: count / 100_000 for task, count in drawn.items()} == pytest.approx(shares, rel=0.01)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_evaluation_covers_each_example_once_and_pads_the_last_batch(data, name, pack):
    (task,) = data(name, converter=EncoderDecoder(pack)).eval_tasks()
    batches = list(task.batches())
    assert task.num_examples == 7 and task.name == name
    tokens = sum(len(f"validation {i}"[-4:]) + 1 for i in range(7))
    assert sum(batch["decoder_loss_weights"].sum() for batch, _ in batches) == tokens
    last, real = batches[-1]
    assert not last["decoder_loss_weights"][real:].any()
    fresh = data(name, converter=EncoderDecoder(pack), seed=99).eval_tasks()[0]
    assert_same([batch for batch, _ in fresh.batches()], [batch for batch, _ in batches])


def test_metrics_are_the_task_s_own(data):
    (task,) = data(eval_examples=3).eval_tasks()
    assert task.num_examples == 3 and task.has_metrics
    predictions = [task.target(index) for index in range(3)]
    assert len(set(predictions)) == 3 and task.metrics(predictions).values["accuracy"] == 100.0


def test_without_seqio_a_cache_is_enough(data, caches):
    """A GPU box without TensorFlow: batches are the same, vocabularies come with the cache, metrics are left out."""
    expected = take(data("tiny_c").train(slice(None)), 3)
    np.savez(caches / "expected.npz", **{f"{i}.{name}": x for i, b in enumerate(expected) for name, x in b.items()})
    code = f"""if True:
        import sys
        sys.modules["tensorflow"] = sys.modules["seqio"] = None
        import numpy as np
        from meshway.framework.data.features import EncoderDecoder
        from meshway.framework.data.grain_loader import CachedData
        data = CachedData("tiny_c", {LENGTHS}, 4, EncoderDecoder(), cache_dir={str(caches)!r}, num_workers=0)
        expected = np.load({str(caches / "expected.npz")!r})
        for i, batch in zip(range(3), data.train(slice(None))):
            for name, array in batch.items():
                np.testing.assert_array_equal(array, expected[f"{{i}}.{{name}}"])
        assert data.vocabularies()["targets"].decode([100, 101]) == "ab"
        (task,) = data.eval_tasks()
        assert not task.has_metrics and task.inputs_text(0).startswith("validation")
        assert "seqio is not installed" in task.left_out[0]
        assert sum(real for _, real in task.batches()) > 0
        try:
            CachedData("tiny_x", {LENGTHS}, 4, EncoderDecoder(), cache_dir={str(caches)!r}).train(slice(None))
        except Exception as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no cache of 'tiny_x'" in done.stdout and "without seqio and TensorFlow none can be built" in done.stdout


MISTAKES = [
    ({"name": "tiny_aa"}, "registered as 'tiny_aa'.*did you mean 'tiny_a'"),
    ({"module": "no_such_package.tasks"}, "'no_such_package.tasks'.*not found: no 'no_such_package'"),
    ({"train_split": "trian"}, "no split 'trian' for training.*did you mean 'train'"),
    ({"lengths": {"inputs": 4}}, "TASK_FEATURE_LENGTHS lacks 'targets'"),
    ({"name": "tiny_float"}, "'tiny_float'.*'inputs'"),
    ({"name": "tiny_own"}, "mixture 'tiny_own' has a sample_fn of its own"),
    ({"name": "tiny_below_0"}, "'tiny_below_0': the rate of task 'tiny_c' must be at least 0, not -1.0"),
    ({"name": "tiny_below_0_twice"}, "'tiny_below_0': the rate of task 'tiny_c' must be at least 0, not -1.0"),
    ({"name": "tiny_of_below_0"}, "'tiny_of_below_0': the rate of mixture 'tiny_mix' must be at least 0, not -2.0"),
    ({"name": "tiny_no_number"}, "'tiny_no_number': the rate of task 'tiny_c' must be at least 0, not nan"),
    ({"name": "tiny_mix", "rates": [Rates(0, {"tiny_a": 0, "tiny_b": 0})]}, "no task with a rate above 0"),
    *(
        (
            {"name": "tiny_silent", "converter": converter, "lengths": lengths},
            f"'tiny_silent': 'targets', which {type(converter).__name__} reads, is empty in every example",
        )
        for converter, lengths in [
            (LanguageModel(), {"targets": 8}),
            (LanguageModel(inputs=True), LENGTHS),
            (MaskedLanguageModel(), {"targets": 8}),
            (PrefixLanguageModel(), LENGTHS),
            (SpanCorruption(), LENGTHS),
        ]
    ),
    ({"name": "tiny_silent"}, "'tiny_silent': 'targets', which EncoderDecoder reads, is empty in every example"),
    ({"seed": -1}, "CachedData.seed must be a whole number of at least 0"),
    ({"rates": [Rates(3, {"tiny_q": 1})]}, "no task 'tiny_q'"),
    ({"name": "tiny_lm", "converter": PrefixLanguageModel()}, "task 'tiny_lm' has no feature 'inputs'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_end_in_one_message(data, arguments, message):
    with pytest.raises(UserError, match=message):
        next(data(**arguments).train(slice(None)))


@pytest.mark.parametrize("of", ["tiny_a", "tiny_mix", "tiny_of_counted"])
def test_a_dry_run_makes_no_cache_and_says_what_a_run_would_read(data, tmp_path, of):
    """Before the cache as after it: the same tasks and specs. Before it counts are the sources'."""
    dry = data(of, cache_dir=str(tmp_path)).for_dry_run()
    spec, names, before = dry.train(slice(None)).spec(), [task.name for task in dry.eval_tasks()], dry.reads(True)
    assert dry.vocabularies()["targets"].size == 269 and dry.framing().stop == (1,)
    assert not list(tmp_path.iterdir()) and not any(each.cached for each in before)
    real = data(of)
    tasks = real.eval_tasks()
    assert real.train(slice(None)).spec() == spec and [task.name for task in tasks] == names
    after = real.for_dry_run().reads(True)
    assert [each[:3] for each in after] == [each[:3] for each in before] and all(each.cached for each in after)
    assert [each.examples for each in after if each.purpose == "evaluation"] == [task.num_examples for task in tasks]
    for early, late in zip(before, after, strict=True):
        assert (early.examples > late.examples) == (early[:2] == ("tiny_uncounted", "train")), "its source has more"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[(each, message) for each, message in MISTAKES if each.get("name") != "tiny_silent"],
        ({"name": "tiny_broken"}, "'tiny_broken', preprocessor 1 of 1 .crash.: KeyError: 'no such field'"),
        ({"name": "tiny_b", "build": False}, "not cached in .*tiny_b/train"),
        ({"converter": LanguageModel()}, "task 'tiny_a' has 'inputs', which LanguageModel reads where"),
        (
            {"name": "tiny_a", "num_workers": 2},
            "'tiny_a' has steps after the cache that need TensorFlow, or a converter",
        ),
    ],
)
def test_a_dry_run_finds_the_same_mistakes(data, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        data(**{"cache_dir": str(tmp_path)} | arguments).for_dry_run().train(slice(None))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_knows_inputs_that_are_always_empty(seqio, data, tmp_path):
    """T5's text tasks: once cached they have no `inputs`, which a language model would not take."""
    kept = seqio.TaskRegistry.get("tiny_c")
    blank = seqio.map_over_dataset(lambda example: example | {"inputs": ""})
    inputs = seqio.Feature(kept.output_features["inputs"].vocabulary, add_eos=False)
    features = dict(kept.output_features) | {"inputs": inputs}
    seqio.TaskRegistry.add("tiny_text", kept.source, features, [blank, *kept.preprocessors])
    alone = {"name": "tiny_text", "converter": LanguageModel(), "lengths": {"targets": 12}}
    dry = data(**alone, cache_dir=str(tmp_path)).for_dry_run()
    assert dry.train(slice(None)).spec() == data(**alone).train(slice(None)).spec()
    assert not list(tmp_path.iterdir())


def test_a_missing_cache_is_built_or_named(data, tmp_path):
    with pytest.raises(UserError, match="not cached in .*tiny_b/train.*meshway cache --task=tiny_b --module=math"):
        data("tiny_b", cache_dir=str(tmp_path), build=False, module="math").train(slice(None))
    next(data("tiny_b", cache_dir=str(tmp_path)).train(slice(None)))
    assert not cache_builder.missing("tiny_b", [], tmp_path)


def test_a_missing_shard_and_a_flipped_byte_are_found(data, tmp_path):
    next(data("tiny_b", cache_dir=str(tmp_path)).train(slice(None)))
    shard = next(
        path for path in sorted((tmp_path / "tiny_b/train").glob("*.array_record")) if path.stat().st_size > 99
    )
    content = bytearray(shard.read_bytes())
    content[-20 if len(content) < 200 else len(content) - 100] ^= 1
    kept = shard.read_bytes()
    for at in range(0, len(kept), 7):
        content = bytearray(kept)
        content[at] ^= 1
        shard.write_bytes(bytes(content))
        try:
            take(
                data("tiny_b", EncoderDecoder(pack=False), cache_dir=str(tmp_path), shuffle=False).train(slice(None)), 6
            )
        except UserError as error:
            assert shard.name in str(error) and "corrupt" in str(error)
            break
    else:
        pytest.fail("no flipped byte was noticed")
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks a shard: .*{shard.name}.*meshway cache"):
        data("tiny_b", cache_dir=str(tmp_path)).train(slice(None))


def test_a_text_that_begins_with_its_start_has_it_once(data):
    source = data("tiny_spelled", LanguageModel(pack=False), {"targets": 8}, start=[1])
    (task,) = source.eval_tasks()
    for batch in (next(source.train(slice(None))), next(task.batches())[0]):
        assert (batch["decoder_input_tokens"][:, :2] == 1).sum(axis=1).tolist() == [1] * 4
        assert batch["decoder_input_tokens"][:, 0].tolist() == [1] * 4
        assert (batch["decoder_target_tokens"][:, 0] == batch["decoder_input_tokens"][:, 1]).all()


def test_rows_are_counted_once_for_all_runs_of_a_cache(data, caches, monkeypatch):
    monkeypatch.setattr(row_source, "POOL_ITEMS", 4)
    new = data("tiny_b", seed=5)
    expected = [new.train(slice(None)).batch(number) for number in (3, 900)]  # the second is far beyond the first pass
    (path,) = (caches / "tiny_b" / "train").glob("rows.*.0.json")
    assert new.count_rows() == {"tiny_b": [sum(json.loads(path.read_text())["rows"])]}
    monkeypatch.delattr(row_source.RowSource, "count")
    again = data("tiny_b", seed=5)
    assert_same([again.train(slice(None)).batch(number) for number in (3, 900)], expected)
    assert again.count_rows() == new.count_rows()
