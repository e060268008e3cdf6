"""Files made once and kept in the user's cache directory."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_directory() -> Path:
    """Returns $MESHWAY_CACHE_DIR, else $XDG_CACHE_HOME/meshway, else ~/.cache/meshway."""
    if own := os.environ.get("MESHWAY_CACHE_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meshway"


def cached_file(name: str, make: Callable[[], bytes]) -> Path:
    """Returns the path of cache file `name`, written from `make()` if it is not there.

    The file appears whole or not at all: it is written beside its place and moved there, so processes that
    race each make it and the last one wins. `name` must change whenever `make()` would return other bytes.

    Raises:
      ValueError: the cache directory cannot be written.
    """
    path = cache_directory() / name
    if path.is_file():
        return path
    content = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=name + ".")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror}; set MESHWAY_CACHE_DIR to a directory that can be written"
        ) from error
    return path
