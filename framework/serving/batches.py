"""OpenAI's batches: a file of requests answered beside the online ones, each exactly once, whatever is killed.

    FOLDER/files/ID.content, ID.json           files, uploaded or made (`batch_store.FileStore`)
    FOLDER/batches/ID.json, ID.journal         a batch as the API tells it, and its answers until it has ended
    FOLDER/lock                                held by the one server that works in this folder

A batch goes from `validating` to `in_progress`, `finalizing` and `completed`; to `failed` where its input is no batch
at all; to `expired` after its window; by `cancelling` to `cancelled`. A state is on disk before it is told.
"""

import asyncio
import dataclasses
import logging
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import holder_of, io_errors, try_lock
from meshway.framework.serving.batch_lines import Answerer, Asker, Line, answer_to, in_thread, read_lines
from meshway.framework.serving.batch_store import (
    Answer,
    FileStore,
    Journal,
    StoredFile,
    make_folder,
    new_id,
    read_records,
    write_record,
)
from meshway.framework.serving.parameters import RequestError

_LOG = logging.getLogger(__name__)
_WORKING = ("validating", "in_progress", "finalizing", "cancelling")
_UNITS = {"m": 60, "h": 3600, "d": 86400}
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds, until a disk that refused is tried again


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes on: bytes and lines of an input, batches that have not ended, and requests of all batches
    that are asked at the same time."""

    file_bytes: int = 200 << 20
    lines: int = 50_000
    batches: int = 32
    concurrency: int = 64


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch as OpenAI's API tells it; times are in seconds since 1970."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    expires_at: int
    metadata: Mapping[str, str] | None = None
    status: str = "validating"
    errors: Mapping[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"total": 0, "completed": 0, "failed": 0}
    )

    @property
    def key(self) -> str:
        """What the names of its results and requests are made of."""
        return self.id.removeprefix("batch_")

    def to_json(self) -> dict[str, Any]:
        """Returns it as OpenAI's API tells it."""
        return {"object": "batch", **dataclasses.asdict(self)}


class Batches:
    """Files and batches of one folder. All methods are called on one event loop; what waits for a disk, in threads."""

    def __init__(
        self, folder: Path, answer: Answerer, endpoints: Collection[str], limits: Limits | None = None
    ) -> None:
        """Only `start` touches the disk.

        Args:
          folder: where all is kept. It is made if its parent exists.
          answer: answers a request: see `Asker`.
          endpoints: the URLs that it answers.
          limits: what is taken on.
        """
        self.folder, self.endpoints, self.limits = folder, tuple(endpoints), limits or Limits()
        self.files = FileStore(folder / "files")
        self._asker, self._records = Asker(answer, self.limits.concurrency), folder / "batches"
        self._batches: dict[str, Batch] = {}
        self._journals: dict[str, Journal] = {}
        self._scopes: dict[str, asyncio.Timeout] = {}  # of batches whose lines are being answered
        self._changing = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lock: int | None = None

    async def start(self) -> None:
        """Takes the folder, and goes on with what has not ended.

        Raises:
          UserError: another process works in the folder, or it cannot be written.
          EnvironmentFailure: the disk is full or broken.
        """
        try:
            with io_errors(self.folder):
                await in_thread(self._open)
        except BaseException:
            await self.stop()
            raise
        for id, batch in self._batches.items():
            if batch.status in _WORKING:
                self._tasks[id] = asyncio.create_task(self._work(id))

    async def stop(self) -> None:
        """Stops where it is: what is not on disk yet is answered anew after the next `start`."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()
        for journal in self._journals.values():
            journal.close()
        self._journals.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    async def add_file(self, content: BinaryIO, filename: str) -> StoredFile:
        """Keeps the input of a batch.

        Raises:
          OSError: it cannot be written.
        """
        return await in_thread(self.files.add, lambda file: _copy(content, file), filename, "batch")

    async def delete_file(self, id: str) -> None:
        """Removes a file.

        Raises:
          RequestError: there is none, or a batch that has not ended reads it.
        """
        file = self.file(id)
        users = [batch.id for batch in self._batches.values() if batch.status in _WORKING and batch.input_file_id == id]
        if users:
            raise RequestError(400, f"file {id!r} is the input of {users[0]}, which has not ended: cancel that first")
        await in_thread(self.files.delete, file)

    def file(self, id: str) -> StoredFile:
        """Returns a file.

        Raises:
          RequestError: there is none.
        """
        if (file := self.files.get(id)) is None:
            raise RequestError(404, f"there is no file {id!r}", "file_id", "not_found")
        return file

    def all(self) -> list[Batch]:
        """Returns all batches, the oldest first."""
        return [self.batch(id) for id in sorted(self._batches)]

    def batch(self, id: str) -> Batch:
        """Returns a batch as it is now.

        Raises:
          RequestError: there is none.
        """
        if (batch := self._batches.get(id)) is None:
            raise RequestError(404, f"there is no batch {id!r}", "batch_id", "not_found")
        if (journal := self._journals.get(id)) is not None:
            batch = dataclasses.replace(batch, request_counts={**batch.request_counts, **journal.counts()})
        return batch

    async def create(
        self, input_file_id: str, endpoint: str, completion_window: str = "24h", metadata: Any = None
    ) -> Batch:
        """Begins a batch.

        Args:
          input_file_id: of a file of purpose 'batch', a request a line.
          endpoint: that all its lines are for.
          completion_window: after which it expires: minutes, hours or days, as 24h.
          metadata: up to 16 texts by name, which are told back.

        Raises:
          RequestError: an argument is wrong, or too many batches have not ended.
          OSError: it cannot be written.
        """
        if endpoint not in self.endpoints:
            near = did_you_mean(endpoint[:80], self.endpoints) or f"; there are {', '.join(self.endpoints)}"
            raise RequestError(400, f"no endpoint {endpoint[:80]!r} for batches{near}", "endpoint")
        file = self.files.get(input_file_id)
        if file is None or file.purpose != "batch":
            what = "there is no file" if file is None else "its purpose is not 'batch':"
            raise RequestError(400, f"{what} {input_file_id[:80]!r}", "input_file_id")
        window = re.fullmatch(r"([1-9]\d{0,3})([mhd])", completion_window)
        if window is None:
            message = f"completion_window {completion_window[:80]!r} must be minutes, hours or days, as '24h'"
            raise RequestError(400, message, "completion_window")
        _check_metadata(metadata)
        if len(self._tasks) >= self.limits.batches:
            raise RequestError(
                429, f"{len(self._tasks)} batches have not ended; more are taken later", None, "rate_limited"
            )
        now, seconds = int(time.time()), int(window[1]) * _UNITS[window[2]]
        batch = Batch(f"batch_{new_id()}", endpoint, file.id, completion_window, now, now + seconds, metadata or None)
        self._batches[batch.id] = batch  # at once: its input can no longer be deleted
        try:
            await in_thread(write_record, self._records, batch.id, dataclasses.asdict(batch))
        except BaseException:
            del self._batches[batch.id]
            raise
        self._tasks[batch.id] = asyncio.create_task(self._work(batch.id))
        return batch

    async def cancel(self, id: str) -> Batch:
        """Cancels a batch: what was answered until now will be in its files.

        Raises:
          RequestError: there is none, or it has ended.
          OSError: it cannot be written.
        """
        batch = self.batch(id)
        if batch.status not in ("validating", "in_progress", "cancelling"):
            raise RequestError(
                400, f"batch {id} is {batch.status}: it cannot be cancelled", "batch_id", "invalid_status"
            )
        await self._change(id, "cancelling", only_from=("validating", "in_progress"))
        if (scope := self._scopes.get(id)) is not None and not scope.expired():
            scope.reschedule(asyncio.get_running_loop().time())
        return self.batch(id)

    def _open(self) -> None:
        make_folder(self.folder)
        self._lock = try_lock(self.folder / "lock")
        if self._lock is None:
            holder = holder_of(self.folder / "lock")
            raise UserError(f"batches in {self.folder} are being worked on by {holder or 'another process'}")
        self.files.open()
        make_folder(self._records)
        self._batches = read_records(self._records, Batch)
        for id, batch in self._batches.items():
            if batch.status in _WORKING:
                self._journals[id] = Journal(self._journal_path(id))
            else:
                self._journal_path(id).unlink(missing_ok=True)

    def _journal_path(self, id: str) -> Path:
        return self._records / f"{id}.journal"

    async def _change(self, id: str, status: str, only_from: Collection[str] = _WORKING, **fields: Any) -> bool:
        """Moves a batch to a state, on disk first; returns whether it was in one from which that may be."""
        async with self._changing:
            batch = self._batches[id]
            if batch.status not in only_from:
                return False
            batch = dataclasses.replace(batch, status=status, **{f"{status}_at": int(time.time()), **fields})
            await in_thread(write_record, self._records, id, dataclasses.asdict(batch))
            self._batches[id] = batch
            return True

    async def _work(self, id: str) -> None:
        """Brings a batch to its end."""
        wait = _FIRST_WAIT
        try:
            while self._batches[id].status in _WORKING:
                try:
                    await self._advance(id)
                except Exception:  # of the disk, or a fault of ours: neither may end what was promised
                    _LOG.exception("batch %s: an error; it goes on in %.0f s from what is on disk", id, wait)
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
        finally:
            self._close_journal(id)
            self._tasks.pop(id, None)

    async def _advance(self, id: str) -> None:
        """Takes a batch from what is on disk to its end."""
        journal = self._journals.get(id)
        if journal is None or journal.is_broken:
            journal = await in_thread(Journal, self._journal_path(id))
            self._close_journal(id)
            self._journals[id] = journal
        batch = self._batches[id]
        if self.files.get(batch.input_file_id) is None:
            await self._fail(id, "its input file is gone")
        elif batch.status in ("validating", "in_progress"):
            total, wrong = await in_thread(self._validate, batch)
            if not 0 < total <= self.limits.lines:
                await self._fail(id, f"its input has {total} requests: a batch has 1 to {self.limits.lines:,}")
            counts = {"total": total, "completed": 0, "failed": 0}
            await self._change(id, "in_progress", ("validating",), request_counts=counts)
        if self._batches[id].status == "in_progress":
            try:
                async with asyncio.timeout(batch.expires_at - time.time()) as self._scopes[id]:
                    await in_thread(journal.append, wrong)
                    await self._asker.answer_all(batch.key, batch.endpoint, self._lines(batch), journal)
                expired = False
            except TimeoutError:
                expired = True  # or cancelled
            finally:
                self._scopes.pop(id, None)
            late = {"expired_at": int(time.time())} if expired else {}
            await self._change(id, "finalizing", ("in_progress",), **late)
        if self._batches[id].status in ("finalizing", "cancelling"):
            await self._finish(id, journal)
        self._close_journal(id)
        await in_thread(os.unlink, self._journal_path(id))

    async def _fail(self, id: str, message: str) -> None:
        """Ends a batch whose input is none."""
        error = {"code": "invalid_input", "message": message, "param": "input_file_id", "line": None}
        await self._change(id, "failed", errors={"object": "list", "data": [error]})

    def _validate(self, batch: Batch) -> tuple[int, list[Answer]]:
        """Returns the number of a batch's requests, and the answers to those that are none."""
        total, wrong = 0, []
        for line in self._lines(batch):
            total += 1
            if line.code:
                error = {"code": line.code, "message": line.problem}
                wrong.append(answer_to(batch.key, line, error=error))
        return total, wrong

    def _lines(self, batch: Batch) -> Iterator[Line]:
        return read_lines(self.files.path(self.file(batch.input_file_id)), batch.endpoint)

    async def _finish(self, id: str, journal: Journal) -> None:
        """Makes the files of a batch and ends it; all of it can be repeated."""
        batch = self._batches[id]
        end = "cancelled" if batch.status == "cancelling" else "expired" if batch.expired_at else "completed"
        total = await in_thread(self._answer_rest, batch, journal, end)
        made: dict[str, str] = {}
        for field, failed in (("output_file_id", False), ("error_file_id", True)):
            if journal.counts()["failed" if failed else "completed"]:
                name = f"{batch.id}_{'error' if failed else 'output'}.jsonl"
                file_id = f"file-{batch.key}-{'error' if failed else 'output'}"

                def write(file: BinaryIO, failed: bool = failed) -> None:
                    file.writelines(record + b"\n" for record in journal.records(failed))

                await in_thread(self.files.add, write, name, "batch_output", file_id)
                made[field] = file_id
        await self._change(id, end, request_counts={"total": total, **journal.counts()}, **made)

    def _answer_rest(self, batch: Batch, journal: Journal, end: str) -> int:
        """Says of the lines without an answer that the batch has ended; returns the number of all lines."""
        rest, total = [], 0
        for line in self._lines(batch):
            total += 1
            if line.number not in journal:
                error = {"code": f"batch_{end}", "message": f"the batch was {end} before this request was answered"}
                rest.append(answer_to(batch.key, line, error=error))
        journal.append(rest)
        return total

    def _close_journal(self, id: str) -> None:
        if (journal := self._journals.pop(id, None)) is not None:
            journal.close()


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts or len(metadata) > 16 or any(len(key) > 64 or len(metadata[key]) > 512 for key in metadata):
        message = "metadata must be at most 16 texts of 512 characters, by names of 64"
        raise RequestError(400, message, "metadata")


def _copy(source: BinaryIO, file: BinaryIO) -> None:
    while block := source.read(1 << 20):
        file.write(block)
