"""The files that a user's words mean: one name or a glob, and the format of what they hold."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from meshway.framework.errors import UserError, did_you_mean

FORMATS = ("jsonl", "tsv", "parquet", "text")
COMPRESSED = ".gz"  # of lines; Parquet compresses by itself
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}


def find_files(where: str) -> list[str]:
    """Returns the files that `where` names: one, or all that match a glob (`**` is any folders), sorted by name.

    Raises:
      UserError: there is none, or `where` is a folder.
    """
    if os.path.isdir(where):
        raise UserError(f"input {where!r} is a folder; name its files, such as {os.path.join(where, '*.jsonl')!r}")
    if os.path.exists(where):
        return [where]
    if glob.has_magic(where):
        found = sorted(path for path in glob.glob(where, recursive=True) if not os.path.isdir(path))
        if not found:
            raise UserError(f"input {where!r} matches no file")
        return found
    folder, name = os.path.split(where)
    if not os.path.isdir(folder or "."):
        raise UserError(f"no input file {where!r}: there is no folder {folder!r}")
    raise UserError(f"no input file {where!r}{nearest(name, folder or '.')}")


def nearest(name: str, folder: str | os.PathLike[str]) -> str:
    """Returns "; did you mean ...?" of names in a folder, "" where it cannot be read."""
    try:
        return did_you_mean(name, os.listdir(folder))
    except OSError:
        return ""


def format_of(paths: Sequence[str], format: str | None) -> str:
    """Returns the one format of all files, by their suffixes where `format` does not say.

    Raises:
      UserError: a suffix does not tell, files differ, or there is no such format.
    """
    if format is not None:
        check_format(format)
    found = {path: format or _by_suffix(path) for path in paths}
    first = found[paths[0]]
    for path in paths:
        if found[path] != first:
            raise UserError(f"the files of one input have one format: {paths[0]} is {first}, {path} is {found[path]}")
        if first == "parquet" and path.endswith(COMPRESSED):
            raise UserError(f"{path}: Parquet is not read from {COMPRESSED} files; decompress it (gunzip)")
    return first


def check_format(format: str) -> None:
    """Raises UserError unless there is such a format."""
    if format not in FORMATS:
        raise UserError(f"no input format {format!r}{did_you_mean(format, FORMATS)}; there are {', '.join(FORMATS)}")


def _by_suffix(path: str) -> str:
    suffix = Path(path.removesuffix(COMPRESSED)).suffix
    if suffix.lower() not in _SUFFIXES:
        what = f"its suffix {suffix!r} tells" if suffix else "a name without suffix tells"
        raise UserError(f"{path}: {what} no format; give one (--format): {', '.join(FORMATS)}")
    return _SUFFIXES[suffix.lower()]
