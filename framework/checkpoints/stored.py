"""Checkpoints read and written parameter by parameter, never in memory as a whole."""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from meshway.framework.axes import Names
from meshway.framework.checkpoints.manager import Checkpoints, DamagedCheckpoint
from meshway.framework.checkpoints.sources import Schema, names_in
from meshway.framework.conversion.rules import Piece, Shape
from meshway.framework.conversion.t5x_optimizer import UNUSED, SlotPiece, slot_pieces
from meshway.framework.conversion.tensor_files import Spec
from meshway.framework.conversion.values import Values
from meshway.framework.errors import UserError, first_line
from meshway.framework.files import in_bucket
from meshway.framework.optimizers.adafactor import FactorRules
from meshway.framework.trees import unflatten

_MOST_CACHE_BYTES = 4 * 2**30


class StoredParams:
    """What a checkpoint's `state` holds under "params", or another part of it, opened and not read."""

    def __init__(self, state: Path, schema: Schema, part: str = "params", averages: Collection[str] = ()):
        """Opens each array of a part of the state; of parameters the average where one is among `averages`.

        Raises:
          DamagedCheckpoint: one that the checkpoint's own list names is not there.
        """
        self._state, self._part, self._averages = state, part, averages
        names = names_in(schema, part)
        self._arrays = {name: self._open(name, tensorstore.Context()) for name in names}
        # A stack that was saved from few devices lies in chunks of many layers: one is kept while its layers are read.
        kept = max((_chunk_bytes(array) for array in self._arrays.values()), default=0)
        if kept:
            limit = {"total_bytes_limit": min(2 * kept, _MOST_CACHE_BYTES)}
            context = tensorstore.Context({"cache_pool": limit})
            self._arrays = {name: self._open(name, context) for name in names}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter."""
        return {name: tuple(array.shape) for name, array in self._arrays.items()}

    def dtype(self, name: str) -> np.dtype:
        """Returns a parameter's dtype."""
        return np.dtype(self._arrays[name].dtype.numpy_dtype)

    def spec(self, piece: Piece, dtype: np.dtype | None) -> Spec:
        """Returns what a piece's tensor is, in `dtype` or else the parameter's own."""
        return Spec(piece.their_shape, dtype or self.dtype(piece.ours[0]))

    def tensor(self, piece: Piece, dtype: np.dtype | None) -> np.ndarray:
        """Returns the tensor that a piece is.

        Raises:
          DamagedCheckpoint: it cannot be read.
        """
        entries = [self._read(name, piece.index) for name in piece.ours]
        value = np.stack(entries) if piece.form.has_parts else entries[0]
        return piece.form.to_theirs(value, piece.sizes).astype(self.spec(piece, dtype).dtype, copy=False)

    def value(self, name: str) -> np.ndarray:
        """Returns a whole array; raises DamagedCheckpoint where it cannot be read."""
        return self._read(name, ())

    def _open(self, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
        key = f"{'average' if name in self._averages else self._part}/{name}".replace("/", ".")
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": _store_of(self._state), "path": f"{key}/"},
            "fill_missing_data_reads": False,  # a chunk that is missing would else be read as zeros
        }
        try:
            return tensorstore.open(spec, open=True, read=True, context=context).result()
        except ValueError as error:
            raise self._damaged(name, error) from error

    def _read(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        try:
            value: np.ndarray = self._arrays[name][index].read().result()
        except ValueError as error:
            raise self._damaged(name, error) from error
        return value

    def _damaged(self, name: str, error: ValueError) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"parameter {name} cannot be read from {self._state}: {first_line(error)}")


class StoredMoments:
    """The state of `optimizers.adafactor` in a checkpoint, opened and not read, as T5X lays it out."""

    def __init__(self, state: Path, schema: Schema):
        """Raises UserError: the state is another optimizer's, or only of some parameters."""
        self._state, self._schema = state, schema
        names = names_in(schema, "params")
        parts = {slot: self._part(slot, names) for slot in ("v_row", "v_col", "v")}
        if not all(parts.values()):
            raise UserError(
                f"{state} holds no state of Adafactor for all parameters, and no other optimizer's is written for T5X: "
                "leave --optimizer_state out"
            )
        momentum = self._part("ema", names)
        self._parts = parts | ({"m": momentum} if momentum else {})
        self._stored = {slot: StoredParams(state, schema, part) for slot, part in self._parts.items()}

    def _part(self, slot: str, names: Sequence[str]) -> str:
        """Returns the part of the state that holds a slot of all parameters, '' for none."""
        ends = f"/{slot}/{names[0]}"
        parts = [name.removesuffix(f"/{names[0]}") for name in self._schema if name.endswith(ends)]
        return next((part for part in parts if all(f"{part}/{name}" in self._schema for name in names)), "")

    @property
    def num_updates(self) -> int:
        """How many updates its second moments have counted."""
        part = self._parts["v"].removesuffix("/v")
        return int(StoredParams(self._state, {f"{part}/step": self._schema[f"{part}/step"]}, part).value("step"))

    def arrays(
        self,
        rules: FactorRules | None,
        pieces: Sequence[Piece],
        shapes: Mapping[str, Shape],
        axes: Mapping[str, Names],
    ) -> Iterator[tuple[str, Spec | None, Callable[[], np.ndarray]]]:
        """Yields the arrays of T5X's state.

        Args:
          rules, pieces, shapes, axes: see `t5x_optimizer.slot_pieces`.

        Yields:
          (its name, what it is or None where T5X keeps it in its msgpack file, a function that reads it).

        Raises:
          UserError: T5X would have second moments in other shapes.
        """
        factored = any(shape != UNUSED for shape in self._stored["v_row"].shapes.values())
        found = slot_pieces(pieces, shapes, axes, rules, True, "m" in self._parts)
        if not factored:
            found = slot_pieces(pieces, shapes, axes, rules, False, "m" in self._parts)
        for each in found:
            path = each.piece.ours[0]
            if each.slot and self._stored[each.slot].shapes[path] != each.our_shape(shapes):
                raise UserError(
                    f"the run's Adafactor keeps the second moments of {path} otherwise than T5X's with its standard "
                    f"factor rules does: train with optimizers.adafactor.logical_factor_rules = {rules}, or leave "
                    "--optimizer_state out"
                )
            whole = each.slot in ("v", "m")  # of a parameter's shape, and so cut as it is
            spec = self._stored[each.slot].spec(each.piece, None) if whole else None
            yield each.theirs, spec, functools.partial(self._read, each)

    def _read(self, each: SlotPiece) -> np.ndarray:
        if not each.slot:
            return np.zeros(UNUSED, np.float32)
        value = self._stored[each.slot].tensor(each.piece, None)
        return -value if each.slot == "m" else value


def _store_of(folder: Path) -> dict[str, str]:
    """Returns tensorstore's name for a folder."""
    if in_bucket(folder):
        return {"driver": "gcs", "bucket": folder.bucket, "path": f"{folder.key}/"}
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def _chunk_bytes(array: tensorstore.TensorStore) -> int:
    """Returns the bytes of a chunk that holds several entries of the first dimension; 0 where it holds one."""
    shape: Any = array.chunk_layout.read_chunk.shape
    if not shape or shape[0] == 1:
        return 0
    return int(np.prod(shape, dtype=np.int64)) * array.dtype.numpy_dtype.itemsize


CHUNK_BYTES = 32 * 2**20  # of one chunk in the files: what a reader of a small shard has to read


def write_checkpoint(
    folder: Path,
    step: int,
    values: Mapping[str, Values],
    recipe: str,
    wrote: Callable[[int], None] = lambda size: None,
    rest: Mapping[str, Any] | None = None,
) -> None:
    """Writes the parameters as checkpoint `step` of the run whose `checkpoints/` is `folder`.

    Tensors are read, turned and written one after the other.

    Args:
      folder: made where it is missing.
      step: its number.
      values: the parameters by path.
      recipe: the resolved gin text that goes into it.
      wrote: told the bytes of each piece that was written.
      rest: other parts of a `TrainState`, by field; their leaves are `Values` or numpy arrays.

    Raises:
      UserError: a tensor cannot be read, or the disk refuses.
    """
    handler = _Streamed(wrote)
    arrays = type_handlers.ArrayHandler()
    registry = type_handlers.create_type_handler_registry((jax.Array, arrays), (Values, handler))
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
    checkpoints = Checkpoints(folder, recipe=recipe, handler=state)
    rest = jax.tree.map(lambda leaf: leaf if isinstance(leaf, Values) else jnp.asarray(leaf), dict(rest or {}))
    checkpoints.save_params(unflatten(values), step, rest)
    checkpoints.close()


class _Streamed(type_handlers.NumpyHandler):
    """Orbax's writer of numpy arrays, given parameters that are still to be read."""

    def __init__(self, wrote: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._wrote = wrote

    def typestr(self) -> str:
        """The kind that it is restored as."""
        return "jax.Array"

    async def _open_and_write(self, value: Values, tspec: dict[str, Any], ts_context: tensorstore.Context) -> None:
        lead = len(value.pieces[0][0].index)
        chunk = _chunk(value, lead)
        _set_chunk(tspec["metadata"], chunk)
        store = tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context).result()
        for entry, piece_value, _ in value.each():
            rows = chunk[lead] if len(chunk) > lead else 1
            count = piece_value.shape[0] if piece_value.ndim else 1
            for start in range(0, count, rows):
                part = piece_value[start : start + rows] if piece_value.ndim else piece_value
                where: Any = (*entry, slice(start, min(start + rows, count))) if piece_value.ndim else entry
                converted = np.ascontiguousarray(part, dtype=value.dtype)
                store[where].write(converted, can_reference_source_data_indefinitely=True).result()
                self._wrote(converted.nbytes)


def _chunk(value: Values, lead: int) -> tuple[int, ...]:
    """Returns the shape of chunks: one layer and expert each, and of those as many rows as `CHUNK_BYTES` hold."""
    inner = value.shape[lead:]
    if not inner:
        return (1,) * lead
    row = math.prod(inner[1:]) * value.dtype.itemsize
    return (*(1,) * lead, min(inner[0], max(1, CHUNK_BYTES // row)), *inner[1:])


def _set_chunk(metadata: dict[str, Any], chunk: tuple[int, ...]) -> None:
    """Puts the shape of chunks into zarr 3's metadata, as of the shards that Orbax makes and of what is in them."""
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(chunk)
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            codec["configuration"]["chunk_shape"] = list(chunk)
