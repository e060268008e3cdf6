"""Processes meet, or all learn why not; the processes are threads on the loopback."""

import concurrent.futures
import socket
import threading

import pytest
from running import free_port

from meshway.framework.distributed.rendezvous import ProcessInfo, meet
from meshway.framework.errors import EnvironmentFailure, UserError


def gather(cards, seconds=20.0):
    """Returns what becomes of each card's process: None, or its error."""
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(len(cards)) as pool:
        tries = [pool.submit(meet, address, card, seconds) for card in cards]
        return [each.exception() for each in tries]


def card(process_id, num_processes=3, host="here", version="1"):
    return ProcessInfo(process_id, num_processes, host, version)


def test_all_come():
    assert gather([card(2), card(0), card(1)]) == [None] * 3


@pytest.mark.parametrize(
    ("cards", "message"),
    [
        ([card(0), card(1), card(1, host="there")], "two processes were started as --process_id=1, on .*here"),
        ([card(0), card(2), card(1, 4)], "process 1 .* --num_processes=4, process 0 .* --num_processes=3"),
        ([card(0), card(1), card(2, version="2")], "process 2 .* has meshway 2, process 0 1"),
    ],
)
def test_all_learn_of_what_does_not_fit(cards, message):
    errors = gather(cards)
    assert len({str(error) for error in errors}) == 1
    with pytest.raises(UserError, match=message):
        raise errors[0]


def test_who_does_not_come_is_named():
    errors = gather([card(0, 4), card(2, 4)], seconds=1.0)
    for error in errors:
        with pytest.raises(EnvironmentFailure, match="processes 1, 3 of 4 did not reach process 0 at 127.0.0.1"):
            raise error


def test_process_0_that_does_not_answer():
    with pytest.raises(EnvironmentFailure, match="process 1 of 3: process 0 does not answer at 127.0.0.1:.* refused"):
        meet(f"127.0.0.1:{free_port()}", card(1), 0.5)


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(EnvironmentFailure, match="cannot listen on port"):
            meet(address, card(0), 5.0)
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        with pytest.raises(EnvironmentFailure, match="does not answer .* not a waiting meshway process 0"):
            meet(address, card(1), 0.2)


def test_strangers_and_those_that_come_again_are_no_harm():
    address = f"127.0.0.1:{(port := free_port())}"
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, address, card(0, 2), 20.0)
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", port))
                break
            except OSError:
                continue
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.close()
        ended = socket.create_connection(("127.0.0.1", port))
        ended.sendall(card(1, 3).line().replace(b'"num_processes": 3', b'"num_processes": 2'))
        ended.close()
        second = pool.submit(meet, address, card(1, 2), 20.0)
        assert first.exception() is None and second.exception() is None
