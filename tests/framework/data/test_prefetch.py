import threading

import pytest

from meshway.framework.data.prefetch import prefetch


class Counting:
    """A dataset that counts, up to `last`, then raises `error`."""

    def __init__(self, last, error=None):
        self.at, self.last, self.error = 0, last, error or StopIteration()

    def __next__(self):
        if self.at == self.last:
            raise self.error
        self.at += 1
        return {"x": self.at}

    def state(self):
        return {"row": self.at}


@pytest.mark.parametrize("depth", [1, 4])
def test_batches_come_in_order_each_with_the_state_after_it(depth):
    assert list(prefetch(Counting(20), depth)) == [({"x": i}, {"row": i}) for i in range(1, 21)]


def test_an_error_arrives_after_the_batches_before_it():
    batches = prefetch(Counting(2, error=ValueError("broken")))
    assert [next(batches)[0]["x"], next(batches)[0]["x"]] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_it_runs_ahead_by_its_depth_and_no_further():
    dataset = Counting(100)
    batches = prefetch(dataset, depth=3)
    for _ in range(100):
        if dataset.at == 4:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.05)
    assert dataset.at == 4  # three waiting and one in the hand
    batches.close()


def test_close_ends_the_thread_and_the_iteration():
    batches = prefetch(Counting(1000))
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_depth_must_be_positive():
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch(Counting(1), 0)
