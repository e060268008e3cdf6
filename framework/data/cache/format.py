"""The files of a task's offline cache: records, shards, and the index by which any example takes one read.

    CACHE_DIR/TASK/
      info.json                          what was cached: features, steps, vocabularies, fingerprint and its parts
      stats.json                         examples, tokens, lengths by split
      vocabularies/FEATURE.json ...      the vocabularies of the features the task declares (vocabularies.load)
      SPLIT/index.json                   the shards and their counts; written last, so a split with it is complete
      SPLIT/sizes.FEATURE.npy            tokens of every example, int32 [examples], in the order of shards
      SPLIT/00003-of-00008.array_record  the examples
      SPLIT/00003-of-00008.json          count, checksum and sizes of one shard; written after it
      .building-*                        unfinished files of one builder; removed when it ends

A record holds the features in the order of info.json: for each its dimensions (uint32), then its elements
(little endian; a string as uint32 length and bytes). dtype and rank are in info.json and checked when written.

info.json: format, task; fingerprint, parts (fingerprint.py); features (as in records) and declared (after all
steps), each `features_to_json`; cut: cached and online (names of steps), online_from, reason
(seqio_steps.DividedSteps); online (rows/examples.py); vocabularies: kind, text, fingerprint by feature; seqio_cache,
where a cache of seqio's was imported: directory, infos and stats by split.
index.json: format, fingerprint, bad_examples, shards: examples, bytes, crc32.
stats.json: task, fingerprint, splits: examples, bytes, bad_examples, features: tokens, min, max, mean, histogram.
"""

import functools
import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from meshway.framework.data.objective import FeatureInfo, VocabularyInfo
from meshway.framework.errors import UserError

FORMAT = 1
BYTES = "bytes"
_UINT32 = struct.Struct("<I")
_MAPPED = 1 << 25  # bytes of a file of sizes that are mapped at a time
_SCANNED = 1 << 20  # sizes read at a time
_READER = "readahead_buffer_size:0,max_parallelism:0"  # examples are read in random order: reading ahead costs time
_READ_BUFFER = 4096  # bytes, of each shard


def shard_name(shard: int, num_shards: int) -> str:
    """Returns the file name of a shard."""
    return f"{shard:05d}-of-{num_shards:05d}.array_record"


def encoder(features: Mapping[str, FeatureInfo]) -> Callable[[Mapping[str, Any]], bytes]:
    """Returns the function: an example -> its record.

    It raises ValueError where a feature is missing, or its dtype or shape is not the one in `features`.
    """
    fields = [(name, info, *_as_it_is(info)) for name, info in features.items()]

    def encode(example: Mapping[str, Any]) -> bytes:
        parts: list[bytes] = []
        for name, info, dtype, is_text in fields:
            value = example.get(name)
            # What nearly all examples hold, without asking numpy much; anything else is looked at closely.
            if dtype is not None and type(value) is np.ndarray and value.dtype is dtype and value.ndim == 1:
                parts += (_UINT32.pack(len(value)), value.tobytes())
            elif is_text and type(value) is bytes:
                parts += (_UINT32.pack(len(value)), value)
            else:
                _encode_feature(name, info, example, parts)
        return b"".join(parts)

    return encode


def _as_it_is(info: FeatureInfo) -> tuple[np.dtype | None, bool]:
    """Returns the dtype of arrays [any length] that are stored as they lie in memory, and whether it is a text."""
    if info.dtype == BYTES:
        return None, not info.shape
    dtype = np.dtype(info.dtype)
    return dtype if info.shape == (None,) and dtype == dtype.newbyteorder("<") else None, False


def encode(example: Mapping[str, Any], features: Mapping[str, FeatureInfo]) -> bytes:
    """Returns one example's record; as `encoder`."""
    return encoder(features)(example)


def _encode_feature(name: str, info: FeatureInfo, example: Mapping[str, Any], parts: list[bytes]) -> None:
    if name not in example:
        raise ValueError(f"the example has no feature {name!r}; it has {sorted(example)}")
    value = example[name]
    # As an object: numpy's own strings lose zero bytes at the end.
    array = np.asarray(value, object) if isinstance(value, (bytes, str)) else np.asarray(value)
    kind = BYTES if array.dtype.kind in "OSU" else array.dtype.name
    fits = len(array.shape) == len(info.shape) and all(
        wanted in (None, got) for wanted, got in zip(info.shape, array.shape, strict=True)
    )
    if kind != info.dtype or not fits:
        raise ValueError(
            f"feature {name!r} is {kind} {list(array.shape)}, but the task's is {info.dtype} {list(info.shape)}"
        )
    parts.append(struct.pack(f"<{array.ndim}I", *array.shape))
    if kind == BYTES:
        for text in array.ravel().tolist():
            data = text.encode() if isinstance(text, str) else bytes(text)
            parts += [_UINT32.pack(len(data)), data]
    else:
        parts.append(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())


def decode(record: bytes, features: Mapping[str, FeatureInfo]) -> dict[str, Any]:
    """Returns the example of a record: read-only arrays; a string feature of rank 0 is `bytes`."""
    return _decode(record, _layout(features))


class _Field(NamedTuple):
    """How a feature is stored in a record; `dtype` is None for strings."""

    name: str
    rank: int
    dtype: np.dtype | None
    item_bytes: int


def _layout(features: Mapping[str, FeatureInfo]) -> list[_Field]:
    """Returns what `_decode` needs, computed once for many records."""
    dtypes = {name: None if info.dtype == BYTES else np.dtype(info.dtype) for name, info in features.items()}
    return [_Field(n, len(i.shape), dtypes[n], getattr(dtypes[n], "itemsize", 0)) for n, i in features.items()]


def _decode(record: bytes, layout: Sequence[_Field]) -> dict[str, Any]:
    example: dict[str, Any] = {}
    at = 0
    for name, rank, dtype, item_bytes in layout:
        if rank == 1 and dtype is not None:  # nearly all features
            (count,) = _UINT32.unpack_from(record, at)
            example[name] = np.frombuffer(record, dtype, count, at + 4)
            at += 4 + count * item_bytes
            continue
        shape = struct.unpack_from(f"<{rank}I", record, at) if rank else ()
        at += 4 * rank
        count = math.prod(shape)
        if dtype is not None:
            example[name] = np.frombuffer(record, dtype, count, at).reshape(shape)
            at += count * item_bytes
            continue
        texts = []
        for _ in range(count):
            (length,) = _UINT32.unpack_from(record, at)
            texts.append(record[at + 4 : at + 4 + length])
            at += 4 + length
        example[name] = np.array(texts, object).reshape(shape) if rank else texts[0]
    if at != len(record):
        raise ValueError(f"a record of {len(record)} bytes holds an example of {at}")
    return example


def sized(features: Mapping[str, FeatureInfo]) -> list[str]:
    """Returns the features whose size is indexed: all of rank 1 and above but strings."""
    return [name for name, info in features.items() if info.shape and info.dtype != BYTES]


def features_to_json(features: Mapping[str, FeatureInfo]) -> dict[str, Any]:
    """Returns features as info.json holds them."""
    return {
        name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "vocabulary": None if info.vocabulary is None else _vocabulary_to_json(info.vocabulary),
        }
        for name, info in features.items()
    }


def features_from_json(entries: Mapping[str, Any]) -> dict[str, FeatureInfo]:
    """Reverses `features_to_json`."""
    return {
        name: FeatureInfo(
            entry["dtype"],
            tuple(entry["shape"]),
            None if entry["vocabulary"] is None else _vocabulary_from_json(entry["vocabulary"]),
        )
        for name, entry in entries.items()
    }


def _vocabulary_to_json(vocabulary: VocabularyInfo) -> dict[str, Any]:
    """Returns the fields; sentinels are left out where they are the highest ids, as in most vocabularies."""
    return {name: value for name, value in vars(vocabulary).items() if name != "sentinels" or value}


def _vocabulary_from_json(entry: Mapping[str, Any]) -> VocabularyInfo:
    return VocabularyInfo(**{**entry, "sentinels": tuple(entry.get("sentinels", ()))})


class CachedSplit:
    """One split of a cached task: any example by its number. Opened lazily, so it may be sent to another process.

    Args:
      task_directory: CACHE_DIR/TASK.
      split: as 'train'.

    Raises:
      UserError: the split is missing or incomplete, or a shard is missing or truncated.
    """

    def __init__(self, task_directory: Path, split: str) -> None:
        self.directory = Path(task_directory) / split
        info = read_json(Path(task_directory) / "info.json")
        self.task_name: str = info["task"]
        self.split = split
        self.features = features_from_json(info["features"])
        self._layout = _layout(self.features)
        index = read_json(self.directory / "index.json")
        self._counts = [shard["examples"] for shard in index["shards"]]
        self._ends = np.cumsum(self._counts)
        self._files = [self.directory / shard_name(i, len(self._counts)) for i in range(len(self._counts))]
        for path, shard in zip(self._files, index["shards"], strict=True):
            if not path.is_file():
                raise UserError(f"the cache of task {self.task_name!r} lacks a shard: {path}; {self._rebuild}")
            if path.stat().st_size != shard["bytes"]:
                raise UserError(
                    f"{path} has {path.stat().st_size:,} bytes, not the {shard['bytes']:,} that were written; "
                    f"{self._rebuild}"
                )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read([index])[0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_readers", "sizes")}

    @functools.cached_property
    def sizes(self) -> dict[str, np.ndarray]:
        """Feature -> tokens of every example, int32 [examples], mapped from disk."""
        found = {}
        for name in sized(self.features):
            path = self.directory / f"sizes.{name}.npy"
            try:
                found[name] = np.load(path, mmap_mode="r") if len(self) else np.load(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read: {error}; {self._rebuild}") from error
            if len(found[name]) != len(self):
                raise UserError(f"{path} has {len(found[name])} sizes for {len(self)} examples; {self._rebuild}")
        return found

    def sizes_at(self, which: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Returns feature -> tokens of the examples with these numbers [n] or in this slice, int32 [n].

        However large the corpus, few pages of its sizes stay mapped in this process.
        """
        if isinstance(which, slice):
            return {name: _read_sizes(column, *which.indices(len(self))[:2]) for name, column in self.sizes.items()}
        return {name: _gather(column, which) for name, column in self.sizes.items()}

    @property
    def span(self) -> tuple[str, int, int]:
        """(its name, 0, its number of examples): which examples a position counts."""
        return self.split, 0, len(self)

    @property
    def empty(self) -> frozenset[str]:
        """The features of which every example has 0 tokens; none where there is no example."""
        names = list(self.sizes) if len(self) else []
        return frozenset(name for name in names if not self._holds_some(name))

    def _holds_some(self, name: str) -> bool:
        starts = range(0, len(self), _SCANNED)
        return any(_read_sizes(self.sizes[name], at, min(at + _SCANNED, len(self))).any() for at in starts)

    @functools.cached_property
    def identity(self) -> str:
        """A text that changes with the examples: what they were made by, and what each shard holds."""
        digest = hashlib.sha256((self.directory / "index.json").read_bytes()).hexdigest()
        return f"{self.task_name}/{self.split} {digest}"

    def read(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Returns the examples with these numbers, in this order.

        Raises:
          UserError: a record is corrupt.
        """
        indices = np.asarray(indices, np.int64)
        result: list[dict[str, Any]] = [{}] * len(indices)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            local = indices[places] - (int(self._ends[shard]) - self._counts[shard])
            for place, record in zip(places.tolist(), self._records(shard, local.tolist()), strict=True):
                result[place] = _decode(record, self._layout)
        return result

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), 1024):
            yield from self.read(range(start, min(start + 1024, len(self))))

    @functools.cached_property
    def _readers(self) -> dict[int, Any]:
        return {}

    def _records(self, shard: int, local: list[int]) -> list[bytes]:
        from array_record.python.array_record_module import ArrayRecordReader

        try:
            if shard not in self._readers:
                self._readers[shard] = ArrayRecordReader(
                    str(self._files[shard]), _READER, file_reader_buffer_size=_READ_BUFFER
                )
            read = self._readers[shard].read
            # One by one: a call with a list starts threads, which takes as long as to read two hundred.
            return [read(number, number + 1)[0] for number in local]
        except Exception as error:  # array_record raises plain exceptions with its C++ library's messages
            raise UserError(f"{self._files[shard]} is corrupt: {error}; {self._rebuild}") from error

    @property
    def _rebuild(self) -> str:
        return f"remove {self.directory} and run `meshway cache` again"


def _read_sizes(column: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns column[start:stop] of a memory-mapped array in memory of its own, leaving the mapping alone."""
    if not isinstance(column, np.memmap) or column.filename is None:
        return column[start:stop]
    offset = column.offset + start * column.itemsize
    return np.fromfile(str(column.filename), column.dtype, max(0, stop - start), offset=offset)


def _gather(column: np.ndarray, which: np.ndarray) -> np.ndarray:
    """Returns column[which] of a memory-mapped array; of a large one no page stays mapped."""
    if column.nbytes <= _MAPPED or not isinstance(column, np.memmap):
        return np.asarray(column[which])
    order = None if (which[1:] >= which[:-1]).all() else np.argsort(which, kind="stable")
    ascending = which if order is None else which[order]
    found, mapping = np.empty(len(which), column.dtype), cast(mmap.mmap, column.base)
    step = _MAPPED // column.itemsize
    cuts = np.searchsorted(ascending, np.arange(0, len(column) + step, step))
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if stop > start:
            found[start:stop] = column[ascending[start:stop]]
            mapping.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache
    if order is None:
        return found
    result = np.empty_like(found)
    result[order] = found
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a cache's JSON file; UserError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: nothing is cached there; run `meshway cache` first") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; remove it and run `meshway cache` again") from error
