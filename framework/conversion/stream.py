"""Writes a checkpoint whose parameters never are in memory as a whole."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.conversion.values import Values
from meshway.framework.training.trees import unflatten

CHUNK_BYTES = 32 * 2**20  # of one chunk in the files: what a reader of a small shard has to read


def write_checkpoint(
    folder: Path,
    step: int,
    values: Mapping[str, Values],
    recipe: str,
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes the parameters as checkpoint `step` of the run whose `checkpoints/` is `folder`.

    Tensors are read, turned and written one after the other.

    Args:
      folder: made where it is missing.
      step: its number.
      values: the parameters by path.
      recipe: the resolved gin text that goes into it.
      wrote: told the bytes of each piece that was written.

    Raises:
      UserError: a tensor cannot be read, or the disk refuses.
    """
    handler = _Streamed(wrote)
    arrays = type_handlers.ArrayHandler()  # nothing is saved by it, but Orbax warns without
    registry = type_handlers.create_type_handler_registry((jax.Array, arrays), (Values, handler))
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
    checkpoints = Checkpoints(folder, recipe=recipe, handler=state)
    checkpoints.save_params(unflatten(values), step)
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
