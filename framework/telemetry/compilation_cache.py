"""Compiled programs kept on disk between starts, by jax's persistent cache: where, how much, and what it spared."""

import hashlib
import importlib.util
import platform
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from meshway.framework.errors import UserError
from meshway.framework.files import in_bucket, open_path, user_cache
from meshway.framework.telemetry.profiler import Compilations

VARIABLE = "MESHWAY_COMPILATION_CACHE"
MAX_BYTES = 2 * 2**30  # of a local folder; the least recently used programs go first
_ZSTANDARD = b"\x28\xb5\x2f\xfd"  # how what it compressed begins


_kept: tuple[str, Compilations] | None = None  # where, and what this process has compiled since


def keep(environment: Mapping[str, str]) -> str:
    """Lets jax keep programs between starts, for all that this process compiles from now on. Returns a note for people
    where that cannot be, "" where it can.

    MESHWAY_COMPILATION_CACHE names the folder, local or in a bucket; set to nothing it keeps none. Without it, what jax
    itself is told (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE) is left as it is, and else programs are in
    `meshway/programs` of the user's cache directory.

    Programs for CPUs are made for one kind of CPU, which jax's keys do not tell apart: each kind has its own folder.

    Raises:
      UserError: the folder that was asked for cannot be written.
    """
    asked = environment.get(VARIABLE)
    if asked == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return ""
    config: Any = jax.config  # its settings are not in its type
    if asked is None and (config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache):
        if config.jax_enable_compilation_cache:
            _count(config.jax_compilation_cache_dir)
        return ""
    folder = (open_path(asked) if asked else user_cache("programs", environment)) / _kind_of_cpu()
    if problem := _why_not(folder):
        if asked is not None:
            raise UserError(f"{VARIABLE}={asked} cannot be written: {problem}; give another folder, or nothing")
        return (
            f"compiled programs are not kept: {folder} cannot be written ({problem}); {VARIABLE}=FOLDER names another"
        )
    if not in_bucket(folder):
        _remove_damaged(folder)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", -1 if in_bucket(folder) else MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take seconds too
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _count(str(folder))
    return ""


def in_words() -> str:
    """Returns how many programs this process has compiled, and read from where; "" where none are kept."""
    if _kept is None:
        return ""
    folder, programs = _kept
    compiled = f"{programs.count - programs.read:,} programs compiled, {programs.read:,} read from {folder}"
    return f"{compiled} ({VARIABLE}= keeps none)"


def _count(folder: str) -> None:
    global _kept
    _kept = folder, _kept[1] if _kept else Compilations().__enter__()  # until the process ends


def _kind_of_cpu() -> str:
    """Returns a name for what this CPU can do: programs of another kind may hold instructions that it lacks."""
    facts = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += next((line for line in lines if line.startswith(("flags", "Features"))), "")
        facts += next((line for line in lines if line.startswith("model name")), "")
    except OSError:
        facts += platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def _remove_damaged(folder: Path) -> None:
    """Removes programs that a killed process has written in part: jax would warn of each at every start, and keep it.
    Each is looked at once, at the first start after it was written."""
    checked = folder / "checked"
    with suppress(OSError):  # another process removes programs too
        since = checked.stat().st_mtime - 60 if checked.exists() else 0.0
        checked.touch()
        for path in folder.glob("*-cache"):
            if path.stat().st_mtime >= since and not _is_whole(path.read_bytes()):
                path.unlink()


def _is_whole(content: bytes) -> bool:
    """Whether a program can be read: jax writes them by zlib, or by zstandard where that is installed."""
    try:
        if not content.startswith(_ZSTANDARD):
            zlib.decompress(content)
        elif importlib.util.find_spec("zstandard"):
            importlib.import_module("zstandard").ZstdDecompressor().decompress(content)
    except Exception:  # what zstandard raises is known by its module alone
        return False
    return True


def _why_not(folder: Path) -> str:
    """Returns why a folder cannot be written; "" where it can. A bucket is asked by the first program."""
    if in_bucket(folder):
        return ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)
