"""Batches in one process: crashes at every step, torn journals, refusing disks, turns."""

import asyncio
import io
import itertools
import json
import time
from pathlib import Path

import pytest
from crashes import Crash, Disk

from meshway.framework.errors import UserError
from meshway.framework.serving import batches as batches_module
from meshway.framework.serving.batch_store import Answer, Journal
from meshway.framework.serving.batches import Batch, Batches, Limits
from meshway.framework.serving.parameters import RequestError

URL = "/v1/completions"
WORKING = ("validating", "in_progress", "finalizing", "cancelling")
INPUT = [*range(5), "wrong", *range(5, 9), "refuse"]


def line(what: int | str, **changes) -> dict:
    return {"custom_id": f"id {what}", "method": "POST", "url": URL, "body": {"prompt": f"{what}"}} | changes


def text_of(lines: list) -> bytes:
    return b"".join(b"{\n" if each == "wrong" else json.dumps(line(each)).encode() + b"\n" for each in lines)


async def answer(url: str, body: dict, priority: str) -> tuple[int, dict]:
    await asyncio.sleep(0)
    return (400, {"error": {}}) if body["prompt"] == "refuse" else (200, {"text": body["prompt"]})


async def begun(batches: Batches, lines: list, window: str = "24h") -> Batch:
    file = await batches.add_file(io.BytesIO(text_of(lines)), "lines.jsonl")
    return await batches.create(file.id, URL, window)


async def ended(batches: Batches, id: str, crashed: list | tuple = ()) -> Batch:
    for _ in range(20_000):
        if crashed or batches.batch(id).status not in WORKING:
            return batches.batch(id)
        await asyncio.sleep(0.001)
    raise AssertionError(f"{batches.batch(id)} does not end")


def records(batches: Batches, id: str | None) -> list[dict]:
    content = batches.files.path(batches.file(id)).read_text() if id else ""
    return [json.loads(each) for each in content.splitlines()]


def run_once(folder: Path, crashed: list | tuple) -> tuple[Batch, list[dict], list[dict]] | None:
    """A server's life: the client begins a batch if there is none. Returns how it ended, unless it crashed."""

    async def life():
        batches = Batches(folder, answer, [URL], Limits(concurrency=3))
        await batches.start()
        try:
            known = batches.all()
            batch = await ended(batches, (known[0] if known else await begun(batches, INPUT)).id, crashed)
            assert crashed or len(batches.all()) == 1
            return batch, *([] if crashed else records(batches, i) for i in (batch.output_file_id, batch.error_file_id))
        finally:
            await batches.stop()

    return asyncio.run(life())


def check(found: tuple[Batch, list[dict], list[dict]]) -> None:
    batch, output, errors = found
    assert batch.status == "completed" and batch.request_counts == {"total": 11, "completed": 9, "failed": 2}
    assert [each["custom_id"] for each in output] == [f"id {number}" for number in range(9)]
    assert [each["response"]["body"]["text"] for each in output] == [str(number) for number in range(9)]
    assert [(each["line"], each["custom_id"]) for each in errors] == [(6, None), (11, "id refuse")]
    assert errors[0]["error"]["code"] == "invalid_json_line" and errors[1]["response"]["status_code"] == 400


def test_after_a_crash_at_every_step_of_the_disk_each_line_is_answered_once_and_in_order(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    for step in itertools.count():
        folder = tmp_path / str(step)
        with disk.crashing(step) as crashed:
            ended_as = run_once(folder, crashed)
            assert crashed or check(ended_as) is None
        for again in (step % 5, -1):  # a second crash, at another step of what the next server does
            with disk.crashing(again) as crashed_again:
                ended_as = run_once(folder, crashed_again)
                assert crashed_again or check(ended_as) is None
        suffixes = [path.name.rpartition(".")[2] for path in folder.rglob("*") if path.is_file()]
        assert sorted(set(suffixes)) == ["content", "json", "lock"], "something is left behind"
        assert suffixes.count("content") <= 5  # of a client that crashed between its two calls, an input more
        if not crashed:
            break
    assert step > 40


def answers(count: int) -> list[Answer]:
    return [Answer(number, number % 3 == 0, json.dumps({"n": number}).encode()) for number in range(1, count + 1)]


def test_a_journal_cut_at_any_byte_keeps_the_whole_lines_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # no test cuts the power
    whole = Journal(tmp_path / "whole")
    whole.append(answers(5))
    whole.append(answers(7))  # the first five are there already
    assert whole.counts() == {"completed": 5, "failed": 2}
    assert [json.loads(record)["n"] for record in whole.records(False)] == [1, 2, 4, 5, 7]
    whole.close()
    content = (tmp_path / "whole").read_bytes()
    assert content.count(b"\n") == 7
    for size in range(len(content)):
        path = tmp_path / "cut"
        path.write_bytes(content[:size])
        journal = Journal(path)
        kept = content[:size].count(b"\n")
        assert [number in journal for number in range(1, 8)] == [True] * kept + [False] * (7 - kept)
        journal.append(answers(7))
        assert sorted(json.loads(each)["n"] for failed in (0, 1) for each in journal.records(failed)) == [*range(1, 8)]
        journal.close()
        assert path.read_bytes() == content


def test_a_damaged_line_of_a_journal_does_not_count_and_hides_no_other(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.append(answers(3))
    journal.close()
    content = bytearray((tmp_path / "journal").read_bytes())
    content[content.index(b'"n": 2') + 5] = ord("9")
    (tmp_path / "journal").write_bytes(content)
    journal = Journal(tmp_path / "journal")
    assert [number in journal for number in (1, 2, 3)] == [True, False, True]
    journal.close()


def test_a_batch_past_its_window_ends_with_what_was_answered(tmp_path, monkeypatch):
    hung = asyncio.Event()

    async def half(url: str, body: dict, priority: str) -> tuple[int, dict]:
        if body["prompt"] == "5":
            hung.set()
            await asyncio.sleep(3600)
        return 200, {}

    async def life():
        batches = Batches(tmp_path / "kept", half, [URL], Limits(concurrency=1))
        await batches.start()
        batch = await begun(batches, [*range(10)], "1m")
        assert batch.expires_at == batch.created_at + 60
        await hung.wait()
        await batches.stop()
        monkeypatch.setattr(batches_module.time, "time", lambda now=time.time: now() + 61)
        batches = Batches(tmp_path / "kept", half, [URL], Limits(concurrency=1))
        await batches.start()
        batch = await ended(batches, batch.id)
        assert batch.status == "expired" and batch.request_counts == {"total": 10, "completed": 5, "failed": 5}
        assert [each["custom_id"] for each in records(batches, batch.output_file_id)] == [f"id {n}" for n in range(5)]
        assert {each["error"]["code"] for each in records(batches, batch.error_file_id)} == {"batch_expired"}
        await batches.stop()

    asyncio.run(life())


def test_a_disk_that_refuses_for_a_while_loses_nothing(tmp_path, monkeypatch):
    refused, append = [], Journal.append

    def full_at_first(journal: Journal, those: list) -> None:
        if those and len(refused) < 3:
            refused.append(len(those))
            journal.is_broken = True
            raise OSError(28, "No space left on device")
        append(journal, those)

    async def life():
        batches = Batches(tmp_path / "kept", answer, [URL])
        await batches.start()
        batch = await begun(batches, INPUT)
        check((batch := await ended(batches, batch.id), *records_of(batches, batch)))
        await batches.stop()

    def records_of(batches: Batches, batch: Batch):
        return [records(batches, id) for id in (batch.output_file_id, batch.error_file_id)]

    monkeypatch.setattr(Journal, "append", full_at_first)
    monkeypatch.setattr(batches_module, "_LONGEST_WAIT", 0.01)
    monkeypatch.setattr(batches_module, "_FIRST_WAIT", 0.01)
    asyncio.run(life())
    assert len(refused) == 3


def test_a_short_batch_does_not_wait_for_a_long_one(tmp_path):
    async def life():
        batches = Batches(tmp_path / "kept", answer, [URL], Limits(concurrency=1, batches=2))
        await batches.start()
        long, short = await begun(batches, [*range(300)]), await begun(batches, [1, 2])
        with pytest.raises(RequestError, match="2 batches have not ended") as refused:
            await begun(batches, [1])
        assert refused.value.status == 429
        assert (await ended(batches, short.id)).status == "completed"
        assert batches.batch(long.id).request_counts["completed"] < 100
        await batches.stop()

    asyncio.run(life())


def test_a_folder_has_one_server(tmp_path):
    async def life():
        first, second = (Batches(tmp_path / "kept", answer, [URL]) for _ in range(2))
        await first.start()
        with pytest.raises(UserError, match="worked on by process"):
            await second.start()
        await first.stop()
        await second.start()
        await second.stop()
        with pytest.raises(UserError, match="cannot write .*missing"):
            await Batches(tmp_path / "missing" / "kept", answer, [URL]).start()

    asyncio.run(life())


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"id": "batch_x"}', b'{"more": 1}', b"\xff"])
def test_a_record_that_somebody_has_changed_is_named(tmp_path, content):
    async def life():
        (tmp_path / "kept" / "batches").mkdir(parents=True)
        (tmp_path / "kept" / "batches" / "batch_x.json").write_bytes(content)
        with pytest.raises(UserError, match="batch_x.json is not what meshway wrote there"):
            await Batches(tmp_path / "kept", answer, [URL]).start()

    asyncio.run(life())


def test_a_crash_is_no_exception_that_is_tried_again():
    assert not issubclass(Crash, Exception)
