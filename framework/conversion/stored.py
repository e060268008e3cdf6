"""The parameters of a checkpoint, read entry by entry."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from meshway.framework.checkpoints.manager import DamagedCheckpoint
from meshway.framework.checkpoints.schema import Schema
from meshway.framework.conversion.rules import Piece
from meshway.framework.conversion.shard_writer import Spec
from meshway.framework.errors import first_line

_MOST_CACHE_BYTES = 4 * 2**30


class StoredParams:
    """What a checkpoint's `state` holds under "params", opened and not read."""

    def __init__(self, state: Path, schema: Schema):
        """Raises DamagedCheckpoint: a parameter that the checkpoint's own list names is not there."""
        self._state = state
        names = [name.removeprefix("params/") for name in schema if name.startswith("params/")]
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

    def _open(self, name: str, context: tensorstore.Context) -> tensorstore.TensorStore:
        key = ".".join(["params", *name.split("/")])
        base = {"driver": "file", "path": f"{self._state.absolute()}/"}
        spec: dict[str, Any] = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{key}/"},
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


def _chunk_bytes(array: tensorstore.TensorStore) -> int:
    """Returns the bytes of a chunk that holds several entries of the first dimension; 0 where it holds one."""
    shape: Any = array.chunk_layout.read_chunk.shape
    if not shape or shape[0] == 1:
        return 0
    return int(np.prod(shape, dtype=np.int64)) * array.dtype.numpy_dtype.itemsize
