"""Parameters assembled from tensors piece by piece, whole or a shard of them."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from meshway.framework.conversion.rules import Piece, Shape, by_parameter, check_tensors
from meshway.framework.conversion.tensor_files import Box
from meshway.framework.errors import UserError
from meshway.framework.interfaces import Params
from meshway.framework.trees import map_paths


class Tensors(Protocol):
    """Named tensors that are read on demand: a directory of safetensors, another system's checkpoint."""

    directory: Path

    def __iter__(self) -> Iterator[str]: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype; raises UserError for one that is not converted."""
        ...

    def read(self, name: str, box: Box = ()) -> np.ndarray:
        """Returns a tensor, or the part of it in `box`."""
        ...


@dataclasses.dataclass(frozen=True)
class Values:
    """One parameter, made of pieces.

    Attributes:
      shape: of the parameter.
      dtype: that it is converted to.
      pieces: its pieces, each with the number of its part in the tensor.
      tensors: where they are read.
      negated: whether it is minus what is read.
    """

    shape: Shape
    dtype: np.dtype
    pieces: Sequence[tuple[Piece, int]]
    tensors: Tensors
    negated: bool = False

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def each(self) -> Iterator[tuple[tuple[int, ...], np.ndarray, Piece]]:
        """Yields (the entry, its values in their own dtype, the piece), one piece at a time in memory."""
        for piece, part in self.pieces:
            yield piece.index, self._read(piece, part, {}), piece

    def shard(self, index: tuple[slice, ...]) -> np.ndarray:
        """Returns the values in `index`, one slice a dimension; of each tensor only what is needed is read, as far as
        its dimensions allow."""
        bounds = [slice(*each.indices(size)[:2]) for each, size in zip(index, self.shape, strict=True)]
        result = np.empty([each.stop - each.start for each in bounds], self.dtype)
        for piece, part in self.pieces:
            lead = len(piece.index)
            if all(each.start <= place < each.stop for each, place in zip(bounds[:lead], piece.index, strict=True)):
                names = piece.form.ours[1:] if piece.form.has_parts else piece.form.ours
                wanted = dict(zip(names, bounds[lead:], strict=True))
                entry = tuple(place - each.start for each, place in zip(bounds[:lead], piece.index, strict=True))
                result[entry] = self._read(piece, part, wanted)
        return result

    def _read(self, piece: Piece, part: int, wanted: Mapping[str, slice]) -> np.ndarray:
        form = piece.form
        if form.has_parts:
            wanted = {"part": slice(part, part + 1), **wanted}
        box, rest, sizes = form.box(wanted, piece.sizes)
        value = form.to_ours(self.tensors.read(piece.theirs, box), sizes)
        value = value[tuple(rest.get(name, slice(None)) for name in form.ours)]
        value = -value if self.negated else value
        return value[0] if form.has_parts else value


def values_of(
    pieces: Sequence[Piece], shapes: Mapping[str, Shape], tensors: Tensors, dtype: np.dtype | None
) -> dict[str, Values]:
    """Returns each parameter as it lies in the tensors.

    Args:
      pieces: the plan (`rules.pieces_of`).
      shapes: of the parameters.
      tensors: what is read.
      dtype: of the result; None keeps each parameter's own.

    Raises:
      UserError: a tensor's dtype is not converted, or layers of one parameter have several and `dtype` is None.
    """
    found = {}
    for path, own in by_parameter(pieces).items():
        dtypes = {tensors.dtype(piece.theirs): piece.theirs for piece, _ in own}
        if dtype is None and len(dtypes) > 1:
            several = ", ".join(f"{name} is {each.name}" for each, name in dtypes.items())
            raise UserError(f"layers of {path}, one array here, have several dtypes: {several}; give --dtype")
        found[path] = Values(shapes[path], dtype or next(iter(dtypes)), own, tensors)
    return found


def complete_values(
    model: str,
    pieces: Sequence[Piece],
    shapes: Mapping[str, Shape],
    tensors: Tensors,
    dtype: np.dtype | None,
    ignored: Sequence[str] = (),
    copies: Collection[str] = (),
) -> dict[str, Values]:
    """Returns `values_of`, once the tensors are known to be what the pieces need and nothing else.

    Args:
      model: what they are to be, as 'llama model'.
      pieces, shapes, tensors, dtype: see `values_of`.
      ignored, copies: see `check_tensors`.

    Raises:
      UserError: what does not fit, all of it; and as `values_of`.
    """
    try:
        check_tensors(pieces, {name: tensors.shape(name) for name in tensors}, ignored, copies)
    except UserError as error:
        raise UserError(f"{tensors.directory} is not a complete {model}: {error}") from None
    return values_of(pieces, shapes, tensors, dtype)


def fill(params: Params, values: Mapping[str, Values]) -> Params:
    """Returns a tree of sharded arrays filled from tensors, each device's shard read by slices.

    Args:
      params: arrays or ShapeDtypeStructs with shardings; they say dtypes too.
      values: where each comes from.
    """

    return map_paths(lambda path, leaf: fill_leaf(leaf, values[path]), params)


def fill_leaf(leaf: jax.Array | jax.ShapeDtypeStruct, value: Values | np.ndarray) -> jax.Array:
    """Returns an array with the shape, dtype and sharding of `leaf`, each shard read by itself."""
    if isinstance(value, Values):
        source = dataclasses.replace(value, dtype=np.dtype(leaf.dtype))
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: source.shard(index or ()))
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype))
