"""A served model over HTTP: OpenAI's endpoints and a few of our own, health, metrics, and a page to look at."""

import asyncio
import base64
import contextlib
import functools
import hmac
import json
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from meshway.framework.errors import UserError
from meshway.framework.serving.completions import Completions
from meshway.framework.serving.metrics import CONTENT_TYPE, Metrics
from meshway.framework.serving.openai_requests import ServedModel, chat_completion, completion, prompts_of
from meshway.framework.serving.parameters import (
    EMBEDDINGS,
    SCORE,
    TOKENIZE,
    RequestError,
    parse_json,
    read,
    wrong,
)
from meshway.framework.serving.scheduler import Priority, Scheduler

_OPEN = ("/", "/health", "/ready")  # need no token: they say nothing of any request
_RETRY_SECONDS = 1
_BODY_SECONDS = 60.0  # in which a body must have come
_MOST_INPUTS = 2048  # of one request for scores or embeddings
SCORED_TOGETHER = 4  # of these, between two steps of the slots
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Api:
    """The endpoints of one served model.

    Attributes:
      is_ready: whether requests are welcome; false before the first and from the beginning of the end.
    """

    def __init__(
        self,
        model: ServedModel,
        scheduler: Scheduler,
        scorer: Any,
        metrics: Metrics,
        facts: Mapping[str, str] | None = None,
        tokens: Sequence[bytes] = (),
        max_body_bytes: int = 4 << 20,
        request_seconds: float | None = None,
        stalled_seconds: float = 120.0,
    ):
        """Prepares.

        Args:
          model: what requests are checked against.
          scheduler: answers them.
          scorer: scores and embeds on the engine's thread; None where neither is served.
          metrics: counts.
          facts: for the page: layout, checkpoint and the like.
          tokens: one of which each request must bear; none asks for none.
          max_body_bytes: of a request.
          request_seconds: that a request may take; None for any number. Those of batches may take any.
          stalled_seconds: of an engine that has work and does none, after which the server is not healthy.
        """
        self._model, self._scheduler, self._scorer, self._metrics = model, scheduler, scorer, metrics
        self._facts, self._tokens, self._max_body_bytes = dict(facts or {}), tuple(tokens), max_body_bytes
        self._request_seconds, self._stalled_seconds = request_seconds, stalled_seconds
        self._completions = Completions(model, scheduler, scorer, metrics)
        self.is_ready = False

    def app(self, routes: Sequence[BaseRoute] = ()) -> ASGIApp:
        """Returns the application, with more routes behind the same tokens."""
        posts = [Route(url, self._post, methods=["POST"]) for url in self._answers]
        gets = [
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics_text),
            Route("/status", self._status),
            Route("/", self._page),
        ]
        handlers: Any = {HTTPException: self._no_such, RequestError: self._refused}
        app = Starlette(routes=[*posts, *gets, *routes], exception_handlers=handlers)
        return _Guard(app, self._tokens, self._metrics) if self._tokens else app

    @property
    def _answers(self) -> Mapping[str, Callable[[dict[str, Any], Priority], Awaitable[dict[str, Any]]]]:
        return {
            "/v1/completions": self._complete,
            "/v1/chat/completions": self._chat,
            "/v1/embeddings": self._embeddings,
            "/v1/score": self._score,
            "/v1/tokenize": self._tokenize,
        }

    @property
    def batch_endpoints(self) -> tuple[str, ...]:
        """What `answer` answers."""
        return tuple(url for url in self._answers if url != "/v1/tokenize")

    async def answer(self, url: str, body: dict[str, Any], priority: Priority = "batch") -> tuple[int, dict[str, Any]]:
        """Returns status and body of the answer to a request that came by another way, as in a batch."""
        try:
            if url not in self._answers:
                raise RequestError(404, f"there is no endpoint {url!r} for batches", "url", "unknown_url")
            if body.get("stream"):
                raise RequestError(400, "stream: a batch has whole answers", "stream")
            found = await self._answers[url](body, priority)
        except Exception as error:
            refused = _refusal(error)
            self._metrics.answered(url if url in self._answers else "unknown", refused.status, refused.code)
            return refused.status, refused.body
        self._metrics.answered(url, 200)
        return 200, found

    async def _post(self, request: Request) -> Response:
        url = request.url.path
        try:
            body = parse_json(await self._body(request))
            if body.get("stream") is True and url in ("/v1/completions", "/v1/chat/completions"):
                response: Response = await self._stream(request, url, body)
            else:
                response = _json(200, await _unless_gone(request.receive, self._answers[url](body, "online")))
        except Exception as error:
            refused = _refusal(error)
            self._metrics.answered(url, refused.status, refused.code)
            return _json(refused.status, refused.body)
        self._metrics.answered(url, 200)
        return response

    async def _body(self, request: Request) -> bytes:
        """Returns the body; RequestError where it is too large, or comes too slowly."""
        too_large = RequestError(
            413, f"the body is larger than {self._max_body_bytes:,} bytes", None, "request_too_large"
        )
        given = request.headers.get("content-length", "0")
        if not given.isdecimal() or int(given) > self._max_body_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > self._max_body_bytes:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise RequestError(408, "the body did not come in time", None, "timeout") from None
        return b"".join(parts)

    async def _stream(self, request: Request, url: str, body: dict[str, Any]) -> Response:
        check = chat_completion if url == "/v1/chat/completions" else completion
        asked = await asyncio.to_thread(check, body, self._model)
        pieces = self._completions.pieces(asked, "online", self._request_seconds)
        try:  # what is wrong shows before the first piece: until then the status may be another than 200
            first = await _unless_gone(request.receive, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        return _Events(first, pieces)

    def _seconds(self, priority: Priority) -> float | None:
        return self._request_seconds if priority == "online" else None

    async def _complete(self, body: dict[str, Any], priority: Priority) -> dict[str, Any]:
        asked = await asyncio.to_thread(completion, body, self._model)
        return await self._completions.whole(asked, priority, self._seconds(priority))

    async def _chat(self, body: dict[str, Any], priority: Priority) -> dict[str, Any]:
        asked = await asyncio.to_thread(chat_completion, body, self._model)
        return await self._completions.whole(asked, priority, self._seconds(priority))

    async def _embeddings(self, body: dict[str, Any], priority: Priority) -> dict[str, Any]:
        given = read(body, EMBEDDINGS, self._model.name)
        form = given.get("encoding_format", "float")
        if form not in ("float", "base64"):
            raise wrong("encoding_format", form, "float or base64")
        read_inputs = self._model.text.read_inputs
        inputs = await asyncio.to_thread(prompts_of, "input", given.get("input"), read_inputs, _MOST_INPUTS)
        self._check_scorer("input")
        data = []
        for index, each in enumerate(inputs):
            vector = await self._computed("input", functools.partial(self._scorer.embed, each.ids), priority)
            floats = np.asarray(vector, "<f4")
            shown = floats.tolist() if form == "float" else base64.b64encode(floats.tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": shown})
        count = sum(len(each.ids) for each in inputs)
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self._model.name, "usage": usage}

    async def _score(self, body: dict[str, Any], priority: Priority) -> dict[str, Any]:
        given = read(body, SCORE, self._model.name)
        text, most = self._model.text, _MOST_INPUTS
        inputs = await asyncio.to_thread(prompts_of, "inputs", given.get("inputs"), text.read_inputs, most)
        targets = await asyncio.to_thread(prompts_of, "targets", given.get("targets"), text.read_targets, most)
        if len(inputs) != len(targets):
            raise RequestError(400, f"targets: {len(targets)} of them, and {len(inputs)} inputs", "targets")
        self._check_scorer("inputs")
        data: list[dict[str, Any]] = []
        for first in range(0, len(inputs), SCORED_TOGETHER):
            group = slice(first, first + SCORED_TOGETHER)
            known, new = [each.ids for each in inputs[group]], [each.ids for each in targets[group]]
            for made in await self._computed("targets", functools.partial(self._scorer.scored, known, new), priority):
                scores = [float(each) for each in made.log_probs]
                data.append({"object": "score", "index": len(data), "score": sum(scores), "token_scores": scores})
        count = sum(len(each.ids) for each in (*inputs, *targets))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self._model.name, "usage": usage}

    def _check_scorer(self, param: str) -> None:
        if self._scorer is None:
            raise RequestError(400, f"{self._model.name} computes no scores or embeddings here", param, "not_served")

    async def _computed(self, param: str, compute: Callable[[], Any], priority: Priority) -> Any:
        try:
            return await self._completions.call(compute, priority)
        except (UserError, ValueError) as error:
            raise RequestError(400, f"{param}: {error}", param) from None

    async def _tokenize(self, body: dict[str, Any], priority: Priority) -> dict[str, Any]:
        given = read(body, TOKENIZE, self._model.name)
        prompt = prompts_of("text", given.get("text"), self._model.text.read_inputs, 1)[0]
        pieces = self._model.text.inputs.pieces(prompt.ids)
        return {"tokens": list(prompt.ids), "pieces": pieces, "count": len(prompt.ids)}

    async def _models(self, request: Request) -> Response:
        return _json(200, {"object": "list", "data": [self._described]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            refused = RequestError(404, f"there is no model {name[:60]!r} here", "model", "model_not_found")
            return _json(404, refused.body)
        return _json(200, self._described)

    @property
    def _described(self) -> dict[str, Any]:
        model = self._model
        lengths = {"max_model_len": model.max_length, "max_input_length": model.max_input_length}
        return {"id": model.name, "object": "model", "created": 0, "owned_by": "meshway"} | lengths

    async def _health(self, request: Request) -> Response:
        if self._scheduler.failure:
            return _json(500, {"status": "failed", "reason": self._scheduler.failure})
        if (seconds := self._scheduler.stalled_seconds) > self._stalled_seconds:
            return _json(500, {"status": "stalled", "seconds": round(seconds)})
        return _json(200, {"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        is_ready = self.is_ready and not self._scheduler.failure
        return _json(200 if is_ready else 503, {"ready": is_ready})

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _status(self, request: Request) -> Response:
        scheduler = self._scheduler
        found = {
            "model": self._model.name,
            "facts": self._facts,
            "ready": self.is_ready and not scheduler.failure,
            "failure": scheduler.failure,
            "slots": scheduler.num_slots,
            "slots_used": scheduler.slots_used,
            "waiting": sum(scheduler.queued.values()),
            "generated_tokens": self._metrics.total_generated,
            "recent_errors": list(self._metrics.recent_errors),
        }
        return _json(200, found)

    async def _page(self, request: Request) -> Response:
        page = Path(__file__).with_name("page.html").read_bytes()
        return Response(page, media_type="text/html", headers={"content-security-policy": _PAGE_POLICY})

    async def _no_such(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        refused = RequestError(
            error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}", None, code
        )
        self._metrics.answered("unknown", error.status_code, code)
        return _json(error.status_code, refused.body, error.headers)

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return _json(error.status, error.body)


class _Guard:
    """Lets through requests that bear one of some tokens."""

    def __init__(self, app: ASGIApp, tokens: Sequence[bytes], metrics: Metrics):
        self._app, self._tokens, self._metrics = app, tokens, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN or self._is_known(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        refused = RequestError(401, "give a token that this server knows: 'Authorization: Bearer TOKEN'")
        refused.code = "invalid_api_key"
        self._metrics.answered("unknown", 401, refused.code)
        await _json(401, refused.body, {"www-authenticate": "Bearer"})(scope, receive, send)

    def _is_known(self, headers: Mapping[bytes, bytes]) -> bool:
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        matches = [hmac.compare_digest(given.strip(), token) for token in self._tokens]  # all: none shows by the time
        return kind.lower() == b"bearer" and any(matches)


class _Events(Response):
    """Chunks of an answer as server-sent events; a client that goes away ends them."""

    def __init__(self, first: dict[str, Any], pieces: AsyncGenerator[dict[str, Any]]):
        super().__init__(headers={"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        del self.headers["content-length"]
        self._first, self._pieces = first, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        with contextlib.suppress(ClientGone):
            await _unless_gone(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async with contextlib.aclosing(self._pieces):
            try:
                await event(_dumped(self._first))
                async for piece in self._pieces:
                    await event(_dumped(piece))
                await event("[DONE]")
            except Exception as error:
                await event(_dumped(_refusal(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ClientGone(Exception):
    """The client has closed its connection."""


async def _unless_gone(receive: Receive, answer: Awaitable[Any]) -> Any:
    """Returns an answer; if the client goes away before, ends its making and raises ClientGone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    making, watching = asyncio.ensure_future(answer), asyncio.create_task(watch())
    try:
        await asyncio.wait({making, watching}, return_when=asyncio.FIRST_COMPLETED)
        if making.done():
            return making.result()
        raise ClientGone
    finally:
        making.cancel()
        watching.cancel()
        await asyncio.gather(making, watching, return_exceptions=True)


def _refusal(error: Exception) -> RequestError:
    """Returns what a client is told of an error; an unexpected one is printed, without any words of the request."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ClientGone | ClientDisconnect):
        return RequestError(499, "the client has gone", None, "client_gone")
    if isinstance(error, UserError):
        return RequestError(400, str(error))
    traceback.print_tb(error.__traceback__)
    print(f"meshway: a request failed: {type(error).__name__}", flush=True)
    return RequestError(500, "the server has failed at this request", None, "internal_error")


def _dumped(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _json(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Response:
    more = {"retry-after": str(_RETRY_SECONDS)} if status in (429, 503) else {}
    found = {**(headers or {}), **more}
    return Response(_dumped(value), status_code=status, media_type="application/json", headers=found)
