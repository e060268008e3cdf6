"""What a real server bears: batches that are killed, four times more requests than it can answer, and nonsense."""

import asyncio
import collections
import json
import os
import random
import re
import time
from pathlib import Path

import httpx2
import pytest
from saved_runs import save_run
from served import serving

from meshway.framework.data.vocabulary import Framing
from meshway.framework.serving.parameters import CHAT, COMPLETION, EMBEDDINGS, SCORE, TOKENIZE
from meshway.launch.bench import serve as bench
from meshway.launch.bench_flags import BenchServeFlags

URL = "/v1/completions"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "lm", "lm", framing=Framing((300,), False))


def lines(count: int) -> list[dict]:
    """Requests of which every tenth is refused: its prompt is longer than there is room for."""
    return [
        {
            "custom_id": f"id {number}",
            "method": "POST",
            "url": URL,
            "body": {
                "model": "lm",
                "prompt": "long" * 100 if number % 10 == 9 else f"prompt {number}",
                "max_tokens": 4,
                "temperature": 0,
            },
        }
        for number in range(count)
    ]


def answered(batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def wait(client, id: str, until=lambda batch: batch.status not in ("validating", "in_progress", "finalizing")):
    for _ in range(24_000):
        if until(batch := client.batches.retrieve(id)):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"{batch} does not end")


def check_result(client, batch, requests: list[dict]) -> None:
    """Each line once, in order; of some the text is that of the same request online."""
    assert batch.status == "completed" and answered(batch) == len(requests)
    output, errors = (
        [json.loads(line) for line in client.files.content(id).text.splitlines()]
        for id in (batch.output_file_id, batch.error_file_id)
    )
    assert [each["custom_id"] for each in output] == [each["custom_id"] for each in requests if not refused(each)]
    assert [each["custom_id"] for each in errors] == [each["custom_id"] for each in requests if refused(each)]
    assert {each["response"]["status_code"] for each in errors} == {400}
    texts = {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in output}
    for request in random.Random(0).sample([each for each in requests if not refused(each)], 20):
        online = client.completions.create(**request["body"])
        assert texts[request["custom_id"]] == online.choices[0].text


def refused(request: dict) -> bool:
    return request["body"]["prompt"].startswith("long")


@pytest.mark.parametrize(
    "count, kills", [pytest.param(300, 1, marks=pytest.mark.slow), pytest.param(5000, 5, marks=pytest.mark.proofs)]
)
def test_a_batch_of_a_server_that_is_killed_answers_each_line_once_and_in_order(lm, tmp_path, count, kills):
    words = ("--slots=8", "--max_queue=64", f"--batch_dir={tmp_path / 'kept'}", "--name=lm")
    requests, moments = lines(count), random.Random(count)
    goals = sorted(moments.randrange(count * 9 // 10) for _ in range(kills))
    with serving(lm, *words) as served:
        content = "\n".join(map(json.dumps, requests)).encode()
        file = served.client.files.create(file=("requests.jsonl", content), purpose="batch")
        id = served.client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id
        done = answered(wait(served.client, id, lambda batch: answered(batch) >= goals[0]))
        os.kill(served.process.pid, 9)
    for goal in goals[1:]:
        with serving(lm, *words) as served:
            assert answered(served.client.batches.retrieve(id)) >= done, "what was told is forgotten"
            done = answered(wait(served.client, id, lambda batch, goal=goal: answered(batch) >= goal))
            os.kill(served.process.pid, 9)
    with serving(lm, *words) as served:
        check_result(served.client, wait(served.client, id), requests)


def resident_mib(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.proofs
def test_four_times_more_than_it_can_answer_is_refused_by_429_and_costs_no_memory(lm):
    with serving(lm, "--slots=4", "--max_queue=32") as served:
        seen = overload(served.url, served.process.pid, 60)
        print(seen)
        check_overload(seen)
        assert served.http.get("/status").json()["slots_used"] == 0
        assert served.process.poll() is None


def overload(url: str, pid: int, seconds: float) -> dict:
    """Loads a server with four times what it answers; returns what was seen, memory in MiB each second."""
    flags = {"url": url, "prompt_tokens": 16, "max_tokens": 16, "vocab_size": 100}
    _, alone, _ = asyncio.run(bench._measure(BenchServeFlags(**flags, requests=100, concurrency=8)))
    capacity = len(alone) / (max(each.ended for each in alone) - min(each.sent for each in alone))

    async def load():
        memory: list[float] = []

        async def watch():
            while True:
                memory.append(resident_mib(pid))
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        rate = 4 * capacity
        found = await bench._measure(BenchServeFlags(**flags, rate=rate, requests=round(seconds * rate)))
        watching.cancel()
        return memory, found

    memory, (_, answers, differences) = asyncio.run(load())
    return {
        "alone": {each.status for each in alone},
        "capacity": capacity,
        "statuses": collections.Counter(each.status for each in answers),
        "errors": {each.error for each in answers if each.status not in (200, 429)},
        "differences": differences,
        "memory": memory,
    }


def check_overload(seen: dict) -> None:
    assert seen["alone"] == {200} and set(seen["statuses"]) == {200, 429}, seen
    assert seen["differences"] == []
    quarter = len(seen["memory"]) // 4
    assert max(seen["memory"]) < 1.05 * max(seen["memory"][:quarter]) + 16, seen["memory"]


VALUES = [
    *(None, True, False, 0, 1, 2, -1, 3.5, 1e400, -0.0, 10**30, float("nan"), "", "a", "\ud83d", "\x00", "é" * 300),
    *(
        [],
        [1],
        [-1],
        [10**9],
        ["a"],
        ["a", 1],
        [[1, 2], [3]],
        [[]],
        [None],
        [[["a"]]],
        [{"role": "user", "content": ""}],
    ),
    *({}, {"a": 1}, {"1": 2}, {"1": "x"}, {"type": "json_object"}, {"include_usage": True}, "lm", 8, 0.5),
]
GOOD = {
    "/v1/completions": {"prompt": "some text", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
    "/v1/embeddings": {"input": ["a", "b"]},
    "/v1/score": {"inputs": ["a"], "targets": ["b"]},
    "/v1/tokenize": {"text": "some text"},
    "/v1/batches": {"input_file_id": "file-x", "endpoint": URL, "completion_window": "24h"},
}
NAMES = [*COMPLETION, *COMPLETION, *CHAT, *SCORE, *EMBEDDINGS, *TOKENIZE, "suffix", "\ud800", "", "x" * 500]
NAMES += ["input_file_id", "endpoint", "completion_window", "metadata"]
PLACES = ["/", "/health", "/ready", "/metrics", "/status", "/v1/models", "/v1/models/lm", "/v1/models/%00", "/v1/none"]
PLACES += ["/v1/files", "/v1/files/x", "/v1/files/x/content", "/v1/files?limit=a", "/v1/files/..%2f..%2flock/content"]
PLACES += ["/v1/batches/x", "/v1/batches/x/cancel", "/v1/batches?after=%ff", "/../../etc/passwd", "/%e2%82"]


def nonsense(random_: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Returns method, path, body and headers of a request that is wrong in some way, or by chance right."""
    path = random_.choice([*GOOD, URL, URL, URL, *PLACES])
    body = dict(GOOD.get(path, {}))
    for _ in range(random_.choice([0, 1, 1, 2, 4])):
        body[random_.choice(NAMES)] = random_.choice(VALUES)
    if random_.random() < 0.1:
        body.pop(random_.choice([*body, ""]), None)
    content = json.dumps(random_.choice(VALUES) if random_.random() < 0.05 else body).encode()
    if random_.random() < 0.1:
        cut = random_.randrange(len(content) + 1)
        content = content[:cut] + random_.choice([b"", b"\xff\xfe", b"[" * 2000, b"\x00"]) + content[cut + 1 :]
    method = "POST" if path in GOOD else "GET"
    if random_.random() < 0.1:
        method = random_.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "OPTIONS", "NONSENSE"])
    kinds = ["application/json", "text/plain", "multipart/form-data; boundary=x", "multipart/form-data", "nonsense", ""]
    headers = {"content-type": random_.choice([kinds[0]] * 9 + kinds)}
    if random_.random() < 0.05:
        headers[random_.choice(["authorization", "expect", "accept", "range", "accept-encoding"])] = "nonsense"
    return method, path, content, headers


async def fuzz(url: str, count: int, seed: int, at_a_time: int = 12) -> dict[int, int]:
    """Sends nonsense; some clients go away early. Returns how often each status came, 0 where the client went."""
    random_ = random.Random(seed)
    statuses: dict[int, int] = collections.Counter()
    failures = []
    numbers = iter(range(count))

    async def one(client: httpx2.AsyncClient) -> None:
        for _ in numbers:
            method, path, content, headers = nonsense(random_)
            leaves = random_.random() < 0.05
            try:
                async with client.stream(method, url + path, content=content, headers=headers) as response:
                    if not leaves:
                        text = await response.aread()
                statuses[0 if leaves else response.status_code] += 1
                if response.status_code >= 500 and len(failures) < 10:
                    failures.append((method, path, content[:300], response.status_code, leaves or text[:300]))
            except httpx2.RemoteProtocolError:  # what is no HTTP may be answered by closing
                statuses[-1] += 1

    async with httpx2.AsyncClient(timeout=120, trust_env=False) as client, asyncio.TaskGroup() as group:
        for _ in range(at_a_time):
            group.create_task(one(client))
    assert not failures, failures
    return dict(statuses)


@pytest.mark.parametrize(
    "count", [pytest.param(300, marks=pytest.mark.slow), pytest.param(4000, marks=pytest.mark.proofs)]
)
def test_nonsense_gets_an_answer_below_500_and_leaves_no_slot_taken(lm, tmp_path, count):
    words = ("--slots=4", "--beams=2", "--max_top_log_probs=2", f"--batch_dir={tmp_path / 'kept'}", "--name=lm")
    with serving(lm, *words) as served:
        check_fuzz(served.http, served.url, count)
        assert "a request failed" not in "".join(served.said), "".join(served.said)


def check_fuzz(http: httpx2.Client, url: str, count: int) -> dict[int, int]:
    good = {"model": "lm", "prompt": "some text", "max_tokens": 8, "temperature": 0}
    before = http.post(URL, json=good).json()["choices"]
    statuses = asyncio.run(fuzz(url, count, seed=count))
    assert sum(statuses.values()) == count and statuses[200] > count / 20 and statuses[400] > count / 5, statuses
    for _ in range(200):
        status = http.get("/status").json()
        if status["slots_used"] == status["waiting"] == 0:
            break
        time.sleep(0.1)
    assert status["slots_used"] == status["waiting"] == 0, status
    assert http.get("/health").status_code == 200
    assert http.post(URL, json=good).json()["choices"] == before
    return statuses
