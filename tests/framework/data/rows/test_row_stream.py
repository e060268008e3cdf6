import numpy as np
import pytest
from tasks_in_memory import random_examples, task

from meshway.framework.data.features import EncoderDecoder
from meshway.framework.data.prefetch import BatchSizes, TrainingStream, check_not_trained, left_out
from meshway.framework.data.rows.mixing import Rates
from meshway.framework.data.rows.row_source import RowSource
from meshway.framework.data.rows.row_stream import RowStream
from meshway.framework.errors import UserError

LENGTHS = {"inputs": 24, "targets": 16}
COUNTS = {"a": 300, "b": 40, "c": 120}


def stream(
    rates=None, pack=True, rows=slice(0, 8), batch_size=8, changes=(), seed=0, limit=None, names="abc", lengths=LENGTHS
):
    converter = EncoderDecoder(pack)
    sources = []
    for place, name in enumerate(names):
        objective = converter.bind(task("inputs", "targets", name=name), lengths)
        examples = random_examples(COUNTS[name], longest=(20, 5, 12)[place], seed=place)
        sources.append(RowSource(name, examples, objective, pack, seed=seed))
    rates = rates or {"a": 1.0, "b": 0.5, "c": 2.5}
    spec = converter.spec(lengths, batch_size)
    return RowStream("mix", sources, rates, changes, spec, batch_size, rows, seed, limit)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("pack", [True, False])
def test_processes_join_to_the_batch_of_one(pack):
    whole = take(stream(pack=pack), 12)
    for share in (4, 2):
        parts = [take(stream(pack=pack, rows=slice(at, at + share)), 12) for at in range(0, 8, share)]
        assert_same([{n: np.concatenate([p[n] for p in ps]) for n in ps[0]} for ps in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("pack", [True, False])
def test_a_restart_goes_on_as_if_it_had_never_stopped(pack):
    changes = [Rates(5, {"a": 4.0}), Rates(9, {"b": 0.0})]
    whole = stream(pack=pack, changes=changes)
    batches, states = [], [whole.state()]
    for _ in range(12):
        batches.append(next(whole))
        states.append(whole.state())
    again = stream(pack=pack, changes=changes)
    for at in (11, 3, 0, 7):
        again.restore(states[at])
        assert_same([next(again)], [batches[at]])
        assert again.state() == states[at + 1]
    again.seek(6)
    assert_same([next(again)], [batches[6]])
    assert all(isinstance(value, int) for value in states[-1].values())


@pytest.mark.parametrize("pack", [True, False])
def test_shares_are_the_rates_in_examples(pack):
    rates = {"a": 0.2, "b": 0.05, "c": 0.75}
    batches = stream(rates, pack, batch_size=1000, rows=slice(0, 1000))
    drawn, row = dict.fromkeys(rates, 0), 0
    while sum(drawn.values()) < 100_000:
        row += 1
        for source, count in zip(batches.sources, batches.drawn(row).values(), strict=True):
            drawn[source.name] = int(count * source.items_per_row)
    total = sum(drawn.values())
    assert all(abs(drawn[name] / total / rate - 1) < 0.01 for name, rate in rates.items())


def test_new_rates_leave_the_order_within_each_source():
    """Each source's rows come in the same order, whatever the rates do meanwhile."""

    class Named:
        """Rows that say where they come from."""

        items_per_row = 1.0

        def __init__(self, name):
            self.name = name

        def take(self, numbers):
            return {"row": np.stack([np.full(len(numbers), ord(self.name)), numbers], axis=1)}, len(numbers)

    def drawn(changes):
        spec = {"row": ((10, 2), np.dtype(np.int64))}
        batches = RowStream("m", [Named("a"), Named("b")], {"a": 1, "b": 3}, changes, spec, 10, slice(0, 10))
        return [next(batches)["row"] for _ in range(20)]

    plain, changed = drawn([]), drawn([Rates(7, {"a": 9.0})])
    for before, after in zip(plain[:7], changed[:7], strict=True):
        np.testing.assert_array_equal(before, after)
    for name in "ab":
        rows = [row[1] for batch in changed for row in batch if row[0] == ord(name)]
        assert rows == list(range(len(rows)))
    share = np.mean(np.concatenate(changed[7:])[:, 0] == ord("a"))
    assert abs(share - 0.75) < 0.02


def test_rates_edited_between_runs_hold_from_the_restart_and_lose_no_example():
    first = stream({"a": 1.0, "b": 1.0, "c": 1.0})
    take(first, 9)
    state = first.state()
    edited = stream({"a": 0.0, "b": 1.0, "c": 1.0})
    edited.restore(state)
    assert edited.state() == state
    take(edited, 10)
    after = edited.state()
    assert after["a.rows"] == state["a.rows"]
    assert after["b.rows"] - state["b.rows"] + after["c.rows"] - state["c.rows"] == 80
    for batches in (3, 5, 8):  # each restart from what the one before left
        again = stream({"a": 0.0, "b": 1.0, "c": 1.0})
        again.restore(after)
        assert_same(take(again, batches), take(edited, batches))
        assert again.state() == edited.state()
        after = again.state()


def test_another_batch_size_goes_on_at_the_same_row():
    small = stream(pack=False)
    take(small, 6)
    rows = take(small, 4)
    state = stream(pack=False).state() | {"batch": 6, "rows": 48}
    small.seek(6)
    large = stream(pack=False, batch_size=16, rows=slice(0, 16))
    large.restore(small.state() | {})
    assert state["rows"] == 48
    expected = [{n: np.concatenate([rows[i][n], rows[i + 1][n]]) for n in rows[i]} for i in (0, 2)]
    assert_same(take(large, 2), expected)


@pytest.mark.parametrize("pack", [True, False])
def test_a_limit_ends_exactly_and_pads_the_last_batch(pack):
    batches = list(stream(pack=pack, limit=21))
    assert len(batches) == 3
    assert not batches[-1]["decoder_segment_ids"][5:].any() and not batches[-1]["decoder_loss_weights"][5:].any()
    assert_same(
        [{n: a[:5] for n, a in batches[-1].items()}], [{n: a[:5] for n, a in take(stream(pack=pack), 3)[2].items()}]
    )
    late = stream(pack=pack, limit=21, rows=slice(4, 8))
    assert len(list(late)) == 3


def test_a_position_of_other_data_or_another_seed_is_refused():
    with pytest.raises(UserError, match="does not fit 'mix'.*another MIXTURE_OR_TASK_NAME"):
        stream().restore({"epoch": 1, "row": 2})
    state = stream().state()
    with pytest.raises(UserError, match="of SEED=0, this run's is 5"):
        stream(seed=5).restore(state)


def test_rows_laid_out_otherwise_are_refused():
    before = stream()
    take(before, 3)
    with pytest.raises(UserError, match="task 'a': .*laid out differently.*TASK_FEATURE_LENGTHS, PACK"):
        stream(pack=False).restore(before.state())
    with pytest.raises(UserError, match="laid out differently"):
        stream(lengths={"inputs": 24, "targets": 17}).restore(before.state())


def test_a_task_added_later_starts_at_its_beginning():
    both = stream({"a": 1.0, "b": 1.0}, names="ab")
    take(both, 5)
    more = stream({"a": 1.0, "b": 1.0, "c": 1.0})
    more.restore(both.state())
    assert more.state()["c.rows"] == 0
    take(more, 3)
    assert more.state()["c.rows"] > 0


SIZES = BatchSizes(16, [(3, 4), (6, 8)])


def resizing(sizes=SIZES, skipped=(), share=None, **options):
    """A stream whose batches change their size; `share` (i, n) reads the i-th of n shares of each batch's rows."""

    def opened(size):
        i, n = share or (0, 1)
        return stream(batch_size=size, rows=slice(i * size // n, (i + 1) * size // n), **options)

    return TrainingStream(opened, sizes, skipped)


def rows_of(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_batches_of_several_sizes_hold_each_row_once():
    batches = take(resizing(names="a", rates={"a": 1.0}), 9)
    assert [len(batch["decoder_input_tokens"]) for batch in batches] == [4] * 3 + [8] * 3 + [16] * 3
    assert_same([rows_of(batches)], [rows_of(take(stream(names="a", rates={"a": 1.0}, batch_size=4), 21))])
    parts = [take(resizing(share=(i, 2)), 9) for i in (0, 1)]
    assert_same([{n: np.concatenate([p[n] for p in ps]) for n in ps[0]} for ps in zip(*parts)], take(resizing(), 9))


def test_a_restart_amid_a_schedule_goes_on_as_if_it_had_never_stopped():
    """Of a mixture whose rates change too: where a size begins, rows are interleaved from there."""
    changes = [Rates(5, {"a": 4.0}), Rates(8, {"b": 0.0})]
    whole = resizing(changes=changes)
    batches, states = [], [whole.state()]
    for _ in range(11):
        batches.append(next(whole))
        states.append(whole.state())
    for at in (10, 3, 4, 0, 6, 7):
        again = resizing(changes=changes)
        again.restore(states[at])
        assert_same(take(again, 11 - at), batches[at:])
    other = resizing(BatchSizes(8))  # another schedule: it continues after the same rows
    other.restore(states[4])
    assert other.state() == states[4] and len(next(other)["decoder_input_tokens"]) == 8


@pytest.mark.parametrize("sizes", [SIZES, BatchSizes(8)])
def test_batches_are_skipped_unread(sizes):
    whole = take(resizing(sizes), 12)
    some = resizing(sizes, [(3, 5), (7, 7), (8, 8)])
    assert_same(take(some, 4), [whole[0], whole[1], whole[5], whole[8]])
    assert some.state()["batch"] == 9, "its position counts what was left out"
    state = some.state()
    assert left_out(state) == {3: 5, 7: 7, 8: 8}
    again = resizing(sizes, [(3, 5), (10, 11)])  # asked for only now, in a run that goes on
    again.restore(state)
    assert_same(take(again, 1), [whole[11]])
    later = resizing(sizes)  # nothing is asked for any more, and what was left out is known still
    later.restore(again.state())
    take(later, 1)
    assert left_out(later.state()) == {3: 5, 7: 7, 8: 8, 10: 11}


@pytest.mark.parametrize(
    "skipped, kept, message",
    [
        ([(3, 5), (7, 7), (11, 20)], [2, 6], None),
        ([(3, 4)], [2, 6], None),
        ([(2, 5)], [2, 6], r"batches 2 to 2 .* in steps 2 to 2, and the run goes on from checkpoint 6: begin anew"),
        ([(8, 8), (1, 3)], [6], "batches 1 to 2, 8 to 8 were trained already, in steps 1 to 4, and .* 6: begin anew"),
        ([(6, 20)], [1, 2, 6], r"batches 6 to 10 were .* in steps 3 to 6, and .* 6: go back to checkpoint 2, by remov"),
    ],
)
@pytest.mark.parametrize("first", [0, 100])
def test_batches_that_were_trained_cannot_be_left_out(skipped, kept, message, first):
    """At the sixth step of a run that took batches 1, 2, 6, 8, 9, 10."""
    position = {"batch": 10, "rows": 40, "skipped.3": 5, "skipped.7": 7, "skipped.rows": 40}
    if message is None:
        check_not_trained(skipped, position, first + 6, first, [first + step for step in kept])
        return
    with pytest.raises(UserError, match=message if not first else "go back to checkpoint 102|begin anew"):
        check_not_trained(skipped, position, first + 6, first, [first + step for step in kept])


def test_a_checkpoint_that_does_not_say_what_was_left_out_is_believed_where_the_numbers_agree():
    check_not_trained([(3, 5), (7, 7)], {"batches": 10}, 6, 0, [6])
    check_not_trained([(3, 5), (7, 7)], {"position": 10}, 6, 0, [6])  # data of one's own, which does not tell
    with pytest.raises(UserError, match="batches 3 to 7 were trained already"):
        check_not_trained([(3, 7)], {"batches": 10}, 6, 0, [6])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: BatchSizes(8, [(5, 4), (5, 8)]), "steps must rise"),
        (lambda: BatchSizes(8, [(5, 0)]), "sizes be at least 1"),
        (lambda: BatchSizes(8, [5, 4]), r"has 5, not \(last step"),
        (lambda: resizing(skipped=[(4, 3)]), r"SKIP_BATCHES has \(4, 3\)"),
        (lambda: resizing(skipped=[("a", "b")]), r"SKIP_BATCHES has \('a', 'b'\)"),
        (lambda: TrainingStream(lambda size: Counting(), SIZES), "counts batches, not examples"),
        (lambda: TrainingStream(lambda size: Counting("at"), BatchSizes(8), [(2, 3)]), "does not number its batches"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()


class Counting:
    """A stream of batches that cannot be told in rows."""

    def __init__(self, name="batches"):
        self.name = name

    def state(self):
        return {self.name: 0}
