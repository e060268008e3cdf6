"""OpenAI's API of files and batches over HTTP: paths, forms and pages of `batches.Batches`."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from meshway.framework.errors import did_you_mean
from meshway.framework.serving.batch_lines import in_thread
from meshway.framework.serving.batches import Batches
from meshway.framework.serving.parameters import RequestError

_ARGUMENTS = ("input_file_id", "endpoint", "completion_window", "metadata")
_FORM_BYTES = 1 << 16  # of a form beside the file in it, and of the body of other requests
_BLOCK = 1 << 18

Handler = Callable[[Request], Awaitable[Response]]


def routes(batches: Batches) -> list[Route]:
    """Returns the routes of files and batches.

    Errors are OpenAI's objects: 400 for a wrong request, 404 where there is no such thing, 413 for an input that is
    too large, 429 where too many batches have not ended, 507 for a disk that refuses.
    """

    async def add_file(request: Request) -> Response:
        return _json((await _upload(request, batches)).to_json())

    async def list_files(request: Request) -> Response:
        purpose = _query(request, "purpose", "after", "limit", "order").get("purpose")
        files = [file.to_json() for file in batches.files.all() if purpose in (None, file.purpose)]
        return _json(_page(request, files, 10_000, 10_000))

    async def file(request: Request) -> Response:
        return _json(batches.file(request.path_params["id"]).to_json())

    async def content(request: Request) -> Response:
        file = batches.file(request.path_params["id"])
        headers = {"content-length": str(file.bytes)}
        blocks = _blocks(await in_thread(_opened, batches.files.path(file)))
        return StreamingResponse(blocks, media_type="application/octet-stream", headers=headers)

    async def delete_file(request: Request) -> Response:
        id = request.path_params["id"]
        await batches.delete_file(id)
        return _json({"id": id, "object": "file", "deleted": True})

    async def create_batch(request: Request) -> Response:
        return _json((await batches.create(**await _arguments(request))).to_json())

    async def list_batches(request: Request) -> Response:
        _query(request, "after", "limit", "order")
        return _json(_page(request, [batch.to_json() for batch in batches.all()], 20, 100))

    async def batch(request: Request) -> Response:
        return _json(batches.batch(request.path_params["id"]).to_json())

    async def cancel_batch(request: Request) -> Response:
        return _json((await batches.cancel(request.path_params["id"])).to_json())

    table: list[tuple[str, str, Handler]] = [
        ("POST", "/v1/files", add_file),
        ("GET", "/v1/files", list_files),
        ("GET", "/v1/files/{id}", file),
        ("DELETE", "/v1/files/{id}", delete_file),
        ("GET", "/v1/files/{id}/content", content),
        ("POST", "/v1/batches", create_batch),
        ("GET", "/v1/batches", list_batches),
        ("GET", "/v1/batches/{id}", batch),
        ("POST", "/v1/batches/{id}/cancel", cancel_batch),
    ]
    return [Route(path, _told(handler), methods=[method]) for method, path, handler in table]


def _told(handler: Handler) -> Handler:
    """Returns a handler that tells errors as OpenAI's API does."""

    async def told(request: Request) -> Response:
        try:
            return await handler(request)
        except RequestError as error:
            refused = error
        except OSError as error:
            message = f"the server's disk refused: {error.strerror or error}"
            refused = RequestError(507, message, None, "disk_failure")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        headers = {"retry-after": "10"} if refused.status == 429 else None
        return _json(refused.body, refused.status, headers)

    return told


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns a value as JSON in ASCII: texts of requests may hold half a surrogate pair, which has no other code."""
    return Response(json.dumps(value), status, headers, "application/json")


async def _upload(request: Request, batches: Batches) -> Any:
    """Keeps the file of a form.

    Raises:
      RequestError: the form is wrong or the file is too large.
      OSError: it cannot be written.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError(400, 'send a form (multipart/form-data) with "purpose" and "file"')
    stream = _limited(request, batches.limits.file_bytes + _FORM_BYTES)
    try:
        form = await MultiPartParser(request.headers, stream, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise RequestError(400, f"the form is wrong: {error.message}") from error
    try:
        if unknown := [name for name in form if name not in ("file", "purpose")]:
            raise RequestError(400, f"unknown parameter {unknown[0]!r}{did_you_mean(unknown[0], ['file', 'purpose'])}")
        if (purpose := form.get("purpose")) != "batch":
            raise RequestError(400, f"purpose must be 'batch', not {purpose!r}", "purpose")
        if not isinstance(file := form.get("file"), UploadFile):
            raise RequestError(400, 'the form has no "file"', "file", "missing")
        if (file.size or 0) > batches.limits.file_bytes:
            raise _too_large(batches.limits.file_bytes)
        return await batches.add_file(file.file, (file.filename or "input.jsonl")[:255])
    finally:
        await form.close()


async def _arguments(request: Request) -> dict[str, Any]:
    """Returns the arguments of a new batch.

    Raises:
      RequestError: the body is no object of them.
    """
    body = b"".join([block async for block in _limited(request, _FORM_BYTES)])
    try:
        arguments = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}"[:300]) from error
    if not isinstance(arguments, dict):
        raise RequestError(400, f"the body must be an object with {', '.join(_ARGUMENTS)}")
    if unknown := [name for name in arguments if name not in _ARGUMENTS]:
        near = did_you_mean(unknown[0], _ARGUMENTS)
        raise RequestError(400, f"unknown parameter {unknown[0]!r}{near}", unknown[0], "unknown_parameter")
    for name in _ARGUMENTS[:3]:
        if not isinstance(arguments.setdefault(name, "24h" if name == "completion_window" else None), str):
            raise RequestError(400, f"{name} must be a text", name, "invalid_type")
    return arguments


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """Yields the body of a request.

    Raises:
      RequestError: it has more bytes than the limit.
    """
    received = 0
    async for block in request.stream():
        if (received := received + len(block)) > limit:
            raise _too_large(limit)
        yield block


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"too large: at most {limit:,} bytes are taken", None, "request_too_large")


def _query(request: Request, *names: str) -> dict[str, str]:
    """Returns the parameters of a query.

    Raises:
      RequestError: one is unknown.
    """
    if unknown := [name for name in request.query_params if name not in names]:
        raise RequestError(400, f"unknown parameter {unknown[0]!r}{did_you_mean(unknown[0], names)}", unknown[0])
    return dict(request.query_params)


def _page(request: Request, items: Sequence[dict[str, Any]], default: int, most: int) -> dict[str, Any]:
    """Returns a page of a list, `limit` items `after` one, the newest first unless `order` is 'asc'.

    Raises:
      RequestError: one of these is wrong.
    """
    query = request.query_params
    limit, order, after = query.get("limit", str(default)), query.get("order", "desc"), query.get("after")
    if not (limit.isdecimal() and limit.isascii() and len(limit) < 9 and 1 <= int(limit) <= most):
        raise RequestError(400, f"limit must be a whole number from 1 to {most}, not {limit!r}", "limit")
    if order not in ("asc", "desc"):
        raise RequestError(400, f"order must be 'asc' or 'desc', not {order!r}", "order")
    ordered = list(items) if order == "asc" else list(reversed(items))
    start = 0
    if after:
        places = [place for place, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise RequestError(400, f"there is no {after!r} to go on after", "after")
        start = places[0] + 1
    page = ordered[start : start + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(ordered) > start + len(page),
    }


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")  # closed by `_blocks`, which goes on even where the file is deleted meanwhile
    except FileNotFoundError as error:
        raise RequestError(404, "there is no such file any more", "file_id", "not_found") from error


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Yields a file in blocks; starlette reads them in threads."""
    with file:
        while block := file.read(_BLOCK):
            yield block
