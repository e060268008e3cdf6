"""T5X's checkpoints array by array: its native format, read and written, and what it writes through Orbax, read."""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore
from flax import serialization

from meshway.framework.conversion.tensor_files import DTYPES, Box
from meshway.framework.conversion.tensor_files import Spec as TensorSpec
from meshway.framework.errors import EnvironmentFailure, UserError, first_line
from meshway.framework.files import io_errors, is_disk_trouble
from meshway.framework.terminal import listed
from meshway.framework.trees import unflatten

_STEP_FOLDER = re.compile(r"checkpoint_(\d+)")
_NATIVE, _ORBAX = "checkpoint", "state"  # the msgpack file of the one, the folder of arrays of the other
SLOTS = ("m", "v", "v_col", "v_row")  # of each parameter: Adafactor's momentum and second moments
_NO_ARRAYS = "__save_format_metadata__"  # version numbers that Flaxformer keeps among its parameters
_INLINE_ARRAY = 1  # flax's msgpack extension type of an array: (shape, dtype name, bytes)
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}  # the file that marks an array -> tensorstore's driver


class Sliced(Protocol):
    """An array that another library reads when it is sliced."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, box: Any) -> np.ndarray: ...


Values = tensorstore.TensorStore | np.ndarray | Sliced
Spec = dict[str, Any]  # tensorstore's JSON


class T5XArrays:
    """Named arrays of one T5X checkpoint, read on demand."""

    def __init__(self, directory: Path, values: Mapping[str, Values]):
        self.directory, self._values = directory, values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

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
        return _read(self.directory, name, self._values[name], box)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(self.shape(name)) * _dtype(values).itemsize for name, values in self._values.items())


class T5XFiles(T5XArrays):
    """The parameters of one T5X checkpoint, named by their paths in T5X's tree, such as "decoder/decoder_norm/scale".

    Only descriptions are read at first, of all parameters; those of the optimizer's state where it is asked for.
    """

    ACTIVATIONS = r"(?:mlp_|MlpBlock\.)?activations"  # a pattern of what `config` binds an MLP's activations to

    def __init__(self, directory: Path, step: int | None = None):
        """`directory` holds `checkpoint_STEP` folders (`step` None is the latest) or is one of them.

        Raises:
          UserError: there is no such checkpoint; it is not T5X's; a parameter's files are missing or damaged.
        """
        directory = find_checkpoint(Path(directory), step)
        self._format = (_Native if (directory / _NATIVE).is_file() else _Orbax)(directory)
        super().__init__(directory, self._format.parameters())

    @property
    def step(self) -> int:
        """The step that it was saved at, as it says, or else by its folder's name; 0 where neither tells."""
        match = _STEP_FOLDER.fullmatch(self.directory.name)
        stored = self._format.step()
        return stored if stored is not None else int(match[1]) if match else 0

    @property
    def config_file(self) -> Path:
        """Where T5X writes what its recipe bound: beside its checkpoints."""
        return self.directory.parent / "config.gin"

    @functools.cached_property
    def config(self) -> str:
        """The text of `config_file`, '' where there is none."""
        return self.config_file.read_text("utf-8", errors="replace") if self.config_file.is_file() else ""

    def check_config(self, refused: Sequence[tuple[str, str]]) -> None:
        """Raises UserError where `config` has a setting of `refused`, (its pattern, what it does), since something else
        is computed by it from the same arrays."""
        for pattern, what in refused:
            if match := re.search(rf"^[^#\n]*({pattern})", self.config, re.MULTILINE):
                raise UserError(f"{self.config_file}: {match[1]}: {what}, which meshway's T5 has not")

    @functools.cached_property
    def moments(self) -> T5XArrays:
        """The state of T5X's Adafactor: four arrays a parameter, such as "decoder/decoder_norm/scale/v_row".

        Raises:
          UserError: there is no state, or it is another optimizer's; an array's files are missing or damaged.
        """
        names = self._format.state_names()
        if not names:
            raise UserError(f"{self.directory} has no optimizer state, only parameters")
        slots = [f"{name}/{slot}" for name in self for slot in SLOTS]
        if other := sorted(set(names) ^ set(slots)):
            kinds = sorted({name.rpartition("/")[2] for name in names} - set(SLOTS))
            found = f"it has {listed(kinds, 4)}" if kinds else f"{other[0]} is in one of them only"
            raise UserError(
                f"{self.directory} does not hold the state of T5X's Adafactor ({', '.join(SLOTS)} of each parameter): "
                f"{found}. No other optimizer's state is converted: take the parameters alone"
            )
        return T5XArrays(self.directory, {name: self._format.state(name) for name in slots})


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


class _Native:
    """A msgpack tree whose arrays are mostly tensorstore specs of zarr folders beside it."""

    def __init__(self, folder: Path):
        self._folder, file = folder, folder / _NATIVE
        try:
            tree = msgpack.unpackb(file.read_bytes(), strict_map_key=False)
        except (OSError, ValueError, msgpack.UnpackException) as error:
            raise UserError(f"{file} is truncated or no msgpack file ({first_line(error)})") from error
        optimizer = tree.get("optimizer") if isinstance(tree, dict) else None
        self._target = optimizer.get("target") if isinstance(optimizer, dict) else None
        if not isinstance(optimizer, dict) or not isinstance(self._target, dict) or not self._target:
            raise UserError(f"{file} is not a T5X checkpoint: it has no optimizer/target, where T5X keeps parameters")
        state = optimizer.get("state")
        self._state: dict[str, Any] = state if isinstance(state, dict) else {}
        states = self._state.get("param_states")
        self._states = _leaves(states) if isinstance(states, dict) else {}

    def parameters(self) -> dict[str, Values]:
        return {name: _native_values(self._folder, name, leaf) for name, leaf in _leaves(self._target or {}).items()}

    def step(self) -> int | None:
        step = self._state.get("step")
        if step is None or isinstance(step, int):
            return step
        return int(_read(self._folder, "step", _native_values(self._folder, "step", step)))

    def state_names(self) -> list[str]:
        return list(self._states)

    def state(self, name: str) -> Values:
        return _native_values(self._folder, name, self._states[name])


def _leaves(tree: Mapping[str, Any], parents: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == _NO_ARRAYS:
            continue
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


class _Orbax:
    """Arrays named "target.decoder..." in one OCDBT database, or in a folder each."""

    def __init__(self, folder: Path):
        self._where = folder / _ORBAX
        self._store = _array_store(self._where) or {}
        try:
            keys = [key.decode() for key in tensorstore.KvStore.open(self._store).result().list().result()]
        except ValueError as error:
            raise UserError(f"{self._where} is truncated or damaged: {first_line(error)}") from error
        parts = [(array, kind) for array, _, kind in (key.rpartition("/") for key in keys)]
        self._drivers = {array: _DRIVERS[kind] for array, kind in parts if kind in _DRIVERS}

    def parameters(self) -> dict[str, Values]:
        found: dict[str, Values] = {name: self._open("target", name) for name in self._names("target")}
        missing = [name for name in _promised(self._where / "_METADATA") if name not in found]
        if missing or not found:
            lacks = listed(missing, 4) or "every parameter (target.*)"
            raise UserError(f"{self._where} is incomplete, or no T5X checkpoint: it lacks {lacks}")
        return found

    def step(self) -> int | None:
        if "state.step" not in self._drivers:
            return None
        return int(_read(self._where, "step", self._open("state", "step")))

    def state_names(self) -> list[str]:
        return self._names("state.param_states")

    def state(self, name: str) -> Values:
        return self._open("state.param_states", name)

    def _names(self, part: str) -> list[str]:
        inside = [array for array in self._drivers if array.startswith(f"{part}.")]
        return [array.removeprefix(f"{part}.").replace(".", "/") for array in inside]

    def _open(self, part: str, name: str) -> tensorstore.TensorStore:
        array = f"{part}.{name.replace('/', '.')}"
        kvstore = self._store | {"path": f"{self._store.get('path', '')}{array}/"}
        return _open(self._where, name, self._drivers[array], kvstore)


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


def _read(where: Path, name: str, values: Values, box: Box = ()) -> np.ndarray:
    part = values[tuple(box) or ...]
    try:
        return part.read().result() if isinstance(part, tensorstore.TensorStore) else part
    except ValueError as error:
        raise UserError(f"{name!r} cannot be read from {where}: {first_line(error)}") from error


def _dtype(values: Values) -> np.dtype:
    return values.dtype.numpy_dtype if isinstance(values, tensorstore.TensorStore) else values.dtype


_VERSION = 3  # of T5X's native format, since 2021
_CHUNK_BYTES = 64 * 2**20  # T5X's own size of a chunk


def write_native(
    folder: Path,
    arrays: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    inline: Mapping[str, np.ndarray],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes a checkpoint as T5X's own Checkpointer does: a zarr folder for each array, and a msgpack file of the rest.

    Args:
      folder: `checkpoint_STEP`, made here.
      arrays: by their paths in T5X's tree, such as "target/decoder/decoder_norm/scale".
      read: returns one of them.
      inline: small arrays, which lie in the msgpack file.
      wrote: told the bytes of each array that was written.

    Raises:
      UserError: an array cannot be read; the folder cannot be made or written.
      EnvironmentFailure: the disk is full or broken.
    """
    with io_errors(folder):
        folder.mkdir(parents=True)
    leaves: dict[str, Any] = dict(inline)
    for name, array in arrays.items():
        leaves[name] = spec = _zarr_spec(name, array)
        value, path = read(name), f"{folder / spec['kvstore']['path']}/"
        own = spec | {"kvstore": {"driver": "file", "path": path}}
        try:
            tensorstore.open(own, create=True, open=True).result().write(value).result()
        except ValueError as error:  # what the disk says too
            if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
                raise
            refused = OSError(int(code[1]), os.strerror(int(code[1])))
            kind = EnvironmentFailure if is_disk_trouble(refused) else UserError
            raise kind(f"cannot write {path}: {refused.strerror}") from error
        wrote(array.num_bytes)
    tree = unflatten(dict(sorted(leaves.items(), key=lambda item: item[0].split("/"))))
    with io_errors(folder / _NATIVE):
        content = serialization.msgpack_serialize({"version": _VERSION, "optimizer": tree}, in_place=True)
        (folder / _NATIVE).write_bytes(content)


def _zarr_spec(name: str, array: TensorSpec) -> Spec:
    """Returns the tensorstore spec that stands in the msgpack file for an array in a folder beside it."""
    return {
        "driver": "zarr",
        "dtype": array.dtype.name,
        "kvstore": {"driver": "file", "path": f"{name.replace('/', '.')}/"},
        "metadata": {
            "chunks": chunks_of(array),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(array.shape),
        },
    }


def chunks_of(array: TensorSpec) -> list[int]:
    """Returns the shape of chunks of at most `_CHUNK_BYTES`, which divide the array: the largest dimension is cut."""
    chunk = list(array.shape)
    while math.prod(chunk) * array.dtype.itemsize > _CHUNK_BYTES:
        dim = chunk.index(max(chunk))
        chunk[dim] = max(size for size in range(1, chunk[dim]) if chunk[dim] % size == 0)
    return chunk
