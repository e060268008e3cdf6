import numpy as np
import pytest
from tasks_in_memory import random_examples, task

from meshway.framework.data.features import LanguageModel
from meshway.framework.data.rows import online_source
from meshway.framework.data.rows.online_source import OnlineSource
from meshway.framework.errors import UserError


@pytest.fixture(autouse=True)
def small_pools(monkeypatch):
    monkeypatch.setattr(online_source, "POOL_EXAMPLES", 25)


def cut_at_random(examples, seed):
    """A step that makes none, one or two examples of one, at random."""
    random = np.random.default_rng(seed)
    made = []
    for example in examples:
        at = random.integers(0, len(example["targets"]) + 1)
        made += [{"targets": part} for part in np.split(example["targets"], [at]) if len(part)]
    return made


def source(steps=cut_at_random, pack=True, **more):
    objective = LanguageModel().bind(task("targets"), {"targets": 16})
    return OnlineSource("online", random_examples(100, ("targets",)), steps, objective, pack, **more)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_are_the_same_however_they_are_asked_for(pack):
    whole, items = source(pack=pack).take(np.arange(300))
    assert items >= 300
    other = source(pack=pack)
    for numbers in ([5, 6, 250], [299], [0, 1]):
        arrays, _ = other.take(np.array(numbers))
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, whole[name][numbers], err_msg=name)


def test_a_state_names_the_pool_and_nothing_before_it_runs_again():
    whole = source()
    expected, _ = whole.take(np.arange(200, 220))
    runs = []

    def counted(examples, seed):
        runs.append(seed)
        return cut_at_random(examples, seed)

    again = source(counted)
    again.restore(200, whole.state(200))
    arrays, _ = again.take(np.arange(200, 220))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name])
    assert len(runs) <= 2
    assert all(isinstance(value, int) for value in whole.state(200).values())
    assert source().state(200) == whole.state(200)  # whichever rows a process has taken


def test_an_epoch_has_every_token_once():
    rows = source(lambda examples, seed: examples)
    arrays, _ = rows.take(np.arange(400))
    total = random_examples(100, ("targets",)).sizes["targets"].sum()
    shown = np.cumsum((arrays["decoder_segment_ids"] > 0).sum(axis=1))
    assert total in shown  # the first epoch ends at the end of a row
    epoch = 1 + int(np.flatnonzero(shown == total)[0])
    assert rows.state(epoch)["epoch"] == 0 and rows.state(epoch + 1)["epoch"] == 1


def test_steps_that_leave_nothing_are_an_error():
    with pytest.raises(UserError, match="task 'online': its preprocessors make no example"):
        source(lambda examples, seed: []).take(np.array([0]))
