"""The lines of a batch: read from its input, asked until each has an answer that stays, and written to its journal."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from meshway.framework.errors import described, did_you_mean
from meshway.framework.serving.batch_store import Answer, Journal
from meshway.framework.serving.scheduler import Priority

_LOG = logging.getLogger(__name__)
_KEYS = ("custom_id", "method", "url", "body")
_NOT_NOW = (429, 503)  # the queue is full, or the server is about to stop: asked again until it is answered
_TRIES = 4  # of a request at which the engine fails
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0  # seconds
_READ_AHEAD = 64  # lines

Result = TypeVar("Result")


class Answerer(Protocol):
    """What answers one request: an HTTP status and the body."""

    def __call__(self, url: str, body: dict[str, Any], priority: Priority) -> Awaitable[tuple[int, dict[str, Any]]]: ...


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a batch's input, `number` counted from 1.

    Attributes:
      custom_id: by which its owner knows the answer; None where there is no such text.
      body: of the request.
      code, problem: why it is not a request, in a word and in a sentence; empty where it is one.
    """

    number: int
    custom_id: str | None
    body: dict[str, Any]
    code: str = ""
    problem: str = ""


def read_lines(path: Path, endpoint: str) -> Iterator[Line]:
    """Yields the lines of a batch's input, without blank ones.

    Args:
      path: a file of JSON lines.
      endpoint: the URL that each of them must be for.
    """
    seen: set[str] = set()
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                request = json.loads(text, parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
                yield Line(number, None, {}, "invalid_json_line", f"line {number} is {reason}"[:300])
                continue
            custom_id = request.get("custom_id") if isinstance(request, dict) else None
            custom_id = custom_id if isinstance(custom_id, str) else None
            code, problem = _problem(request, endpoint, seen)
            if code:
                yield Line(number, custom_id, {}, code, f"line {number}: {problem}"[:600])
            else:
                seen.add(request["custom_id"])
                yield Line(number, custom_id, request["body"])


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _problem(request: Any, endpoint: str, seen: set[str]) -> tuple[str, str]:
    """Returns why a line is not a request, in a word and in a sentence; two empty texts where it is one."""
    if not isinstance(request, dict):
        return "invalid_request", 'must be an object with "custom_id", "method", "url" and "body"'
    if unknown := [key for key in request if key not in _KEYS]:
        return "unknown_parameter", f"unknown key {unknown[0]!r}{did_you_mean(unknown[0], _KEYS)}"
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= 512:
        return "invalid_custom_id", '"custom_id" must be a text of 1 to 512 characters'
    if custom_id in seen:
        return "duplicate_custom_id", f'"custom_id" {custom_id!r} is that of an earlier line'
    if request.get("method") != "POST":
        return "invalid_method", '"method" must be "POST"'
    if request.get("url") != endpoint:
        return "invalid_url", f'"url" must be the batch\'s endpoint, {endpoint!r}, not {request.get("url")!r}'
    if not isinstance(request.get("body"), dict):
        return "invalid_body", '"body" must be an object'
    if request["body"].get("stream"):
        return "invalid_body", '"stream" is not for batches: leave it out'
    return "", ""


def answer_to(
    key: str,
    line: Line,
    status: int = 0,
    body: dict[str, Any] | None = None,
    error: dict[str, Any] | None = None,
) -> Answer:
    """Returns the line of a batch's output or of its errors.

    Args:
      key: of the batch: what names of its requests begin with.
      line: what is answered.
      status, body: of the response; anything but 2xx is an error.
      error: why it was never asked, if it was not.

    Raises:
      ValueError: the body is no JSON.
    """
    name, failed = f"{key}_{line.number}", not 200 <= status < 300
    response = None if error else {"status_code": status, "request_id": f"req_{name}", "body": body}
    record: dict[str, Any] = {
        "id": f"batch_req_{name}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    if failed:
        record["line"] = line.number
    return Answer(line.number, failed, json.dumps(record, allow_nan=False).encode())


class Asker:
    """Asks for the answers to lines, so many at a time of all batches together."""

    def __init__(self, answer: Answerer, concurrency: int) -> None:
        """
        Args:
          answer: answers a request, `await answer(url, body, priority="batch")`. 429 and 503 mean later; another
            status from 500 on, or an exception, that the engine failed: it is asked a few times.
          concurrency: requests at a time.
        """
        self._answer, self._concurrency = answer, concurrency
        self._room = asyncio.Semaphore(concurrency)

    async def answer_all(self, key: str, endpoint: str, lines: Iterator[Line], journal: Journal) -> None:
        """Answers the lines that a journal has no answer to.

        Args:
          key: of the batch, see `answer_to`.
          endpoint: the URL of all lines.
          lines: read ahead in threads.
          journal: where the answers go.

        Raises:
          ExceptionGroup: of an OSError, where the journal cannot be written.
        """
        answers: asyncio.Queue[Answer | None] = asyncio.Queue(self._concurrency)
        pending = (line for line in lines if line.number not in journal)
        async with asyncio.TaskGroup() as whole:
            whole.create_task(_keep(answers, journal))
            async with asyncio.TaskGroup() as asking:
                while some := await in_thread(lambda: list(itertools.islice(pending, _READ_AHEAD))):
                    for line in some:
                        await self._room.acquire()  # first come, first served: batches take turns
                        task = asking.create_task(self._answer_line(key, endpoint, line, answers))
                        task.add_done_callback(lambda _: self._room.release())
            await answers.put(None)

    async def _answer_line(self, key: str, endpoint: str, line: Line, answers: "asyncio.Queue[Answer | None]") -> None:
        """Asks until there is an answer that stays."""
        failures, wait = 0, _FIRST_WAIT
        while True:
            try:
                status, body = await self._answer(endpoint, line.body, priority="batch")
                answer = answer_to(key, line, status, body)
            except Exception as error:
                gives_up = failures + 1 == _TRIES
                _LOG.warning("batch_%s: line %d: %s", key, line.number, described(error), exc_info=gives_up)
                status, message = 500, f"the server failed: {type(error).__name__}"
                failed = {"error": {"message": message, "type": "server_error", "param": None, "code": None}}
                answer = answer_to(key, line, status, failed)
            failures += status >= 500 and status not in _NOT_NOW
            if (status < 500 and status not in _NOT_NOW) or failures == _TRIES:
                return await answers.put(answer)
            await asyncio.sleep(wait * random.uniform(0.5, 1.5))
            wait = min(2 * wait, _LONGEST_WAIT)


async def _keep(answers: "asyncio.Queue[Answer | None]", journal: Journal) -> None:
    """Writes answers as they come until None comes: many at a time, so that a slow disk delays none for long."""
    ended = False
    try:
        while not ended:
            got = [await answers.get()]
            while not answers.empty():
                got.append(answers.get_nowait())
            ended = got[-1] is None
            await in_thread(journal.append, [answer for answer in got if answer is not None])
    except asyncio.CancelledError:
        left = [answers.get_nowait() for _ in range(answers.qsize())]
        await in_thread(journal.append, [answer for answer in left if answer is not None])
        raise


async def in_thread(call: Callable[..., Result], *args: Any) -> Result:
    """Makes a call in a thread. Who is cancelled meanwhile waits for it: no write goes on unnoticed."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await work
        raise
