"""Writes tensors one at a time into safetensors files of bounded size, with an index."""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from meshway.framework.conversion.tensor_files import DTYPES, INDEX, SINGLE
from meshway.framework.errors import UserError

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
      UserError: the disk refuses.
    """
    parts = shards(specs, max_bytes)
    names = [SINGLE] if len(parts) == 1 else [_shard_name(i, len(parts)) for i in range(len(parts))]
    try:
        for name, part in zip(names, parts, strict=True):
            _write_file(directory / name, part, read, wrote)
        if len(parts) > 1:
            total = sum(spec.num_bytes for spec in specs.values())
            places = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}") from error
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
        raise UserError(f"--max_shard_size={text} is no size: write 5GB, 800MB or a number of bytes")
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
