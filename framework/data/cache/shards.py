"""Where caches are kept; one shard, written atomically; the index, statistics and vocabularies of a task.

Beside SPLIT/00003-of-00008.array_record is 00003-of-00008.json: its examples, bytes, crc32, the sizes of its
examples, and the fingerprint it was built under. It is written after the shard: a shard with that file is complete.
"""

import base64
import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import tempfile
import zlib
from array import array as growing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshway.framework.data.cache.format import FORMAT, encoder, read_json, shard_name, sized
from meshway.framework.data.objective import FeatureInfo
from meshway.framework.data.rows.packing import Example
from meshway.framework.data.vocabularies import of_seqio
from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.files import replace_file, sync, user_cache

# Examples are read one by one, in random order, and a reader keeps 8 bytes in memory for each group. A group is read as
# a whole, which takes 10 us more than one of 1; eight together take a third less space, and half the time to write.
_WRITER = "group_size:8"
_REPORT = 512  # examples between reports of progress


@dataclasses.dataclass(frozen=True)
class Shard:
    """The facts about a finished shard.

    Attributes:
      examples: how many.
      bytes: of the file.
      crc32: of the file.
      bad: one line for each source example left out.
      sizes: feature -> tokens of each example, int32 [examples].
      fingerprint: of the task when it was written.
    """

    examples: int
    bytes: int
    crc32: int
    bad: list[str]
    sizes: Mapping[str, np.ndarray]
    fingerprint: str

    def to_json(self) -> str:
        """Returns the text of the file beside the shard."""
        sizes = {name: base64.b64encode(array.astype("<i4").tobytes()).decode() for name, array in self.sizes.items()}
        return json.dumps(vars(self) | {"sizes": sizes}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Shard":
        """Reverses `to_json`."""
        entry = json.loads(text)
        sizes = {name: np.frombuffer(base64.b64decode(data), "<i4") for name, data in entry["sizes"].items()}
        return Shard(**entry | {"sizes": sizes})


@dataclasses.dataclass(frozen=True)
class BuiltSplit:
    """One split as it is now on disk.

    Attributes:
      task: its task.
      split: its name.
      examples: how many.
      tokens: feature -> tokens of all examples.
      bytes: of all shards.
      bad: one line for each source example left out.
      seconds: from the first shard's start to the last one's end; 0 if no shard had to be built.
    """

    task: str
    split: str
    examples: int
    tokens: dict[str, int]
    bytes: int
    bad: list[str]
    seconds: float


def side_path(split_directory: Path, shard: int, num_shards: int) -> Path:
    """Returns the path of the file beside a shard."""
    return (split_directory / shard_name(shard, num_shards)).with_suffix(".json")


def write_shard(
    examples: Iterable[Example],
    features: Mapping[str, FeatureInfo],
    split_directory: Path,
    shard: int,
    num_shards: int,
    fingerprint: str,
    bad: list[str],
    work: Path,
    report: Callable[[int], None] = lambda count: None,
) -> Shard:
    """Writes a shard in `work`, which is in the same file system, and moves it into place.

    Args:
      examples: its examples.
      features: of the task.
      split_directory: where it goes.
      shard: which, from 0.
      num_shards: how many there are.
      fingerprint: of the task.
      bad: filled while `examples` are read.
      work: a folder of this process's own.
      report: called now and then with the number of examples written.

    Raises:
      UserError: an example's dtype or shape is not the one in `features`.
      EnvironmentFailure: the disk is full or cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    path = split_directory / shard_name(shard, num_shards)
    temporary = work / f"{split_directory.name}.{path.name}"
    encode, names = encoder(features), sized(features)
    sizes = [growing("i") for _ in names]  # of int32
    with failures_of(path):
        writer = ArrayRecordWriter(str(temporary), _WRITER)
        count = 0
        report(0)
        for example in examples:
            try:
                writer.write(encode(example))
            except ValueError as error:
                task, split = split_directory.parent.name, split_directory.name
                place = f"example {count} of shard {shard} of {num_shards}"
                raise UserError(f"task {task!r}, split {split!r}, {place}: {error}") from error
            for column, name in zip(sizes, names, strict=True):
                column.append(len(example[name]))
            count += 1
            if count % _REPORT == 0:
                report(count)
        writer.close()
        reader = ArrayRecordReader(str(temporary))
        if reader.num_records() != count:
            raise OSError(f"{reader.num_records()} of {count} records were written")
        reader.close()
        sync(temporary)
        arrays = {name: np.array(column, np.int32) for name, column in zip(names, sizes, strict=True)}
        size, crc32 = temporary.stat().st_size, _crc32(temporary)
        result = Shard(count, size, crc32, list(bad), arrays, fingerprint)
        split_directory.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, path)
        sync(split_directory)
        replace(side_path(split_directory, shard, num_shards), result.to_json().encode(), work)
    report(count)
    return result


def finished_shard(
    split_directory: Path, shard: int, num_shards: int, fingerprint: str, check_bytes: bool
) -> Shard | str | None:
    """Returns a complete shard, a text that says what is wrong with it, or None if it was never finished.

    Args:
      split_directory: its folder.
      shard: which, from 0.
      num_shards: how many there are.
      fingerprint: the one it must have been built under.
      check_bytes: check the file's content, not only its size.
    """
    path, side = split_directory / shard_name(shard, num_shards), side_path(split_directory, shard, num_shards)
    try:
        found = Shard.from_json(side.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{side} cannot be read ({error})"
    if found.fingerprint != fingerprint:
        return f"{path} was built from another version of the task"
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != found.bytes:
        return f"{path} has {path.stat().st_size:,} bytes, not the {found.bytes:,} that were written"
    if check_bytes and _crc32(path) != found.crc32:
        return f"{path} is corrupt: its crc32 is not the one that was written"
    return found


def replace(path: Path, content: bytes, work: Path) -> None:
    """Writes a small file atomically, by way of the folder `work`."""
    temporary = work / f"{path.parent.name}.{path.name}.{os.getpid()}"
    replace_file(path, content, temporary)


@contextlib.contextmanager
def failures_of(path: Path) -> Iterator[None]:
    """Turns an error of the file system or array_record while `path` is written into an EnvironmentFailure; a UserError
    where a file is in the way of a folder."""
    try:
        yield
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"cannot write {path}: {error.strerror}: give another folder for caches") from error
    except (OSError, RuntimeError) as error:
        raise EnvironmentFailure(f"writing {path} failed: {error}; what is finished is kept, run it again") from error


def _crc32(path: Path) -> int:
    crc32 = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc32 = zlib.crc32(block, crc32)
    return crc32


VOCABULARIES = "vocabularies"


def write_index(split_directory: Path, shards: Sequence[Shard], fingerprint: str, work: Path) -> None:
    """Writes a split's sizes.FEATURE.npy and, after them, its index.json."""
    index = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "bad_examples": sum(len(shard.bad) for shard in shards),
        "shards": [{"examples": shard.examples, "bytes": shard.bytes, "crc32": shard.crc32} for shard in shards],
    }
    with failures_of(split_directory):
        for name in shards[0].sizes:
            column = np.concatenate([shard.sizes[name] for shard in shards])
            save = functools.partial(np.save, arr=column)
            replace_file(split_directory / f"sizes.{name}.npy", save, work / f"{split_directory.name}.{name}.npy")
        replace(split_directory / "index.json", _text(index), work)


def write_stats(task_directory: Path, features: Mapping[str, FeatureInfo], work: Path) -> None:
    """Writes a task's stats.json, of the complete splits."""
    stats = {}
    for path in sorted(task_directory.glob("*/index.json")):
        if path.parent.name == VOCABULARIES:  # the vocabulary of a feature named `index`
            continue
        index = read_json(path)
        sizes = {name: np.load(path.parent / f"sizes.{name}.npy") for name in _lengths(features)}
        stats[path.parent.name] = {
            "examples": sum(shard["examples"] for shard in index["shards"]),
            "bytes": sum(shard["bytes"] for shard in index["shards"]),
            "bad_examples": index["bad_examples"],
            "features": {name: _statistics(array) for name, array in sizes.items()},
        }
    info = read_json(task_directory / "info.json")
    content = {"task": info["task"], "fingerprint": info["fingerprint"], "splits": stats}
    with failures_of(task_directory):
        replace(task_directory / "stats.json", _text(content), work)


def tokens(shards: Sequence[Shard], features: Mapping[str, FeatureInfo]) -> dict[str, int]:
    """Returns the tokens of each feature in a split, of those whose lengths differ."""
    return {name: sum(int(shard.sizes[name].sum(dtype=np.int64)) for shard in shards) for name in _lengths(features)}


def save_vocabularies(task: Any, task_directory: Path, work: Path) -> dict[str, dict[str, str]]:
    """Saves the vocabularies of a seqio task's features in its cache, and returns info.json's entries for them."""
    entries = {}
    with failures_of(task_directory):
        (task_directory / VOCABULARIES).mkdir(parents=True, exist_ok=True)
        for name, feature in task.output_features.items():
            vocabulary = of_seqio(feature.vocabulary)
            vocabulary.save(work / VOCABULARIES, name)
            entries[name] = {
                "kind": vocabulary.kind,
                "text": str(vocabulary),
                "fingerprint": vocabulary.fingerprint,
            }
        for path in (work / VOCABULARIES).iterdir():
            os.replace(path, task_directory / VOCABULARIES / path.name)
    return entries


def _lengths(features: Mapping[str, FeatureInfo]) -> list[str]:
    return [name for name in sized(features) if features[name].shape[0] is None]


def _statistics(sizes: np.ndarray) -> dict[str, Any]:
    """Returns stats.json's entry for a feature's sizes [examples]; the histogram's key 'a-b' counts sizes a to b."""
    if not len(sizes):
        return {"tokens": 0, "min": None, "max": None, "mean": None, "histogram": {}}
    bins = np.ceil(np.log2(sizes.astype(np.int64) + 1)).astype(int)  # 0 | 1 | 2-3 | 4-7 | ...
    histogram = {}
    for number, count in enumerate(np.bincount(bins).tolist()):
        low, high = (1 << number) >> 1, (1 << number) - 1
        histogram[f"{low}" if low == high else f"{low}-{high}"] = count
    total = int(sizes.sum(dtype=np.int64))
    return {
        "tokens": total,
        "min": int(sizes.min()),
        "max": int(sizes.max()),
        "mean": total / len(sizes),
        "histogram": histogram,
    }


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def cache_directory() -> Path:
    """Returns where tasks are cached unless told otherwise: `tasks` of the user's cache directory."""
    return user_cache("tasks")


_PREFIX = ".building-"
_LOCK = "lock"


def check_folder(directory: Path) -> None:
    """Raises UserError if a task's folder is something else than its cache, or one that is begun."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    # Vocabularies are written before info.json: another builder is between the two, or was killed there.
    begun = [name for name in names if name == VOCABULARIES or name.startswith(_PREFIX)]
    if "info.json" not in names and len(begun) < len(names):
        raise UserError(f"{directory} is not a task's cache: it holds {sorted(names)[:5]} and no info.json")


@contextlib.contextmanager
def working(directory: Path, alone: bool = True) -> Iterator[Path]:
    """Yields a new folder inside `directory` for this process alone, removed after the block.

    It is locked in the block; folders that no living process has locked are removed first, unless other machines
    (not `alone`) may build there too: not every network's file system shows their locks.

    Raises:
      EnvironmentFailure: the directory cannot be written.
    """
    with failures_of(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_PREFIX}*") if alone else ():
            _remove_if_dead(left)
        work, lock = _new_folder(directory)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _new_folder(directory: Path) -> tuple[Path, int]:
    """Returns a fresh folder and its lock, held."""
    while True:  # until it is locked before another builder removes it as abandoned
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
        try:
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / _LOCK).exists():
            return folder, lock
        os.close(lock)


def _remove_if_dead(folder: Path) -> None:
    """Removes a builder's folder unless it is locked; without a lock file its builder died or just starts."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if empty
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)
