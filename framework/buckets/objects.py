"""Objects in buckets as files: `gs://` paths, writes that replace one known content, logs that grow.

An object store neither appends nor renames. An object is written whole here, and where another process could write it
too, only in place of the generation that was read; a log is rewritten whole, at most so often.
"""

import contextlib
import datetime
import functools
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from etils import epath
from etils.epath import gpath, stat_utils

from meshway.framework.buckets.client import client, repeated
from meshway.framework.errors import EnvironmentFailure, UserError

_LOG_SECONDS, _LOG_SHARE = 1.0, 0.05  # at least between two writes of a log; at most of the time spent on them

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_BOUNDARY = "==meshway=="


class Replaced(Exception):
    """An object is not any more the generation that was to be replaced: another process has written it."""


@epath.register_path_cls("gs://")
class BucketPath(gpath.PosixGPath):
    """`gs://bucket/key` with the methods of `pathlib.Path`; Orbax's paths of buckets are these too.

    Folders are prefixes of keys: they need not be made, and are there as long as an object is in them. Requests that
    fail for a while (429, 5xx, reset connections, no answer) are repeated; what no repetition mends is a UserError.
    """

    @property
    def bucket(self) -> str:
        return self.parts[2]

    @property
    def key(self) -> str:
        """The name of the object in the bucket; '' for the bucket itself."""
        return "/".join(self.parts[3:])

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_dir(self) -> bool:
        return any(True for _ in self._listed(limit=1)) or not self.key

    def is_file(self) -> bool:
        return bool(self.key) and self._about() is not None

    def iterdir(self) -> Iterator["BucketPath"]:
        for name in self._listed(delimiter="/"):
            yield self / name.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields what is in this folder by a pattern of names, without `/` and `**`, or in each folder of it."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if path.match(first):
                if rest:
                    yield from path.glob(rest)
                else:
                    yield path

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        for name in self._listed():
            if (path := type(self)(f"gs://{self.bucket}/{name}")).match(pattern):
                yield path

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(17, "it exists", str(self))

    def read_bytes(self) -> bytes:
        return read(self)[0]

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        put(self, data)
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.exists():
            put(self, b"")
        elif not exist_ok:
            raise FileExistsError(17, "it exists", str(self))

    def open(self, mode: str = "r", **kwargs: Any) -> Any:  # type: ignore[override]
        """Opens the object to read or to write it whole; writing ends, and may fail, when it is closed."""
        return repeated(lambda: client().open(str(self), mode, **kwargs), self)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._call("DELETE", "b/{}/o/{}", self.bucket, self.key)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_generation(self, generation: int) -> None:
        """Removes the object if it is that generation; raises FileNotFoundError or FileExistsError else."""
        self._call("DELETE", "b/{}/o/{}", self.bucket, self.key, ifGenerationMatch=str(generation))

    def stat(self) -> stat_utils.StatResult:
        if about := self._about():
            seconds = int(datetime.datetime.fromisoformat(about["updated"]).timestamp())
            return stat_utils.StatResult(is_directory=False, length=int(about["size"]), mtime=seconds)
        if self.is_dir():
            return stat_utils.StatResult(is_directory=True, length=0, mtime=0)
        raise FileNotFoundError(2, "there is no such file", str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        names = list(self._listed())
        if not names and not missing_ok:
            raise FileNotFoundError(2, "there is no such folder", str(self))
        for name in names:
            type(self)(f"gs://{self.bucket}/{name}").unlink(missing_ok=True)

    def rmdir(self) -> None:
        """Nothing is left of a folder without objects."""

    def rename(self, target: Any) -> "BucketPath":  # type: ignore[override]
        """Copies all objects of a folder, or one object, then removes them: not at once, and repeated where killed."""
        target = type(self)(target)
        names = list(self._listed()) or [self.key]
        for name in names:
            key = target.key + name[len(self.key) :]
            path = "b/{}/o/{}/rewriteTo/b/{}/o/{}"
            self._call("POST", path, self.bucket, name, target.bucket, key)
        for name in names:
            type(self)(f"gs://{self.bucket}/{name}").unlink(missing_ok=True)
        return target

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    absolute = resolve

    def _about(self) -> dict[str, Any] | None:
        """Returns the metadata of the object, None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = self._call("GET", "b/{}/o/{}", self.bucket, self.key)
            return found
        return None

    def _listed(self, delimiter: str = "", limit: int | None = None) -> Iterator[str]:
        """Yields the names of objects below, with a delimiter those in this folder and its folders."""
        prefix = f"{self.key}/" if self.key else ""
        given: dict[str, Any] = {"prefix": prefix, "fields": "items(name),prefixes,nextPageToken"}
        given |= ({"delimiter": delimiter} if delimiter else {}) | ({"maxResults": limit} if limit else {})
        while True:
            try:
                found = self._call("GET", "b/{}/o", self.bucket, **given)
            except FileNotFoundError as error:
                raise _no_bucket(self) from error
            names = [*(each["name"] for each in found.get("items", ())), *found.get("prefixes", ())]
            yield from (name for name in names if name != prefix)  # some tools make an object for a folder
            if limit or not found.get("nextPageToken"):
                return
            given["pageToken"] = found["nextPageToken"]

    def _call(self, method: str, path: str, *names: str, **given: Any) -> Any:
        """Returns what a request of the JSON API answers, parsed, None for nothing."""
        _, body = repeated(lambda: client().call(method, path, *names, **given), self)
        return json.loads(body) if body else None


def bucket_path(text: str) -> BucketPath:
    """Returns the path of an address `gs://bucket/key`.

    Raises:
      UserError: it is none, or the extra that reads buckets is not installed.
    """
    bucket, _, key = text.removeprefix("gs://").partition("/")
    if not text.startswith("gs://"):
        meant = text.partition(":")[2].lstrip("/")
        raise UserError(f"{text} is no address of a bucket; did you mean gs://{meant}?")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(
            f"{text}: {bucket!r} cannot be the name of a bucket: these have 3 characters or more, lower-case letters, "
            "digits, '-', '_' and '.'; write gs://BUCKET/FOLDER"
        )
    if any(part in ("", ".", "..") for part in key.rstrip("/").split("/")) and key:
        raise UserError(f"{text}: the name of an object has no empty part, '.' or '..'; write gs://BUCKET/FOLDER")
    if find_spec("gcsfs") is None:
        raise UserError(f"{text}: reading and writing gs:// needs an extra: pip install 'meshway[gcs]'")
    return BucketPath(text)


def read(path: BucketPath) -> tuple[bytes, Mapping[str, str]]:
    """Returns an object's content and the headers of the answer. Raises FileNotFoundError."""
    call = functools.partial(client().call, "GET", "b/{}/o/{}", path.bucket, path.key, alt="media")
    headers, body = repeated(call, path)
    return body, headers


def generation_of(headers: Mapping[str, str]) -> int:
    """Returns the generation of what was read."""
    return int(headers["X-Goog-Generation"])


def put(path: BucketPath, data: bytes, generation: int | None = None) -> int:
    """Writes an object whole; returns its new generation.

    Args:
      path: the object.
      data: its content.
      generation: what it may replace, 0 for nothing; None for whatever there is.

    Raises:
      Replaced: it is another generation.
      EnvironmentFailure: the folder has been claimed by another process since this one held it.
    """
    check_claimed(path)
    about = json.dumps({"name": path.key, "cacheControl": "no-store"}).encode()
    kinds = (b"application/json; charset=UTF-8", b"application/octet-stream")
    parts = [
        b"--%s\r\nContent-Type: %s\r\n\r\n%s\r\n" % (_BOUNDARY.encode(), kind, part)
        for kind, part in zip(kinds, (about, data), strict=True)
    ]
    request = functools.partial(
        client().call,
        "POST",
        f"{client()._location}/upload/storage/v1/b/{path.bucket}/o",
        uploadType="multipart",
        headers={"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'},
        data=b"".join([*parts, b"--%s--" % _BOUNDARY.encode()]),
        **({} if generation is None else {"ifGenerationMatch": str(generation)}),
    )
    try:
        _, body = repeated(request, path)
    except FileNotFoundError as error:
        raise _no_bucket(path) from error
    except FileExistsError as error:  # 412; also where the answer to the first of two equal requests was lost
        with contextlib.suppress(FileNotFoundError):
            there, headers = read(path)
            if there == data and generation is not None and generation_of(headers) > generation:
                return generation_of(headers)
        raise Replaced(str(path)) from error
    return int(json.loads(body)["generation"])


class Log:
    """An object that grows by lines: what a file opened to append is.

    It is rewritten whole, at most once a second and for at most a twentieth of the time; `flush` and `close` write
    what is left. A process that is killed between loses lines, as many as it wrote in that time. Another process that
    writes it is noticed.

    Args:
      path: the object, made by the first write.
    """

    def __init__(self, path: BucketPath) -> None:
        self._path, self._generation, self._content = path, 0, bytearray()
        with contextlib.suppress(FileNotFoundError):
            content, headers = read(path)
            self._content, self._generation = bytearray(content), generation_of(headers)
        self._is_written, self._due = True, 0.0

    def read(self) -> bytes:
        """Returns all of it."""
        return bytes(self._content)

    def write(self, data: bytes | memoryview) -> int:
        """Adds data; raises EnvironmentFailure where the object has been written by another process."""
        self._content += data
        self._is_written = False
        if time.monotonic() >= self._due:
            self.flush()
        return len(data)

    def flush(self) -> None:
        """Writes what has not been written; raises as `write`."""
        if self._is_written:
            return
        began = time.monotonic()
        try:
            self._generation = put(self._path, bytes(self._content), self._generation)
        except Replaced as error:
            raise EnvironmentFailure(f"{self._path} is being written by another process too: this one stops") from error
        self._is_written = True
        now = time.monotonic()
        self._due = now + max(_LOG_SECONDS, (now - began) / _LOG_SHARE)

    def close(self) -> None:
        self.flush()


LOST: set[str] = set()  # the claims of this process that others have taken over


def check_claimed(path: object) -> None:
    """Raises EnvironmentFailure where another process has taken over a claim of this one on the folder of `path`."""
    for claim in LOST:
        if str(path).startswith(claim.rpartition("/")[0] + "/"):
            raise EnvironmentFailure(
                f"{claim}, which this process held, was not renewed in time and is another one's now: this one stops, "
                "and writes nothing more"
            )


def _no_bucket(path: BucketPath) -> UserError:
    return UserError(f"{path}: there is no bucket {path.bucket!r}; make it first, or check its name")


def content_of(content: bytes | Callable[[Any], object]) -> bytes:
    """Returns bytes, or what a function writes to a file open in binary mode."""
    if isinstance(content, bytes):
        return content
    content(buffer := io.BytesIO())
    return buffer.getvalue()
