"""A server like `meshway serve`, without a model: batches, and completions as told by their prompts. Run as a program,
it serves a folder at a free port, which it prints.

Prompts: 'refuse' is answered by 400, 'busy' twice by 429 before it is answered, 'flaky' fails twice, 'broken' always,
'hang' is never answered; all others are echoed after some milliseconds.
"""

import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import sys
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from meshway.framework.serving.batch_routes import routes
from meshway.framework.serving.batches import Batches, Limits

ENDPOINTS = ("/v1/completions", "/v1/embeddings")
CAPACITY = int(os.environ.get("FAKE_CAPACITY", 8))  # streams at a time; more are answered by 429
FORGETS = int(os.environ.get("FAKE_FORGETS", 0))  # of the tokens made, how many are not counted
_asked: collections.Counter[str] = collections.Counter()
_counted = collections.Counter({"prompt_tokens_total": 0, "generated_tokens_total": 0})


def refusal(status: int) -> tuple[int, dict]:
    return status, {"error": {"message": f"status {status}", "type": "fake", "param": None, "code": None}}


async def answer(url: str, body: dict, priority: str = "online") -> tuple[int, dict]:
    assert url in ENDPOINTS and priority == "batch"
    prompt = body.get("prompt", "")
    _asked[prompt] += 1
    kind = prompt.partition(" ")[0]
    if kind == "hang":
        await asyncio.sleep(3600)
    await asyncio.sleep(random.uniform(0.001, 0.008))
    if kind == "refuse":
        return refusal(400)
    if kind == "busy" and _asked[prompt] <= 2:
        return refusal(429)
    if kind == "broken" or (kind == "flaky" and _asked[prompt] <= 2):
        raise RuntimeError("the engine failed")
    return 200, {"object": "text_completion", "process": os.getpid(), "choices": [{"index": 0, "text": prompt.upper()}]}


async def complete(request: Request) -> Response:
    """Streams `max_tokens` tokens, a word each, the first after 20 ms and each next one after 5 ms."""
    body = json.loads(await request.body())
    assert body["model"] == "fake" and body["stream"] and body["stream_options"] == {"include_usage": True}
    status = 400 if len(body["prompt"]) > 1000 else 429 if _counted["running"] >= CAPACITY else 200
    _counted[f'requests_total{{endpoint="/v1/completions",status="{status}"}}'] += 1
    if status != 200:
        return JSONResponse(refusal(status)[1], status)
    _counted["running"] += 1
    _counted["prompt_tokens_total"] += len(body["prompt"])
    _counted["generated_tokens_total"] += body["max_tokens"] - FORGETS

    async def events():
        try:
            await asyncio.sleep(0.015)
            for number in range(body["max_tokens"]):
                await asyncio.sleep(0.005)
                choice = {"index": 0, "text": f"w{number} ", "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            _counted["running"] -= 1

    return StreamingResponse(events(), media_type="text/event-stream")


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model"}]})


async def metrics(request: Request) -> Response:
    return Response("".join(f"meshway_{name} {count}\n" for name, count in _counted.items()), media_type="text/plain")


def app(folder: Path) -> Starlette:
    batches = Batches(folder, answer, ENDPOINTS, Limits(file_bytes=1 << 20))

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette):
        await batches.start()
        yield
        await batches.stop()

    own = [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/metrics", metrics),
    ]
    return Starlette(routes=[*routes(batches), *own], lifespan=lifespan)


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    server = uvicorn.Server(uvicorn.Config(app(Path(sys.argv[1])), log_level="warning"))
    asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main()
