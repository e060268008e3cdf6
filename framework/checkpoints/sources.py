"""Which saved parameter another one comes from, and how shapes and names of a checkpoint are kept."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from meshway.framework.axes import Names, sharded_by
from meshway.framework.partitioning.partitioner import path_name
from meshway.framework.terminal import listed

Schema = dict[str, list[Any]]  # path -> [shape as a list, dtype name]


def schema_of(tree: Any) -> Schema:
    """Returns the schema of a tree of arrays or ShapeDtypeStructs."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def names_in(names: Iterable[str], part: str) -> list[str]:
    """Returns what lies in a part of a schema or tree, such as "params", by its name there."""
    return [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]


def differences(saved: Schema, wanted: Schema, limit: int = 4) -> str:
    """Returns the differences in words, the first `limit` of each kind; '' if there are none."""
    wanted = dict(sorted(wanted.items(), key=lambda item: not item[0].startswith("params/")))  # parameters first
    shapes = [
        f"{name} is {_shown(saved[name])} there and {_shown(spec)} here"
        for name, spec in wanted.items()
        if name in saved and saved[name] != spec
    ]
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    titles = {"": shapes, "not in the checkpoint: ": missing, "only in the checkpoint: ": extra}
    return "; ".join(title + listed(names, limit) for title, names in titles.items() if names)


def _shown(spec: list[Any]) -> str:
    return f"{spec[1]}[{','.join(map(str, spec[0]))}]"


Shape = tuple[int, ...]
MEAN, FRESH, SHRINK = "mean", "fresh", "shrink"
RESIZES = (MEAN, FRESH, SHRINK)


@dataclasses.dataclass(frozen=True)
class Source:
    """Layers `first`, `first + stride`, ... of a saved array, repeated along some dimensions of the parameter.

    Attributes:
      name: the array's path in the checkpoint.
      shape: its shape.
      first, stride: which of its layers are taken.
      layers: its dimension of layers; used if `stride` is above 1.
      repeated: dimensions that the parameter has and the array lacks.
      resize: how its vocabulary is resized, one of `RESIZES`; '' if it has the parameter's size.
      vocab: the dimension of the vocabulary.
    """

    name: str
    shape: Shape
    first: int = 0
    stride: int = 1
    layers: int = 0
    repeated: tuple[int, ...] = ()
    resize: str = ""
    vocab: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        saved: Shape,
        shape: Shape,
        axes: Names,
        first: int,
        stride: int,
        repeat_along: Sequence[str],
        resize: str | None = None,
    ) -> "Source | None":
        """Returns the source of a parameter [shape] with `axes` in an array [saved]; None if it does not fit."""
        change = vocabulary_change(saved, shape, axes)
        if change is not None and (resize == SHRINK if change.fewer else resize in (MEAN, FRESH)):
            return cls(name, saved, resize=resize or "", vocab=change.dim)
        layers = axes.index("layers") if "layers" in axes else None
        if stride > 1 and layers is None:
            return None
        whole = tuple(size * stride if dim == layers else size for dim, size in enumerate(shape))
        extra = tuple(dim for dim, axis in enumerate(axes) if axis in repeat_along)
        for repeated in ((), extra):
            kept = [dim for dim in range(len(shape)) if dim not in repeated]
            if saved == tuple(whole[dim] for dim in kept):
                return cls(name, saved, first, stride, kept.index(layers) if layers in kept else 0, repeated)
        return None

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is the saved array as it is."""
        return self.stride == 1 and not self.repeated and not self.resize

    def abstract(self, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        """Returns what to read: the saved array, sharded over the mesh as the parameter `leaf` is."""
        sharding = leaf.sharding
        if self.repeated and isinstance(sharding, NamedSharding):
            spec = sharded_by(sharding.spec, leaf.ndim)
            kept = [axes or None for dim, axes in enumerate(spec) if dim not in self.repeated]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
        if self.resize and isinstance(sharding, NamedSharding):  # its size may not be one that the mesh divides
            spec = sharded_by(sharding.spec, leaf.ndim)
            kept = [None if dim == self.vocab else axes or None for dim, axes in enumerate(spec)]
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*kept))
        return jax.ShapeDtypeStruct(self.shape, leaf.dtype, sharding=sharding)

    def put(self, value: jax.Array, leaf: jax.Array, may_keep: bool) -> jax.Array:
        """Returns the parameter, computed with the sharding of `leaf`.

        Args:
          value: the array that was read.
          leaf: the fresh parameter.
          may_keep: whether `value` itself may be returned; two parameters that share a buffer cannot be donated.
        """
        if self.is_whole and value.sharding == leaf.sharding:
            return value if may_keep else jnp.copy(value)

        if self.resize:
            return jax.jit(self._resized, out_shardings=leaf.sharding)(value, leaf)

        def expand(value: jax.Array) -> jax.Array:
            if self.stride > 1:
                value = jax.lax.slice_in_dim(value, self.first, None, self.stride, self.layers)
            return jnp.broadcast_to(jnp.expand_dims(value, self.repeated), leaf.shape)

        return jax.jit(expand, out_shardings=leaf.sharding)(value)

    def _resized(self, value: jax.Array, leaf: jax.Array) -> jax.Array:
        """Returns `value` with as many entries of the vocabulary as `leaf`; those it has are moved bit for bit."""
        size, count = leaf.shape[self.vocab], value.shape[self.vocab]
        if size <= count:
            return jax.lax.slice_in_dim(value, 0, size, axis=self.vocab)
        new = jax.lax.slice_in_dim(leaf, count, size, axis=self.vocab)
        if self.resize == MEAN:
            mean = jnp.mean(value.astype(jnp.float32), axis=self.vocab, keepdims=True)
            new = jnp.broadcast_to(mean.astype(leaf.dtype), new.shape)
        return jnp.concatenate([value, new], axis=self.vocab)


@dataclasses.dataclass(frozen=True)
class VocabularyChange:
    """An array and a parameter that differ only in the size of a vocabulary.

    Attributes:
      dim: the dimension of the vocabulary.
      saved, wanted: its two sizes.
    """

    dim: int
    saved: int
    wanted: int

    @property
    def fewer(self) -> bool:
        """Whether the parameter has fewer entries than the array."""
        return self.wanted < self.saved


def vocabulary_change(saved: Shape, shape: Shape, axes: Names) -> VocabularyChange | None:
    """Returns the change if an array [saved] and a parameter [shape] with `axes` differ only in a vocabulary, else
    None."""
    if len(saved) != len(shape):
        return None
    found = [dim for dim, (old, new) in enumerate(zip(saved, shape, strict=True)) if old != new]
    if len(found) != 1 or axes[found[0]] != "vocab":
        return None
    return VocabularyChange(found[0], saved[found[0]], shape[found[0]])
