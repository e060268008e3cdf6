"""Safetensors: a directory of files read by slices, and files of bounded size written tensor by tensor."""

import functools
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import io_errors
from meshway.framework.terminal import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}  # the format's names of what can be converted
_COMPARED_BYTES = 64 * 2**20  # of two tensors at a time
Box = tuple[slice, ...]  # one slice with explicit bounds a dimension


class TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Only headers are read at first, and all of them: what is missing or truncated is found before any work. Data is
    read, not mapped, so that memory holds no more than what was asked for.
    """

    def __init__(self, directory: Path, only: str | None = None):
        """Opens the files of a directory, or `only` the one of that name.

        Raises:
          UserError: no weights there; a shard is missing, truncated or damaged; the index names a tensor that its
            shard has not.
        """
        self.directory = Path(directory)
        self._file_of = self._listed() if only is None else {"": self.directory / only}
        self._given: dict[str, str] = {}  # the names in the files of those that are renamed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in dict.fromkeys(self._file_of.values()):
            self._read_header(path)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    @property
    def files(self) -> list[Path]:
        """The files that the tensors lie in."""
        return list(dict.fromkeys(self._file_of.values()))

    def rename(self, name: str, other: str) -> None:
        """Has a tensor go by another name from now on."""
        for facts in (self._file_of, self._shapes, self._dtypes):
            facts[other] = facts.pop(name)  # type: ignore[index,attr-defined,assignment]
        self._given[other] = self._given.pop(name, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._shapes[name]

    def stored_dtype(self, name: str) -> str:
        """Returns a tensor's dtype in the format's words, as 'BF16' or 'F8_E4M3'."""
        return self._dtypes[name]

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype.

        Raises:
          UserError: it is not one of `DTYPES`, as that of quantised weights.
        """
        stored = self._dtypes[name]
        if stored not in DTYPES:
            raise UserError(
                f"tensor {name!r} in {self._file_of[name].name} has dtype {stored}, which meshway does not convert "
                f"(it reads {', '.join(DTYPES)}): give a directory with unquantised weights"
            )
        return DTYPES[stored]

    def read(self, name: str, box: Box = ()) -> np.ndarray:
        """Returns a tensor, or the part of it in `box`, of which missing dimensions are whole.

        Raises:
          UserError: a dtype that is not converted, or the file can no longer be read.
        """
        dtype = self.dtype(name)
        try:
            with safe_open(self._file_of[name], framework="np", backend="pread") as file:
                given = self._given.get(name, name)
                if not self._shapes[name]:
                    return np.asarray(file.get_tensor(given), dtype)
                value: np.ndarray = file.get_slice(given)[tuple(box) or (slice(None),)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name!r} cannot be read from {self._file_of[name]}: {error}") from error
        return value

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors that can be converted."""
        sizes = (
            int(np.prod(self._shapes[name])) * DTYPES[self._dtypes[name]].itemsize
            for name in self
            if self._dtypes[name] in DTYPES
        )
        return sum(sizes)

    def _listed(self) -> dict[str, Path]:
        """Returns the file of each tensor; of a single file, before its header is read, of none but the file's own."""
        index, single = self.directory / INDEX, self.directory / SINGLE
        if single.is_file():  # as transformers, which looks for an index only without it
            return {"": single}
        if not index.is_file():
            raise UserError(f"{self.directory} has neither {SINGLE} nor {INDEX}{_other_weights(self.directory)}")
        try:
            places = json.loads(index.read_text("utf-8"))["weight_map"]
            files = {str(name): self.directory / str(file) for name, file in places.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} cannot be read: {_words(error)}") from error
        missing = sorted({path.name for path in files.values() if not path.is_file()})
        if missing:
            some = next(name for name, path in files.items() if path.name == missing[0])
            raise UserError(
                f"{self.directory} lacks {len(missing)} of {len(set(files.values()))} shards that {INDEX} lists: "
                f"{listed(missing, 4)} (as of tensor {some!r}); fetch the directory again"
            )
        return files

    def _read_header(self, path: Path) -> None:
        """Notes what a file holds; raises UserError where that is not what the index says."""
        try:
            with safe_open(path, framework="np", backend="pread") as file:
                held = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is not a dict
                headers: dict[str, tuple[tuple[int, ...], str]] = {
                    name: (tuple(view.get_shape()), view.get_dtype()) for name, view in held.items()
                }
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated, damaged or no safetensors file ({_words(error)}); fetch it again"
            ) from error
        if "" in self._file_of:
            self._file_of = dict.fromkeys(headers, path)
        for name in (name for name, owner in self._file_of.items() if owner == path):
            if name not in headers:
                near = did_you_mean(name, headers, limit=1)
                raise UserError(f"{INDEX} says that {path.name} holds tensor {name!r}, but it does not{near}")
            self._shapes[name], self._dtypes[name] = headers[name]
        extra = [name for name in headers if self._file_of.get(name) != path]
        if extra:
            raise UserError(f"{path.name} holds tensor {extra[0]!r}, which {INDEX} does not say")


def same_values(one: TensorFiles, name: str, other: TensorFiles, its_name: str) -> bool:
    """Whether two tensors are the same, bit for bit; raises UserError for dtypes that are not converted."""
    shape = one.shape(name)
    if shape != other.shape(its_name) or one.dtype(name) != other.dtype(its_name):
        return False
    row = int(np.prod(shape[1:])) * one.dtype(name).itemsize
    rows = max(1, _COMPARED_BYTES // max(row, 1))
    boxes: list[Box] = (
        [(slice(start, min(start + rows, shape[0])),) for start in range(0, shape[0], rows)] if shape else [()]
    )
    return all(one.read(name, box).tobytes() == other.read(its_name, box).tobytes() for box in boxes)


def _other_weights(directory: Path) -> str:
    """Returns what to do about weights in another format, where there are any."""
    others = sorted(
        path.name for pattern in ("*.bin", "*.msgpack", "*.h5", "*.gguf") for path in directory.glob(pattern)
    )
    if not others:
        return ""
    return f"; {others[0]} is not read: save the model in safetensors (transformers' save_pretrained does)"


def _words(error: Any) -> str:
    return f"{error}" or type(error).__name__


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor that is to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Its bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def shards(specs: Mapping[str, Spec], max_bytes: int) -> list[dict[str, Spec]]:
    """Returns the tensors in order, cut into files of at most `max_bytes` of data; a larger tensor is alone in one."""
    files: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if files[-1] and size + spec.num_bytes > max_bytes:
            files.append({})
            size = 0
        files[-1][name] = spec
        size += spec.num_bytes
    return files


def write_tensors(
    directory: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    max_bytes: int,
    wrote: Callable[[int], None] = lambda size: None,
) -> list[str]:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` .. and their index.

    The format (a header length of 8 bytes, a JSON header with each tensor's place, then the bytes) needs shapes and
    dtypes only to begin, so one tensor at a time is in memory.

    Args:
      directory: where; it exists.
      specs: shape and dtype of each tensor, in the order they are written.
      read: returns a tensor, called once for each.
      max_bytes: data in one file.
      wrote: told the bytes of each tensor written.

    Returns:
      the names of the files.

    Raises:
      UserError: they may not be written there.
      EnvironmentFailure: the disk is full or broken.
    """
    parts = shards(specs, max_bytes)
    names = [SINGLE] if len(parts) == 1 else [_shard_name(i, len(parts)) for i in range(len(parts))]
    with io_errors(directory):
        for name, part in zip(names, parts, strict=True):
            _write_file(directory / name, part, read, wrote)
        if len(parts) > 1:
            total = sum(spec.num_bytes for spec in specs.values())
            places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def size_in_bytes(text: str) -> int:
    """Returns the bytes that '5GB', '800MB' or '1000000' means (decimal units, as transformers reads them).

    Raises:
      UserError: it means none.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    unit = next((unit for unit in units if unit and text.upper().endswith(unit)), "")
    number = text[: len(text) - len(unit)].strip()
    if not number.replace(".", "", 1).isdecimal() or float(number) * units[unit] < 1:
        raise UserError(f"--max_shard_size={text} is not a size: write 5GB, 800MB or a number of bytes")
    return int(float(number) * units[unit])


def _shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_file(
    path: Path, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray], wrote: Callable[[int], None]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without
    place = 0
    for name, spec in specs.items():
        entry = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape)}
        header[name] = entry | {"data_offsets": [place, place + spec.num_bytes]}
        place += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, spec in specs.items():
            value = read(name)
            _check(name, value.shape, value.dtype, spec)
            file.write(_bytes(value))
            wrote(spec.num_bytes)


def _check(name: str, shape: Sequence[int], dtype: np.dtype, spec: Spec) -> None:
    if (tuple(shape), dtype) != spec:
        raise ValueError(f"{name}: got {dtype}{list(shape)} where {spec.dtype}{list(spec.shape)} was announced")


def _bytes(value: np.ndarray) -> Any:
    """Returns the bytes of an array without a copy where it is contiguous; bfloat16 has no buffer of its own."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
