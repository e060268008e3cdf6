"""A server's life: it listens once all is compiled, answers, and ends without losing what it has begun."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from meshway.framework.errors import UserError
from meshway.framework.serving.http import Api
from meshway.framework.serving.scheduler import Scheduler

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5  # in which answers that are complete reach their clients


class Companion(Protocol):
    """What works beside the endpoints, as batches do."""

    def start(self) -> Awaitable[object]:
        """Begins, on the loop of the server."""
        ...

    def stop(self) -> Awaitable[object]:
        """Ends, before the engine does."""
        ...


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket at an address that is ours from now on; nobody is heard yet.

    Raises:
      UserError: there is no such address, or it is taken.
    """
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port={port} is not a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error.strerror or error}; --port=0 takes a free one") from error
    return found


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: a server that is told to end still answers, that it does."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """Serves until a signal; a second one ends the process at once."""

    def __init__(
        self,
        api: Api,
        app: ASGIApp,
        scheduler: Scheduler,
        drain_seconds: float,
        say: Callable[[str], object],
        companions: Sequence[Companion] = (),
    ):
        """Prepares; `drain_seconds` may pass between the first signal and the end, for what has begun."""
        self._api, self._app, self._scheduler, self._say = api, app, scheduler, say
        self._drain_seconds, self._companions = drain_seconds, companions
        self._signals: list[int] = []
        self._ending = asyncio.Event()

    def run(self, listening: socket.socket) -> int:
        """Serves on a socket that `bound_socket` made; returns the signal that ended it."""
        return asyncio.run(self._run(listening))

    def _on_signal(self, number: int) -> None:
        if self._signals:
            os._exit(128 + number)
        self._signals.append(number)
        self._api.is_ready = False
        self._ending.set()

    async def _run(self, listening: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        self._scheduler.start()
        for companion in self._companions:
            await companion.start()
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
        server = _Uvicorn(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        while not (server.started or serving.done()):
            await asyncio.sleep(_POLL_SECONDS)
        self._api.is_ready = not self._ending.is_set()
        host, port = listening.getsockname()[:2]
        self._say(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}")
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
        await self._drain()
        server.should_exit = True
        ending.cancel()
        await serving
        return self._signals[0] if self._signals else 0

    async def _drain(self) -> None:
        began = time.monotonic()
        self._say(f"ending: what has begun may take {self._drain_seconds:g} s more; a second signal ends it at once")
        for companion in self._companions:
            await companion.stop()
        self._scheduler.drain()
        while not self._scheduler.is_drained and time.monotonic() - began < self._drain_seconds:
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.to_thread(self._scheduler.stop)
