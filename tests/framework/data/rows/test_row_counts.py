"""Rows of pools are counted once and kept: batches are the same with and without that, and what is held stays small."""

import json
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tasks_in_memory import random_examples, task

from meshway.framework.data.denoising import MixtureOfDenoisers, SpanCorruption
from meshway.framework.data.features import EncoderDecoder, LanguageModel
from meshway.framework.data.rows import examples as row_examples
from meshway.framework.data.rows import row_counts, row_source
from meshway.framework.data.rows.examples import InMemory, ItemNumbers, sizes_at
from meshway.framework.data.rows.packing import best_fit, count_rows
from meshway.framework.data.rows.row_counts import RowTable
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.errors import UserError

CONVERTERS = [EncoderDecoder(), LanguageModel(), SpanCorruption(), MixtureOfDenoisers(), EncoderDecoder(pack=False)]
LENGTHS = {"inputs": 40, "targets": 40}


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(row_source, "POOL_ITEMS", 40)


def source(count, converter=CONVERTERS[0], table=None, seed=0, name="a_task"):
    names = ("targets",) if isinstance(converter, SpanCorruption | MixtureOfDenoisers) else converter.task_features
    lengths = {feature: LENGTHS[feature] for feature in converter.task_features}
    objective = converter.bind(task(*names), lengths)
    examples = random_examples(count, names, 90, seed=count)
    return RowSource(name, examples, objective, converter.pack, True, seed, table=table)


def stream(sources, converter, seed=0):
    spec = converter.spec({name: LENGTHS[name] for name in converter.task_features}, 8)
    rates = {one.name: 1.0 + place for place, one in enumerate(sources)}
    return RowStream("m", sources, rates, (), spec, 8, slice(2, 14), seed)


def forbidden(*_):
    raise AssertionError("nothing is to be counted")


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(240, 400), min_size=1, max_size=2),
    converter=st.sampled_from(CONVERTERS),
    seed=st.integers(0, 99),
    batches=st.lists(st.integers(0, 150), min_size=3, max_size=3),
)
def test_batches_are_the_same_with_a_table_and_without(counts, converter, seed, batches, tmp_path_factory):
    """Walked to pool by pool, sought with rows counted on the way, and sought with rows from the table."""
    tables = [RowTable([tmp_path_factory.mktemp("rows")], f"examples {count}") for count in counts]

    def opened(kept):
        arguments = zip(counts, kept, strict=True)
        return stream([source(n, converter, t, seed, f"t{i}") for i, (n, t) in enumerate(arguments)], converter, seed)

    without, counting = opened([None] * len(counts)), opened(tables)
    walked = {number: batch for number, batch in zip(range(max(batches) + 1), without, strict=False)}
    for one in counting.sources:
        one.count_rounds()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RowSource, "count", forbidden)
        kept = opened(tables)
    for one in kept.sources:
        one.count = forbidden
    for number in batches:
        for found in (kept, counting, opened([None] * len(counts))):
            for name, array in found.batch(number).items():
                np.testing.assert_array_equal(array, walked[number][name], err_msg=name)
        for found in (kept, without):
            found.seek(number)
        assert kept.state() == without.state()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=80),
    features=st.integers(1, 2),
)
def test_counting_rows_is_packing_them(sizes, features):
    table = np.array(sizes, np.int64).reshape(-1, 2)
    columns = {name: table[:, place] for place, name in enumerate(("inputs", "targets")[:features])}
    capacity = dict(list({"inputs": 20, "targets": 9}.items())[:features])
    assert count_rows(columns, capacity) == best_fit(columns, capacity).num_rows


@pytest.mark.parametrize("converter", [LanguageModel(), EncoderDecoder(overlong="skip")])
def test_items_of_a_corpus_are_those_of_a_small_task(monkeypatch, converter):
    names = converter.task_features
    examples = random_examples(1001, names, 150)
    objective = converter.bind(task(*names), {name: 30 for name in names})
    small = ItemNumbers(examples, objective)
    monkeypatch.setattr(row_examples, "_TOGETHER", 256)
    together = ItemNumbers(examples, objective)
    np.testing.assert_array_equal(together._ends, small._ends)
    monkeypatch.setattr(row_examples, "_EACH", 1000)
    large = ItemNumbers(examples, objective)
    assert large.total == small.total and len(large._ends) <= 1001 / 64 + 4
    chosen = np.random.default_rng(0).permutation(large.total)
    for ours, theirs in zip(large.at(chosen, chosen), small.at(chosen, chosen), strict=True):
        np.testing.assert_array_equal(ours, theirs)


DAMAGE = {
    "half": lambda text: text[: len(text) // 2],
    "a count": lambda text: text.replace('"rows": [', '"rows": [3, '),
    "another number": lambda text: json.dumps(json.loads(text) | {"rows": [1] * len(json.loads(text)["rows"])}),
    "another seed": lambda text: text.replace('"key": ', '"key": 1'),
    "no object": lambda text: "[]",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_counted_again_with_a_word(tmp_path, capsys, damage):
    table = RowTable([tmp_path], "these")
    whole = source(400, table=table).count_rounds()
    (path,) = tmp_path.glob("rows.*.json")
    text = path.read_text()
    path.write_text(DAMAGE[damage](text))
    assert source(400, table=table).count_rounds() == whole
    assert "is damaged or of other data: rows are counted again" in capsys.readouterr().err
    assert path.read_text() == text and [path] == list(tmp_path.iterdir())


def test_a_table_with_wrong_counts_is_found_out_by_the_first_plan(tmp_path, capsys):
    table = RowTable([tmp_path], "these")
    one = source(400, table=table)
    one.count_rounds()
    table.save(one._identity, 0, one._rows[0] + 1)
    found, _ = source(400, table=table).take(np.arange(50, 90))
    expected, _ = source(400).take(np.arange(50, 90))
    np.testing.assert_array_equal(found["decoder_target_tokens"], expected["decoder_target_tokens"])
    assert "the kept rows of 'a_task' are wrong" in capsys.readouterr().err


def test_an_objective_that_measures_otherwise_each_time_is_told():
    one = source(400)
    one.count_rounds()
    one._rows += 1
    with pytest.raises(UserError, match="task 'a_task': TokenObjective.measure gives other sizes of the same items"):
        one.take(np.arange(4))


@pytest.mark.parametrize("changed", [pytest.param("seed", marks=pytest.mark.slow), "examples", "lengths", "policy"])
def test_rows_of_anything_else_are_not_used(tmp_path, changed):
    table = RowTable([tmp_path], "these")
    source(1200, table=table).count_rounds()
    if changed == "examples":
        table = RowTable([tmp_path], "those")
    if changed in ("seed", "examples"):
        source(1200, table=table, seed=int(changed == "seed")).count_rounds()
    else:
        converter = EncoderDecoder(overlong="skip" if changed == "policy" else "truncate")
        objective = converter.bind(task("inputs", "targets"), {"inputs": 40, "targets": 41 - (changed == "policy")})
        RowSource("a_task", random_examples(1200, longest=90, seed=1200), objective, True, table=table).count_rounds()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("others", [0, 1])
def test_a_cache_that_may_only_be_read_has_its_rows_elsewhere(tmp_path, others):
    (tmp_path / "file").write_text("")
    folders = [tmp_path / "file" / "cache", tmp_path / "own"][: 1 + others]
    rows = source(400, table=RowTable(folders, "these")).count_rounds()
    assert rows == source(400).count_rounds()
    assert len(list(tmp_path.glob("own/rows.*.json"))) == others


def test_one_process_counts_while_others_wait(tmp_path, monkeypatch):
    table = RowTable([tmp_path], "these")
    monkeypatch.setattr(row_counts, "_RETRY_SECONDS", 0.01)
    one = source(400, table=table)
    rows = source(400).count_rounds()
    lock = table.claim(one._identity, 0)
    monkeypatch.setattr(RowSource, "count", forbidden)
    waiting = threading.Thread(target=one.count_rounds)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    other = np.diff(np.linspace(0, rows[0], one._num_pools + 1).astype(int))
    table.save(one._identity, 0, other)
    table.release(one._identity, 0, lock)
    waiting.join(10)
    assert one._rows[0].tolist() == other.tolist() and not list(tmp_path.glob("*.lock"))


@pytest.mark.slow
def test_other_processes_count_the_same(tmp_path, monkeypatch):
    rows = source(3000).count_rounds()
    one = source(3000)
    monkeypatch.setattr(RowSource, "count", forbidden)  # in this process
    assert sum(row_counts.count(one, 0, np.arange(one._num_pools), 2)) == sum(rows)
    monkeypatch.setattr(row_counts, "PARALLEL", 2)
    table = RowTable([tmp_path], "these")
    ahead = source(3000, table=table)
    started = []
    monkeypatch.setattr(row_counts, "ahead", lambda work: started.append(threading.Thread(target=work)))
    ahead.take(np.arange(4))
    ahead.take(np.arange(4, 8))
    (background,) = started  # once
    background.start()
    background.join(60)
    assert source(3000, table=table).count_rounds() == rows
    sent = pickle.loads(pickle.dumps(ahead))
    sent.take(np.arange(4))
    assert len(started) == 1  # not in processes that a source is sent to


def test_what_another_process_cannot_count_this_one_does(monkeypatch, capsys):
    rows = source(300).count_rounds()
    monkeypatch.setattr(row_counts, "_CHILD", "raise SystemExit(1)")
    one = source(300)
    assert sum(row_counts.count(one, 0, np.arange(one._num_pools), 1)) == sum(rows)
    assert (row_counts.count(one, 0, np.arange(one._num_pools), 1, quiet=True) == -1).all()


class Synthetic:
    """Any number of examples, of which only sizes are asked."""

    def __init__(self, count):
        self._count = count

    def __len__(self):
        return self._count

    def sizes_at(self, which):
        numbers = np.arange(*which.indices(self._count)) if isinstance(which, slice) else which
        return {"targets": (numbers % 71).astype(np.int32)}


def test_memory_does_not_grow_with_the_corpus(monkeypatch, tmp_path):
    """By what numpy and Python allocate, and by what a source holds: an eighth of a byte an example, and its counts."""
    monkeypatch.setattr(row_source, "POOL_ITEMS", 16384)
    monkeypatch.setattr(row_source.RowSource, "count", lambda self, phase, pool: 4000)
    monkeypatch.setattr(row_counts, "_sent", lambda source: None)  # this process counts
    monkeypatch.setattr(row_examples.os, "cpu_count", lambda: 1)  # one thread: else it is chance what coincides
    objective = LanguageModel().bind(task("targets"), {"targets": 40})
    peaks, held = [], []
    for millions in (2, 14):
        tracemalloc.start()
        one = RowSource("a_task", Synthetic(millions << 20), objective, True, table=RowTable([tmp_path], "these"))
        one.locate(one.count_rounds()[0] * 5 - 1)
        one._measured(0, one._pool_members(1))
        peaks.append(tracemalloc.get_traced_memory()[1] >> 20)
        tracemalloc.stop()
        held.append(len(pickle.dumps(one)))
    assert held[1] - held[0] < (12 << 20) / 7  # 1/8 byte an example, and 8 bytes for 16,384 items
    assert peaks[1] < 1.2 * peaks[0] + 4 and peaks[0] < 80, peaks


def test_sizes_of_some_examples():
    examples = random_examples(50)
    for which in (slice(3, 9), np.array([4, 2, 2])):
        for name, column in sizes_at(examples, which).items():
            np.testing.assert_array_equal(column, examples.sizes[name][which])
    few = row_examples.First(InMemory([examples.read([i])[0] for i in range(50)]), 5)
    assert len(sizes_at(few, slice(0, 50))["inputs"]) == 5


@pytest.mark.parametrize("converter", [EncoderDecoder(), MixtureOfDenoisers()])
def test_a_row_is_in_the_pass_in_which_it_is_counted(converter):
    rows = [source(600, converter).rows_in_round(number) for number in range(17)]
    one = source(600, converter)
    for number in (16, 0, 15, 7, 8):
        first = sum(rows[:number])
        assert [one.locate(first + at).round for at in (0, rows[number] - 1)] == [number, number]
        assert one.locate(first)[1:] == (0, 0)
