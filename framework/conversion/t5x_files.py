"""Reads the parameters in T5X's checkpoints, array by array: its native format, and what it writes through Orbax."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore

from meshway.framework.conversion.tensor_files import DTYPES, Box
from meshway.framework.errors import UserError, first_line

_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
_NATIVE, _ORBAX = "checkpoint", "state"  # the msgpack file of the one, the folder of arrays of the other
_INLINE_ARRAY = 1  # flax's msgpack extension type of an array: (shape, dtype name, bytes)
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # the file that marks an array -> tensorstore's driver

Values = tensorstore.TensorStore | np.ndarray
Spec = dict[str, Any]  # tensorstore's JSON


class T5XFiles:
    """The parameters of one T5X checkpoint, named by their paths in T5X's tree, such as "decoder/decoder_norm/scale".

    Only descriptions are read at first, of all parameters; the optimizer's state is left out.
    """

    def __init__(self, directory: Path, step: int | None = None):
        """`directory` holds `checkpoint_STEP` folders (`step` None is the latest) or is one of them.

        Raises:
          UserError: there is no such checkpoint; it is not T5X's; a parameter's files are missing or damaged.
        """
        self.directory = find_checkpoint(Path(directory), step)
        native = (self.directory / _NATIVE).is_file()
        self._values = _native(self.directory) if native else _orbax(self.directory / _ORBAX)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    @property
    def step(self) -> int:
        """The step that it was saved at, by its folder's name; 0 where that has none."""
        match = _STEP_FOLDER.fullmatch(self.directory.name)
        return int(match[1]) if match else 0

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns an array's shape."""
        return tuple(self._values[name].shape)

    def dtype(self, name: str) -> np.dtype:
        """Returns an array's dtype.

        Raises:
          UserError: it is not one of `tensor_files.DTYPES`.
        """
        dtype = _dtype(self._values[name])
        if dtype not in DTYPES.values():
            raise UserError(
                f"{name!r} in {self.directory} has dtype {dtype.name}, which meshway does not convert "
                f"(it reads {', '.join(known.name for known in DTYPES.values())})"
            )
        return dtype

    def read(self, name: str, box: Box = ()) -> np.ndarray:
        """Returns an array, or the part of it in `box`, of which missing dimensions are whole.

        Raises:
          UserError: a dtype that is not converted; the files behind it are missing, truncated or damaged.
        """
        self.dtype(name)
        part = self._values[name][tuple(box) or ...]
        try:
            return part if isinstance(part, np.ndarray) else part.read().result()
        except ValueError as error:
            raise UserError(f"{name!r} cannot be read from {self.directory}: {first_line(error)}") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(self.shape(name)) * _dtype(values).itemsize for name, values in self._values.items())


def is_checkpoint(path: Path) -> bool:
    """Whether a folder looks like one of T5X's checkpoints."""
    return (path / _NATIVE).is_file() or _array_store(path / _ORBAX) is not None


def is_run(path: Path) -> bool:
    """Whether a folder looks like one of T5X's checkpoints, or holds some."""
    return is_checkpoint(path) or any(map(is_checkpoint, path.glob("checkpoint_*")))


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Returns the folder of one checkpoint, as `T5XFiles` takes it; raises UserError where there is none."""
    path = path.expanduser().absolute()
    if not path.is_dir():
        raise UserError(f"there is no folder {path}")
    if is_checkpoint(path):
        own = _STEP_FOLDER.fullmatch(path.name)
        if step is not None and own and int(own[1]) != step:
            raise UserError(f"{path} is the checkpoint of step {own[1]}, not {step}; give the folder that holds both")
        return path
    matches = [(_STEP_FOLDER.fullmatch(child.name), child) for child in path.iterdir() if is_checkpoint(child)]
    steps = {int(match[1]): child for match, child in matches if match}
    if not steps:
        raise UserError(
            f"{path} holds no T5X checkpoint: neither a file {_NATIVE!r} (T5X's own format) nor arrays in {_ORBAX!r} "
            "(Orbax), and no folder checkpoint_STEP that does"
        )
    if step is not None and step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step}; there are {sorted(steps)}")
    return steps[max(steps) if step is None else step]


def _native(folder: Path) -> dict[str, Values]:
    """A msgpack tree whose arrays are mostly tensorstore specs of zarr folders beside it."""
    file = folder / _NATIVE
    try:
        tree = msgpack.unpackb(file.read_bytes(), strict_map_key=False)
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise UserError(f"{file} is truncated or no msgpack file ({first_line(error)})") from error
    optimizer = tree.get("optimizer") if isinstance(tree, dict) else None
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict) or not target:
        raise UserError(f"{file} is not a T5X checkpoint: it has no optimizer/target, where T5X keeps parameters")
    return {name: _native_values(folder, name, leaf) for name, leaf in _leaves(target).items()}


def _leaves(tree: Mapping[str, Any], parents: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and "kvstore" not in value
        found |= _leaves(value, f"{parents}{key}/") if inner else {f"{parents}{key}": value}
    return found


def _native_values(folder: Path, name: str, leaf: Any) -> Values:
    if isinstance(leaf, dict):
        # Wherever it was written (a bucket, another disk), an array's folder lies beside the file.
        own = Path(str(leaf["kvstore"].get("path", ""))).name
        return _open(folder, name, leaf.get("driver", "zarr"), {"driver": "file", "path": f"{folder / own}/"})
    if isinstance(leaf, msgpack.ExtType) and leaf.code == _INLINE_ARRAY:
        shape, dtype, values = msgpack.unpackb(leaf.data)
        return np.frombuffer(values, jnp.dtype(dtype)).reshape(shape)
    raise UserError(f"{folder / _NATIVE} is damaged: {name!r} is a {type(leaf).__name__} there, no array")


def _orbax(state: Path) -> dict[str, Values]:
    """Arrays named "target.decoder..." in one OCDBT database, or in a folder each."""
    store = _array_store(state) or {}
    try:
        keys = [key.decode() for key in tensorstore.KvStore.open(store).result().list().result()]
    except ValueError as error:
        raise UserError(f"{state} is truncated or damaged: {first_line(error)}") from error
    found: dict[str, Values] = {}
    for key in keys:
        array, _, kind = key.rpartition("/")
        if array.startswith("target.") and kind in _DRIVERS:
            name = array.removeprefix("target.").replace(".", "/")
            found[name] = _open(state, name, _DRIVERS[kind], store | {"path": f"{store.get('path', '')}{array}/"})
    missing = [name for name in _promised(state / "_METADATA") if name not in found]
    if missing or not found:
        lacks = ", ".join(missing[:4]) or "every parameter (target.*)"
        raise UserError(f"{state} is incomplete, or no T5X checkpoint: it lacks {lacks}")
    return found


def _array_store(state: Path) -> Spec | None:
    """Returns tensorstore's spec of what holds Orbax's arrays, None where there is no such thing."""
    files = {"driver": "file", "path": f"{state}/"}
    if (state / "manifest.ocdbt").is_file():
        return {"driver": "ocdbt", "base": files}
    return files if any(state.glob("target.*")) else None


def _promised(metadata: Path) -> list[str]:
    """Returns the parameters that Orbax's list of what it wrote names; none where there is no list."""
    if not metadata.is_file():
        return []
    try:
        entries = json.loads(metadata.read_text("utf-8"))["tree_metadata"].values()
        paths = [[str(part["key"]) for part in entry["key_metadata"]] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{metadata} is truncated or damaged ({first_line(error)})") from error
    return ["/".join(path[1:]) for path in paths if path[:1] == ["target"]]


def _open(where: Path, name: str, driver: str, kvstore: Spec) -> tensorstore.TensorStore:
    # A chunk whose file is missing would else be read as zeros.
    spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
    try:
        return tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise UserError(f"{name!r} is missing or damaged in {where}: {first_line(error)}") from error


def _dtype(values: Values) -> np.dtype:
    return values.dtype if isinstance(values, np.ndarray) else values.dtype.numpy_dtype
