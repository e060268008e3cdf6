"""Files and batches by the OpenAI client, on a server of its own process that may be killed."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from tiers import tiers

SERVER = Path(__file__).parents[2] / "fake_server.py"
URL = "/v1/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[tuple[openai.OpenAI, subprocess.Popen]]:
    process = subprocess.Popen([sys.executable, str(SERVER), str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=30) as client:
            while True:
                with contextlib.suppress(openai.APIConnectionError):
                    client.batches.list()
                    break
                assert process.poll() is None
                time.sleep(0.02)
            yield client, process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[openai.OpenAI]:
    with server(tmp_path_factory.mktemp("server") / "kept") as (client, _):
        yield client


def request(custom_id: str, prompt: str | None = None, **changes) -> dict:
    body = {"prompt": custom_id if prompt is None else prompt}
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": body} | changes


def upload(client: openai.OpenAI, lines: list) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return client.files.create(file=("requests.jsonl", "\n".join(texts).encode()), purpose="batch").id


def begin(client: openai.OpenAI, lines: list, **options):
    return client.batches.create(input_file_id=upload(client, lines), endpoint=URL, completion_window="24h", **options)


def wait(client: openai.OpenAI, id: str, until=lambda batch: batch.status in ENDED):
    for _ in range(3000):
        if until(batch := client.batches.retrieve(id)):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"{batch} does not end")


def answered(batch) -> int:
    return batch.request_counts.completed + batch.request_counts.failed


def content(client: openai.OpenAI, id: str | None) -> list[dict]:
    return [json.loads(line) for line in client.files.content(id).text.splitlines()] if id else []


def test_a_batch_from_upload_to_its_output(client):
    lines = [request(f"line {number}") for number in range(20)]
    lines[3] = request("again", "busy")
    lines[5] = request("twice", "flaky")
    batch = begin(client, lines, metadata={"for": "a test"})
    assert batch.status == "validating" and batch.object == "batch" and batch.expires_at == batch.created_at + 86400
    batch = wait(client, batch.id)
    assert batch.status == "completed" and batch.metadata == {"for": "a test"} and batch.error_file_id is None
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    output = content(client, batch.output_file_id)
    assert [each["custom_id"] for each in output] == [line["custom_id"] for line in lines]
    assert output[0]["response"]["status_code"] == 200 and output[0]["error"] is None
    assert [each["response"]["body"]["choices"][0]["text"] for each in output] == [
        line["body"]["prompt"].upper() for line in lines
    ]
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"


def test_lines_that_are_wrong_go_to_the_errors_with_their_numbers(client):
    lines = [
        request("good"),
        "not json",
        request("url", url="/v1/nothing"),
        request("good"),
        "",
        request("method", method="GET"),
        request("extra", custom="x"),
        request("body", body=[]),
        request("stream", body={"prompt": "", "stream": True}),
        request(7),
        '{"custom_id": "nan", "method": "POST", "url": "/v1/completions", "body": {"n": NaN}}',
        "[" * 100_000,
        "[1, 2]",
        request("no", "refuse"),
        request("fails", "broken"),
        request("\ud83d\ude00 good too"),
    ]
    batch = wait(client, begin(client, lines).id)
    assert batch.status == "completed"
    assert [each["custom_id"] for each in content(client, batch.output_file_id)] == ["good", "\U0001f600 good too"]
    errors = content(client, batch.error_file_id)
    told = {each["line"]: each["error"]["code"] if each["error"] else each["response"] for each in errors}
    assert told.pop(14)["status_code"] == 400
    failed = told.pop(15)
    assert failed["status_code"] == 500 and "RuntimeError" in failed["body"]["error"]["message"]
    assert told == {
        2: "invalid_json_line",
        3: "invalid_url",
        4: "duplicate_custom_id",
        6: "invalid_method",
        7: "unknown_parameter",
        8: "invalid_body",
        9: "invalid_body",
        10: "invalid_custom_id",
        11: "invalid_json_line",
        12: "invalid_json_line",
        13: "invalid_request",
    }
    assert batch.request_counts.total == 15 and batch.request_counts.failed == len(errors) == 13
    assert errors[2]["custom_id"] == "good" and "'/v1/nothing'" in errors[1]["error"]["message"]


def test_a_cancelled_batch_keeps_what_was_answered(client):
    batch = begin(client, [request(f"{n}") if n % 2 else request(f"{n}", f"hang {n}") for n in range(10)])
    wait(client, batch.id, lambda batch: batch.request_counts.completed == 5)
    batch = client.batches.cancel(batch.id)
    assert batch.status in ("cancelling", "cancelled") and batch.cancelling_at
    batch = wait(client, batch.id)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.request_counts.failed == 5
    assert [each["custom_id"] for each in content(client, batch.output_file_id)] == ["1", "3", "5", "7", "9"]
    assert {each["error"]["code"] for each in content(client, batch.error_file_id)} == {"batch_cancelled"}
    with pytest.raises(openai.BadRequestError, match="is cancelled: it cannot be cancelled"):
        client.batches.cancel(batch.id)


def test_half_a_surrogate_pair_is_told_back_as_it_came(client):
    fields = {"input_file_id": upload(client, [request("a")]), "endpoint": URL, "metadata": {"half": "\ud83d"}}
    body = json.dumps(fields)  # in ASCII
    answer = httpx2.post(f"{client.base_url}batches", content=body)
    assert answer.status_code == 200 and b'"half": "\\ud83d"' in answer.content
    assert b"\\ud83d" in httpx2.get(f"{client.base_url}batches").content


def test_an_empty_input_fails(client):
    batch = wait(client, begin(client, ["", ""]).id)
    assert batch.status == "failed" and "0 requests" in batch.errors.data[0].message
    assert batch.output_file_id is None


def test_files_are_listed_read_and_deleted(client):
    ids = [upload(client, [request("a", f"{number}")]) for number in range(5)]
    assert [file.id for file in client.files.list(purpose="batch", limit=2)][:5] == ids[::-1]  # by several pages
    assert [file.id for file in client.files.list(purpose="batch", order="asc", after=ids[2])] == ids[3:]
    file = client.files.retrieve(ids[0])
    assert file.filename == "requests.jsonl" and file.bytes == len(client.files.content(ids[0]).read())
    assert client.files.delete(ids[0]).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete, client.batches.retrieve):
        with pytest.raises(openai.NotFoundError, match=f"there is no (file|batch) '{ids[0]}'"):
            call(ids[0])
    batch = begin(client, [request("a", "hang")])
    with pytest.raises(openai.BadRequestError, match=f"is the input of {batch.id}"):
        client.files.delete(batch.input_file_id)
    assert batch.id in [each.id for each in client.batches.list(limit=1)]
    client.batches.cancel(batch.id)


WRONG = [
    ("POST", "/files", {"data": {"purpose": "batch"}, "files": {"file": b"x" * (2 << 20)}}, 413, "at most"),
    ("POST", "/files", {"data": {"purpose": "tune"}, "files": {"file": b"x"}}, 400, "purpose must be 'batch'"),
    ("POST", "/files", {"data": {"purpos": "batch"}, "files": {"file": b"x"}}, 400, "did you mean 'purpose'"),
    ("POST", "/files", {"data": {"purpose": "batch", "file": "x"}, "files": {"other": b"x"}}, 400, "'other'"),
    ("POST", "/files", {"json": {}}, 400, "send a form"),
    ("POST", "/files", {"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "boundary"),
    ("GET", "/files?limit=0", {}, 400, "from 1 to 10000"),
    ("GET", "/files?limit=%F0%9F%98%80", {}, 400, "limit"),
    ("GET", "/files?order=up", {}, 400, "'asc' or 'desc'"),
    ("GET", "/files?after=x", {}, 400, "'x'"),
    ("GET", "/batches?limt=1", {}, 400, "did you mean 'limit'"),
    ("GET", "/files/..%2Flock", {}, 404, ""),
    ("GET", "/files/%00/content", {}, 404, "no file"),
    ("POST", "/batches", {"content": b"{"}, 400, "not JSON"),
    ("POST", "/batches", {"content": b"\xff"}, 400, "not JSON"),
    ("POST", "/batches", {"content": b"[" * 60_000}, 400, "not JSON"),
    ("POST", "/batches", {"content": b" " * 80_000}, 413, "too large"),
    ("POST", "/batches", {"json": []}, 400, "must be an object"),
    ("POST", "/batches", {"json": {"input_file": "x"}}, 400, "did you mean 'input_file_id'"),
    ("POST", "/batches", {"json": {"endpoint": URL}}, 400, "input_file_id must be a text"),
    ("POST", "/batches", {"json": {"endpoint": URL, "input_file_id": "x"}}, 400, "there is no file 'x'"),
    ("POST", "/batches", {"json": {"endpoint": "/v1/completion", "input_file_id": "x"}}, 400, f"did you mean '{URL}'"),
    ("POST", "/batches", {"json": {"completion_window": "soon"}, "good": True}, 400, "must be minutes, hours or days"),
    ("POST", "/batches", {"json": {"metadata": {"a": 1}}, "good": True}, 400, "metadata must be"),
    ("POST", "/batches/x/cancel", {}, 404, "no batch 'x'"),
]


@pytest.mark.parametrize("method, path, options, status, says", WRONG)
def test_wrong_requests_are_refused_with_one_clear_message(client, method, path, options, status, says):
    options = dict(options)
    if options.pop("good", False):  # all but one argument
        options["json"] = {"endpoint": URL, "input_file_id": upload(client, [request("a")])} | options["json"]
    answer = httpx2.request(method, f"{client.base_url}".rstrip("/") + path, **options)
    assert answer.status_code == status, answer.text
    if says:
        error = answer.json()["error"]
        assert says in error["message"] and set(error) == {"message", "type", "param", "code"}


KILLS = [(300, 2, 0), (2000, 5, 0), (5000, 5, 1), (5000, 20, 2)]  # lines, kills, seed


@pytest.mark.parametrize("count, kills, seed", tiers(KILLS, quick=[], slow=KILLS[:1]))
def test_killed_at_random_moments_a_batch_answers_each_line_once_and_in_order(tmp_path, count, kills, seed):
    moments = random.Random(seed)
    kinds = ["", "", "", "", "", "busy ", "flaky ", "refuse "]
    prompts = [f"{moments.choice(kinds)}{number}" for number in range(count)]
    lines = [request(f"id {number}", prompt) for number, prompt in enumerate(prompts)]
    with server(tmp_path / "kept") as (client, _):
        id = begin(client, lines).id
    done = 0
    for goal in sorted(moments.randrange(count) for _ in range(kills)):
        with server(tmp_path / "kept") as (client, process):
            assert answered(client.batches.retrieve(id)) >= done, "what was told is forgotten"
            batch = wait(client, id, lambda batch, goal=goal: answered(batch) >= goal)
            done = answered(batch)
            time.sleep(moments.random() / 50)
            os.kill(process.pid, 9)
    with server(tmp_path / "kept") as (client, _):
        batch = wait(client, id)
        output, errors = (content(client, file) for file in (batch.output_file_id, batch.error_file_id))
    good = [number for number, prompt in enumerate(prompts) if not prompt.startswith("refuse")]
    bad = [number for number, prompt in enumerate(prompts) if prompt.startswith("refuse")]
    assert batch.status == "completed"
    assert [each["custom_id"] for each in output] == [f"id {number}" for number in good]
    assert [each["response"]["body"]["choices"][0]["text"] for each in output] == [prompts[n].upper() for n in good]
    assert [(each["custom_id"], each["line"]) for each in errors] == [(f"id {n}", n + 1) for n in bad]
    assert len({each["response"]["body"]["process"] for each in output}) > 1, "no answer outlived a kill"
