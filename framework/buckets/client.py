"""Requests to Google Cloud Storage: one client, repeated while failures pass, refused in one message."""

import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from meshway.framework.errors import EnvironmentFailure, UserError, first_line

_T = TypeVar("_T")

_PATIENCE_SECONDS = 300.0  # for how long a request is repeated
_CONNECT_SECONDS, _READ_SECONDS = 15.0, 60.0


class Addressed(Protocol):
    """What a request is about: its text is the address, for messages."""

    @property
    def bucket(self) -> str: ...


class _Repeats(logging.Handler):
    """Counts the requests that gcsfs repeats, by what it logs, and keeps its tracebacks from the terminal."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "retrying after exception" in record.getMessage()


_repeats = _Repeats()


def num_repeated() -> int:
    """Returns how many requests to buckets this process has had to repeat, those of tensorstore not counted."""
    return _repeats.count


@functools.cache
def client() -> Any:
    """Returns the client of Google Cloud Storage; STORAGE_EMULATOR_HOST gives another server's address."""
    token = None
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # emulators have no gRPC
        token = "anon"  # and want no credentials
    import aiohttp
    import gcsfs  # takes seconds

    logger = logging.getLogger("gcsfs")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(_repeats)
    logging.getLogger("google.auth").setLevel(logging.ERROR)  # that there are no credentials is said by `_refusal`
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
    return gcsfs.GCSFileSystem(
        token=token, use_listings_cache=False, skip_instance_cache=True, requests_timeout=timeout
    )


def repeated(request: Callable[[], _T], path: Addressed) -> _T:
    """Returns what a request returns, which is repeated while its failures are of a kind that passes.

    Raises:
      FileNotFoundError, FileExistsError: the object is missing, or not the one that was to be replaced.
      UserError: it is refused.
      EnvironmentFailure: the store has not answered for `_PATIENCE_SECONDS`.
    """
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return request()
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            if not _passes(error):
                raise UserError(_refusal(path, error)) from error
            waited = time.monotonic() - began
            if waited > _PATIENCE_SECONDS:
                raise EnvironmentFailure(
                    f"{path}: the store has not answered for {waited:.0f} s ({_described(error)}); run it again"
                ) from error
            print(f"{path}: {_described(error)}; trying again", file=sys.stderr, flush=True)
        _repeats.count += 1
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


def _passes(error: Exception) -> bool:
    """Whether an error may be gone when the request is repeated."""
    import aiohttp
    from gcsfs import retry

    return retry.is_retriable(error) or isinstance(error, (aiohttp.ClientError, TimeoutError, ConnectionError))


def _refusal(path: Addressed, error: Exception) -> str:
    """Returns the message of a request that is refused for good."""
    code = getattr(error, "code", None)
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):
        return (
            f"{path}: access is forbidden (403: {_described(error)}); give this account the role storage.objectUser "
            f"of the bucket {path.bucket!r}, or take another bucket"
        )
    if code in (401, "401"):
        return (
            f"{path}: the store wants credentials and there are none that it takes (401: {_described(error)}); run "
            "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    return f"{path}: the store refuses ({_described(error)})"


def _described(error: Exception) -> str:
    text = first_line(error).removeprefix("Forbidden: ")
    return text if text != type(error).__name__ else f"{type(error).__name__}"
