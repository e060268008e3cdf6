"""Barriers bring values together, and name who is missing."""

import concurrent.futures

import pytest
from store_in_memory import StoreInMemory

from meshway.framework.distributed import barrier as barrier_module
from meshway.framework.distributed.barrier import barrier, named
from meshway.framework.errors import EnvironmentFailure


@pytest.fixture(autouse=True)
def fresh_names(monkeypatch):
    monkeypatch.setattr(barrier_module, "_uses", NoCount())


class NoCount(dict):
    """Threads share the count that processes would each have of their own."""

    def __getitem__(self, name):
        return 1

    def __setitem__(self, name, value):
        pass


def come(store, processes, num_processes, seconds):
    with concurrent.futures.ThreadPoolExecutor(len(processes)) as pool:
        tries = [
            pool.submit(barrier, store, process, num_processes, "the middle", seconds, f"value {process}")
            for process in processes
        ]
        return [each.exception() or each.result() for each in tries]


def test_all_get_what_all_brought():
    brought = {process: f"value {process}" for process in range(4)}
    assert come(StoreInMemory(), [3, 0, 2, 1], 4, 20.0) == [brought] * 4


def test_the_missing_are_named_by_everyone():
    for error in come(StoreInMemory(), [0, 2], 4, 0.2):
        assert isinstance(error, EnvironmentFailure)
        assert "processes 1, 3 of 4 did not reach 'the middle' within 0.2 s" in str(error)


def test_without_process_0_it_is_the_one_missing():
    (error,) = come(StoreInMemory(), [1], 2, 0.1)
    assert "process 0 of 2 did not reach" in str(error)


def test_those_that_wait_say_so(monkeypatch):
    monkeypatch.setattr(barrier_module, "_WAIT_SECONDS", 0.01)
    said = []
    with pytest.raises(EnvironmentFailure):
        barrier(StoreInMemory(), 1, 2, "the cache", 0.05, waiting=lambda: said.append("still"))
    assert len(said) > 1


def test_names():
    assert named([2], 4) == "process 2 of 4"
    assert named(range(10), 99) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and 2 more of 99"
