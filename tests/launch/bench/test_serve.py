"""`meshway bench serve` against a server whose delays and refusals are known."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running import free_port

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.launch.bench import serve
from meshway.launch.bench.serve import Answered, run
from meshway.launch.bench_flags import BenchServeFlags
from meshway.launch.cli import main
from meshway.launch.invocation import Invocation

SERVER = Path(__file__).parents[2] / "fake_server.py"


@pytest.fixture
def start(tmp_path, monkeypatch) -> Iterator:
    """Starts a fake server, with some environment variables; returns its address."""
    processes = []

    def started(**variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        words = [sys.executable, str(SERVER), str(tmp_path / f"kept {len(processes)}")]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return f"http://127.0.0.1:{int(processes[-1].stdout.readline())}"

    yield started
    for process in processes:
        process.kill()
        process.communicate()


def measure(**flags) -> int:
    return run(Invocation("bench", "serve", options=BenchServeFlags(**flags)))


def test_both_loops_count_what_the_server_counts(start, capsys):
    url = start(FAKE_CAPACITY="6")
    assert measure(url=url, concurrency=4, requests=12, prompt_tokens=7, max_tokens=3, slo_ttft=60.0) == 0
    said = capsys.readouterr().out
    assert f"fake at {url}: 12 requests, 4 at a time; 7 prompt tokens, at most 3 new ones" in said
    assert "answers by status: 200: 12\n" in said and "100.0% of all requests" in said
    assert "/metrics has counted the same requests and tokens" in said
    first, between, last = (
        [float(cell) for cell in re.search(rf"{name}  +(.*)", said)[1].split()]
        for name in ("to the first token", "between pieces of text", "to the last token")
    )
    # Never sooner than the server's delays: 20 ms to the first token, and 5 ms to each next.
    assert first[0] >= 19 and last[0] >= 29 and last[3] >= between[0] + first[0]
    for row in (first, between, last):
        assert row == sorted(row)
    assert measure(url=url, rate=400.0, requests=30, max_tokens=8) == 0
    said = capsys.readouterr().out
    statuses = {int(status): int(count) for status, count in re.findall(r"(\d+): (\d+)", said.splitlines()[1])}
    assert set(statuses) == {200, 429} and sum(statuses.values()) == 30 and "400 a second at random moments" in said


def test_a_server_that_counts_otherwise_is_told_of(start, capsys):
    assert measure(url=start(FAKE_FORGETS="1"), requests=5, max_tokens=4) == 1
    assert "/metrics differs: 15 generated tokens counted there, 20 received here\n" in capsys.readouterr().out


def test_mistakes_and_failures_have_one_message(start, monkeypatch, capsys, tmp_path):
    with pytest.raises(UserError, match="not both"):
        measure(rate=1.0, concurrency=1)
    with pytest.raises(UserError, match="must begin with http"):
        measure(url="127.0.0.1:8000")
    with pytest.raises(EnvironmentFailure, match="cannot reach http://127.0.0.1"):
        measure(url=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"answered none of 3 requests: 400: .*status 400"):
        measure(url=start(), requests=3, prompt_tokens=1001)
    with pytest.raises(UserError, match="token_file=.*No such file"):
        measure(token_file=str(tmp_path / "none"))
    assert main(["bench", "serve", "--rate=0"]) == 2 and "is not a number above 0" in capsys.readouterr().err
    assert main(["bench", "serve", "--gin_file=quickstart"]) == 2
    assert main(["bench", "serve", "--gin.SEED=1"]) == 2


def test_requests_depend_on_seed_and_number_alone_and_come_in_order(monkeypatch):
    flags = BenchServeFlags(prompt_tokens=50, vocab_size=10)
    bodies = [serve._body(flags, "m", number) for number in (0, 1, 0)]
    assert bodies[0] == bodies[2] != bodies[1] and {*bodies[0]["prompt"]} <= {*range(3, 10)}
    most = running = 0

    async def ask(number: int) -> Answered:
        nonlocal most, running
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (number % 3))
        running -= 1
        return Answered(200, float(number), 0.0)

    answers = asyncio.run(serve._send(BenchServeFlags(concurrency=3, requests=20), ask))
    assert [answer.sent for answer in answers] == [*range(20)] and most == 3
    answers = asyncio.run(serve._send(BenchServeFlags(rate=1e6, requests=20), ask))
    assert [answer.sent for answer in answers] == [*range(20)]


def test_good_answers_are_within_both_limits():
    answer = Answered(200, 10.0, 12.0, [11.0, 11.5, 12.0], 1, 5)
    assert (answer.first, answer.between, answer.seconds) == (1.0, 0.25, 2.0)
    assert answer.is_good(1.0, 0.25) and answer.is_good(None, None)
    assert not answer.is_good(0.9, None) and not answer.is_good(None, 0.2)
    assert not Answered(429, 0.0, 0.1).is_good(None, None)
