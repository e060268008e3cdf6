"""Who is missing, who hears of it, and how each process ends: processes as threads over a store in memory."""

import io
import json
import socket
import threading

import pytest
from running import free_port
from store_in_memory import StoreInMemory

from meshway.framework.distributed.watch import LOST_A_PEER, Alarm, Alarms, Heartbeats, Watch, _unreachable


def test_silence_is_counted_from_the_last_change():
    heartbeats = Heartbeats([1, 2], deadline=10.0, now=0.0)
    for now in range(1, 12):
        heartbeats.hear({1: str(now), 2: "the same"}, float(now))
        assert heartbeats.missing(float(now)) == {}
    assert heartbeats.missing(11.5) == {2: 10.5}


def test_nobody_is_blamed_for_the_time_this_process_was_stopped():
    heartbeats = Heartbeats([1], deadline=10.0, now=0.0)
    assert heartbeats.missing(1.0) == {}
    assert heartbeats.missing(500.0) == {}, "asleep from 1 to 500"
    for now in range(501, 510):
        assert heartbeats.missing(float(now)) == {}
    assert heartbeats.missing(511.0) == {1: 12.0}


class Run:
    """Watches of several processes; `ends` are exit codes by process."""

    def __init__(self, num_processes, deadline=1.0, coordinator=None):
        self.store, self.ends, self.logs = StoreInMemory(), {}, {}
        self.all_ended = threading.Semaphore(0)
        coordinator = coordinator or f"127.0.0.1:{free_port()}"
        self.watches = []
        for process in range(num_processes):
            self.logs[process] = LogFile()
            self.watches.append(
                Watch(
                    self.store, process, num_processes, coordinator, deadline, self.leave(process), self.logs[process]
                )
            )

    def leave(self, process):
        def end(code):
            self.ends[process] = code
            self.watches[process].stop()
            self.all_ended.release()

        return end

    def start(self, processes):
        for process in processes:
            self.watches[process].start()

    def await_ends(self, count):
        for _ in range(count):
            assert self.all_ended.acquire(timeout=60)
        for watch in self.watches:
            watch.stop()


class LogFile(io.StringIO):
    """Text that faulthandler cannot write to: stacks have a test of their own."""


@pytest.fixture(autouse=True)
def no_stacks(monkeypatch):
    monkeypatch.setattr("meshway.framework.distributed.watch.dump_stacks", lambda log: log.write("<stacks>"))
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)  # a thread that "ended its process"


def test_a_silent_process_ends_the_others_and_is_named():
    run = Run(4)
    run.start([0, 1, 3])
    run.await_ends(3)
    assert run.ends == {0: LOST_A_PEER, 1: LOST_A_PEER, 3: LOST_A_PEER}
    for process in (0, 1, 3):
        said = run.logs[process].getvalue()
        assert f"process {process} of 4 stops: " in said and "process 2 of 4 not heard of for" in said
        assert "<stacks>" in said


def test_without_process_0_the_others_say_so():
    run = Run(3)
    run.start([1, 2])
    run.await_ends(2)
    assert run.ends == {1: LOST_A_PEER, 2: LOST_A_PEER}
    assert "process 0, at 127.0.0.1" in run.logs[1].getvalue()


def test_a_process_that_is_cut_off_ends_itself():
    run = Run(2)
    run.start([1])
    run.store.down = True
    run.await_ends(1)
    assert "UNAVAILABLE: connection refused" in run.logs[1].getvalue()


def test_an_address_is_alive_if_it_greets():
    assert "refused" in _unreachable(f"127.0.0.1:{free_port()}")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        for greeting, found in ((b"\0\0\x18", ""), (b"", "the connection is closed at once")):
            threading.Thread(target=greet, args=(server, greeting), daemon=True).start()
            assert _unreachable(address) == found


def greet(server, greeting):
    with server.accept()[0] as connection:
        connection.sendall(greeting)


@pytest.mark.parametrize(("code", "others"), [(1, LOST_A_PEER), (2, 2), (130, 130)])
def test_all_hear_why_one_ends(code, others):
    run = Run(3, deadline=60.0)
    run.start([0, 1, 2])
    run.watches[2].alarms.sound(code, "its recipe is wrong")
    run.await_ends(2)
    assert run.ends == {0: others, 1: others}
    assert "process 2: its recipe is wrong" in run.logs[1].getvalue()
    assert ("<stacks>" in run.logs[1].getvalue()) == (others == LOST_A_PEER)


def test_the_first_alarm_is_the_one_that_counts():
    store = StoreInMemory()
    for process in (2, 1):
        Alarms(store, process, 3).sound(1, f"of {process}")
    assert Alarms(store, 0, 3).hear(1.0) == Alarm(2, 1, "of 2")
    assert json.loads(store.values["alarm"])["process_id"] == 2


def test_a_store_that_is_gone_holds_nobody():
    store = StoreInMemory()
    store.down = True
    Alarms(store, 1, 3).sound(1, "nobody hears")


def test_a_run_that_ends_well_leaves_no_thread_behind():
    run = Run(3, deadline=60.0)
    run.start([0, 1, 2])
    threads = [thread for watch in run.watches for thread in watch._threads]
    for watch in run.watches:
        watch.close()
    assert len(threads) == 9 and not any(thread.is_alive() for thread in threads)
    assert run.ends == {}


def test_who_is_silent():
    run = Run(2, deadline=2.0)
    run.start([0, 1])
    assert run.watches[0].silent() == set()
    run.watches[1].stop()
    run.watches[0].stop()
    assert run.watches[0].silent() == {0, 1}
    run.store.down = True
    assert run.watches[1].silent() == {0}


def test_steps_go_out_with_the_heartbeat():
    run = Run(2, deadline=1.0)
    run.watches[1].at_step(7)
    run.start([0, 1])
    assert run.watches[0].silent() == set()
    assert run.watches[0].steps() == {0: 0, 1: 7}
    for watch in run.watches:
        watch.stop()
