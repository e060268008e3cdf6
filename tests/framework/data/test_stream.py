import collections

import numpy as np
import pytest

from meshway.framework.data.features import LanguageModel
from meshway.framework.data.stream import Mixer, RowStream, Source, epoch_seed, permutation
from meshway.framework.errors import UserError

LENGTHS = {"targets": 8}


def source(name, count, base, rate=1.0, reads=None):
    """Examples [base + i, epoch, ...]: who they are, and which epoch made them."""

    def read(epoch):
        if reads is not None:
            reads.append((name, epoch))
        return [{"targets": np.array([base + i, epoch] + [1] * (i % 4))} for i in range(count)]

    return Source(name, rate, read)


def stream(sources, batch_size=4, rows=slice(None), pack=True, seed=0, shuffle=True):
    return RowStream("t", Mixer(sources, seed, shuffle), LanguageModel(pack), LENGTHS, batch_size, rows)


ONE = [source("a", 11, 100)]
SEVERAL = [source("a", 11, 100, 1.0), source("b", 5, 200, 1.0), source("c", 30, 300, 2.0)]


def same(left, right):
    return all(np.array_equal(left[name], right[name]) for name in left) and set(left) == set(right)


def examples_of(batches):
    """Returns (who, epoch) of each segment in unpacked or packed batches."""
    found = []
    for batch in batches:
        tokens, positions = batch["decoder_target_tokens"], batch["decoder_positions"]
        heads = (positions == 0) & (batch["decoder_segment_ids"] > 0)
        found += [(int(tokens[r, c]), int(tokens[r, c + 1])) for r, c in np.argwhere(heads)]
    return found


@pytest.mark.parametrize("sources", [ONE, SEVERAL])
@pytest.mark.parametrize("pack", [True, False])
def test_restart_at_every_position_equals_no_restart(sources, pack):
    whole = stream(sources, pack=pack)
    states, batches = [whole.state()], []
    for _ in range(25):
        batches.append(next(whole))
        states.append(whole.state())
    for at in range(25):
        again = stream(sources, pack=pack)
        again.restore(states[at])
        assert again.state() == states[at]
        for offset in range(min(3, 25 - at)):
            assert same(next(again), batches[at + offset])
            assert again.state() == states[at + offset + 1]
    for at in (24, 1, 13):  # an open stream goes back and forth as well
        whole.restore(states[at])
        assert same(next(whole), batches[at])


@pytest.mark.parametrize("sources", [ONE, SEVERAL])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_row_slices_of_any_process_count_make_the_same_batches(sources, processes):
    whole = stream(sources)
    step = 4 // processes
    parts = [stream(sources, rows=slice(i * step, (i + 1) * step)) for i in range(processes)]
    for _ in range(12):
        expected, found = next(whole), [next(part) for part in parts]
        joined = {name: np.concatenate([part[name] for part in found]) for name in expected}
        assert same(joined, expected)
        assert all(part.state() == whole.state() for part in parts)


def test_each_epoch_has_every_example_once_and_in_its_own_order():
    unpacked = stream(ONE, batch_size=1, pack=False)
    epochs = [[who for who, _ in examples_of(next(unpacked) for _ in range(11))] for _ in range(3)]
    assert all(sorted(epoch) == list(range(100, 111)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_batches_straddle_epochs_and_drop_nothing():
    batches = stream(ONE, batch_size=4, pack=False)
    found = examples_of(next(batches) for _ in range(11))  # 44 rows: four epochs of 11
    assert sorted(found) == sorted((100 + i, epoch) for i in range(11) for epoch in range(4))


def test_a_mixture_gives_exact_shares_and_loses_no_task_s_tail():
    batches = stream(SEVERAL, batch_size=1, pack=False)
    found = examples_of(next(batches) for _ in range(46 * 10))
    counts = collections.Counter(who // 100 for who, _ in found)
    assert counts == {1: 115, 2: 115, 3: 230}
    for base, size in ((100, 11), (200, 5), (300, 30)):
        mine = [item for item in found if base <= item[0] < base + 100]
        assert len(set(mine)) == len(mine), "an example of an epoch came twice"
        complete = len(mine) // size
        assert {(base + i, e) for i in range(size) for e in range(complete - 1)} <= set(mine)


def test_a_mixture_s_rounds_stay_short_for_a_tiny_task():
    reads = []
    sources = [source("tiny", 2, 100, 1.0, reads), source("large", 500, 200, 1.0, reads)]
    next(stream(sources))
    assert reads.count(("large", 0)) == 1
    assert len([read for read in reads if read[0] == "tiny"]) <= 17


def test_restore_reads_only_the_epochs_it_needs():
    run = stream(ONE)
    for _ in range(30):
        next(run)
    reads = []
    again = stream([source("a", 11, 100, reads=reads)])
    again.restore(run.state())
    next(again)
    assert reads[0] == ("a", run.state()["epoch"]) and run.state()["epoch"] > 2
    assert len(reads) <= 2


def test_the_seed_changes_the_order_and_nothing_else():
    first, second = (stream(ONE, batch_size=1, pack=False, seed=seed) for seed in (0, 1))
    orders = [[who for who, _ in examples_of(next(s) for _ in range(11))] for s in (first, second)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_unshuffled_order_is_the_task_s_own():
    found = examples_of([next(stream(ONE, batch_size=11, pack=False, shuffle=False))])
    assert [who for who, _ in found] == list(range(100, 111))


def test_orders_and_seeds_never_change():
    """Golden values: another order would silently change every resumed run."""
    assert permutation(7, "task", 3, 8).tolist() == [3, 1, 5, 0, 6, 7, 2, 4]
    assert epoch_seed(7, "task", 3) == 1998730567
    assert len({epoch_seed(s, n, e) for s in range(5) for n in "abc" for e in range(20)}) == 300


def test_a_position_of_other_tasks_is_refused():
    with pytest.raises(UserError, match="data position does not fit 't'"):
        stream(ONE).restore(stream(SEVERAL).state())
    with pytest.raises(UserError, match="data position does not fit 't'"):
        stream(SEVERAL).restore({"epoch": 0, "row": 0})


def test_an_empty_task_is_an_error_and_not_an_endless_loop():
    with pytest.raises(UserError, match="'a' has no examples"):
        next(stream([source("a", 0, 100)]))


def test_spec_is_the_global_batch():
    run = stream(ONE, batch_size=4, rows=slice(0, 2))
    batch = next(run)
    for name, (shape, dtype) in run.spec().items():
        assert shape == (4, 8)
        assert batch[name].shape == (2, 8)
        assert batch[name].dtype == dtype
