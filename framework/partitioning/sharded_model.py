"""A model on a mesh: how its parameters and batches are sharded. Every program over a model begins with this.
`ProgramCache` compiles programs over its parameters and batches once for each shape, for evaluation and inference.

`explain` lists every tensor: its axes, its sharding, what that costs a device, and which rule says so.
"""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import NamedSharding

from meshway.framework.axes import sharded_by
from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec, Axes, Batch, Model, Params, stacked
from meshway.framework.partitioning.mesh import free_memory
from meshway.framework.partitioning.partitioner import Layout, Partitioner, path_name
from meshway.framework.partitioning.rules import Resolution
from meshway.framework.terminal import format_bytes, format_columns
from meshway.framework.trees import flatten, map_paths


class ShardedModel:
    """A model under a layout; nothing is allocated.

    Attributes:
      model: as given.
      partitioner: the layout on the devices.
      axes: the logical axes of each parameter.
      param_shapes: ShapeDtypeStructs of the parameters.
      as_stored: whether these are as checkpoints have them, and not in another form that the model takes.
    """

    as_stored = True

    def __init__(self, model: Model, layout: Layout, devices: Sequence[jax.Device] | None = None):
        """`devices` are by default all there are; raises UserError where the layout does not fit them."""
        self.model = model
        self.partitioner = Partitioner(layout, devices)
        self.axes: Axes = model.axes()
        self.param_shapes: Params = jax.eval_shape(model.init, jax.random.key(0))

    @functools.cached_property
    def param_shardings(self) -> Params:
        """A sharding for each parameter; UserError where the layout's rules do not fit one."""
        return self.partitioner.state_shardings(self.axes, self.param_shapes, "params")

    @property
    def abstract_params(self) -> Params:
        """The parameters' shapes with their shardings: what a checkpoint restores onto."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.param_shapes,
            self.param_shardings,
        )

    def by_layer(self) -> "ShardedModel":
        """Returns the model with a tuple of arrays, one a layer, for each parameter that it stores as [layers, ...]:
        programs read these where they lie, as decoding should. `split` makes them.

        It is the model as it is where there are no such parameters (`interfaces.Stacked`), and where the layout shards
        the layers themselves: a layer is then on the devices of its stage only. So is one in another form already.
        """
        if not self.as_stored:
            return self
        paths, stored = set(stacked(self.model)), flatten(self.param_shardings)
        if not paths or any(sharded_by(stored[path].spec, 1)[0] for path in paths):
            return self

        def cut(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
            layer = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
            return (layer,) * leaf.shape[0] if path in paths else leaf

        shapes = map_paths(cut, self.param_shapes)
        axes = jax.tree.map(
            lambda shape, names: (names[1:],) * len(shape) if isinstance(shape, tuple) else names,
            shapes,
            self.axes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        return self.in_form(shapes, axes)

    def in_form(self, param_shapes: Params, axes: Axes) -> "ShardedModel":
        """Returns the model with its parameters in another form that it takes, of these shapes and axes."""
        made = copy.copy(self)
        made.__dict__.pop("param_shardings", None)
        made.param_shapes, made.axes, made.as_stored = param_shapes, axes, False
        return made

    def split(self, params: Params, consume: bool = False) -> Params:
        """Returns parameters as this model, made by `by_layer`, has them, from ones as they are stored.

        One goes after the other; with `consume` the arrays that were taken apart are deleted, so that no more than one
        is there twice.
        """

        def one(leaf: Any, shardings: Any) -> Any:
            if isinstance(leaf, tuple) or not isinstance(shardings, tuple):
                return leaf
            layers = _taken_apart(shardings)(leaf)
            if consume:
                leaf.delete()
            return layers

        return jax.tree.map(one, params, self.param_shardings, is_leaf=lambda node: isinstance(node, tuple))

    def batch(self, batch_size: int, lengths: Mapping[str, int]) -> "ShardedBatch":
        """Returns what a batch of `batch_size` examples holds, over all processes; `lengths` in tokens by task feature.

        Raises:
          UserError: a length that the model needs is missing, or the batch is not divisible over the mesh.
        """
        try:
            spec = dict(self.model.batch_spec(batch_size, lengths))
        except KeyError as error:
            missing = error.args[0]
            raise UserError(
                f"TASK_FEATURE_LENGTHS={dict(lengths)} lacks {missing!r}, which {type(self.model).__name__} needs; "
                f"add it: --gin.TASK_FEATURE_LENGTHS=\"{{..., '{missing}': 128}}\""
            ) from error
        return ShardedBatch(self.partitioner, batch_size, spec, self.partitioner.batch_shardings(spec))


@functools.cache
def _taken_apart(shardings: tuple[NamedSharding, ...]) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    """Returns the program that makes of an array [layers, ...] one array a layer, in these shardings."""
    return jax.jit(lambda x: tuple(x[i] for i in range(len(shardings))), out_shardings=shardings)


@dataclasses.dataclass(frozen=True)
class ShardedBatch:
    """What a batch holds and how its features are sharded.

    Attributes:
      partitioner: of the model.
      size: examples, over all processes.
      spec: the features.
      shardings: of each.
    """

    partitioner: Partitioner
    size: int
    spec: dict[str, ArraySpec]
    shardings: dict[str, NamedSharding]

    @property
    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The features' shapes."""
        return {name: jax.ShapeDtypeStruct(spec.shape, spec.dtype) for name, spec in self.spec.items()}

    def shard(self, batch: Batch) -> dict[str, jax.Array]:
        """Puts this process's rows of a batch on its devices."""
        return self.partitioner.put_batch(batch, self.shardings, self.size)


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor; `replicated` is the number of devices that hold the same bytes."""

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int
    total_bytes: int
    replicated: int
    rule: str


def explain(partitioner: Partitioner, names: Any, shapes: Any, what: str) -> list[Row]:
    """Returns a row a tensor, for a tree of axis names beside a tree of shapes with dtypes."""
    rows: list[Row] = []

    def add(path: Any, leaf: Any, leaf_names: tuple[str | None, ...], resolved: Resolution) -> None:
        name = f"{what}/{path_name(path)}" if path_name(path) else what
        sharding = NamedSharding(partitioner.mesh, resolved.spec)
        itemsize = jax.numpy.dtype(leaf.dtype).itemsize
        own, total = math.prod(sharding.shard_shape(leaf.shape)) * itemsize, math.prod(leaf.shape) * itemsize
        copies = partitioner.mesh.size * own // total if total else 1
        spec = "(" + ", ".join("+".join(axes) or "None" for axes in sharded_by(resolved.spec)) + ")"
        rows.append(
            Row(
                name,
                tuple(leaf_names),
                tuple(leaf.shape),
                str(leaf.dtype),
                spec,
                own,
                total,
                copies,
                " ".join(resolved.rules),
            )
        )

    jax.tree_util.tree_map_with_path(add, shapes, names, partitioner.resolve(names, shapes, what))
    return rows


def replicated_share(rows: Sequence[Row]) -> float:
    """Returns the share of a device's bytes that every other device holds as well, in [0, 1]."""
    total = sum(row.bytes_per_device for row in rows)
    whole = sum(row.bytes_per_device for row in rows if row.bytes_per_device == row.total_bytes)
    return whole / total if total else 0.0


def format_rows(rows: Iterable[Row]) -> str:
    """Returns an aligned text table."""
    cells = [("tensor", "axes", "shape", "dtype", "spec", "bytes/device", "copies", "rules")]
    for row in rows:
        axes = ", ".join(name or "-" for name in row.axes)
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append(
            (
                row.name,
                axes,
                shape,
                row.dtype,
                row.spec,
                format_bytes(row.bytes_per_device),
                f"x{row.replicated}",
                row.rule,
            )
        )
    return "\n".join(format_columns(cells))


T = TypeVar("T")


class _Program(NamedTuple):
    compiled: jax.stages.Compiled
    shardings: dict[str, NamedSharding]  # of the batch


class ProgramCache:
    """Compiles functions of (parameters, batch, ...) on first use, once for each name and shape.

    Every process calls the same methods with the same global batches, of which its devices get their own rows.

    Attributes:
      count: how many programs were compiled so far.
    """

    def __init__(self, sharded: ShardedModel, batch_size: int):
        """`batch_size` is in rows over all processes; UserError where it is not divisible over the mesh."""
        self.count = 0
        self._sharded, self._batch_size = sharded, batch_size
        self._rows = sharded.partitioner.process_rows(batch_size)
        self._programs: dict[Hashable, Any] = {}

    def run(
        self,
        name: str,
        function: Callable[..., Any],
        params: Params,
        batch: Batch,
        *others: Any,
        static: Hashable = (),
        spec: Mapping[str, ArraySpec] | None = None,
    ) -> Any:
        """Starts `function(params, batch, *others)`; what it returns is on all processes, perhaps still being computed.

        Args:
          name, static: tell the function from others, together with all that it closes over.
          function: what is compiled.
          params: the model's parameters.
          batch: a global batch, numpy [batch_size, ...].
          others: further arrays, the same on all devices.
          spec: the batch's features; None: those of `batch`, whose rows alone are sharded.

        Raises:
          UserError: the model refuses these shapes, or they do not fit the layout.
        """
        if spec is None:
            spec = {key: ArraySpec(x.shape, x.dtype, ("batch", *[None] * (x.ndim - 1))) for key, x in batch.items()}
        shapes = {key: jax.ShapeDtypeStruct(each.shape, each.dtype) for key, each in spec.items()}
        rest = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in others]
        key = (
            name,
            static,
            tuple(sorted((feature, x.shape, str(x.dtype)) for feature, x in shapes.items())),
            tuple((x.shape, str(x.dtype)) for x in rest),
        )
        program = self.get(key, lambda: self._compile(name, function, shapes, rest, spec))
        rows = self._sharded.partitioner.put_batch(self.own_rows(batch), program.shardings, self._batch_size)
        return program.compiled(params, rows, *others)

    def own_rows(self, batch: Batch) -> Batch:
        """Returns the rows of a global batch that this process's devices hold."""
        return {feature: rows[self._rows] for feature, rows in batch.items()}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what `make` compiled for `key`, which it is asked for once."""
        if key not in self._programs:
            self._programs[key] = make()
            self.count += 1
        found: T = self._programs[key]
        return found

    def _compile(
        self,
        name: str,
        function: Callable[..., Any],
        shapes: dict[str, jax.ShapeDtypeStruct],
        others: list[jax.ShapeDtypeStruct],
        spec: Mapping[str, ArraySpec],
    ) -> _Program:
        partitioner, param_shardings = self._sharded.partitioner, self._sharded.param_shardings
        shardings = partitioner.batch_shardings(spec)
        try:
            compiled = partitioner.compile(
                function,
                self._sharded.param_shapes,
                shapes,
                *others,
                in_shardings=(param_shardings, shardings, *[partitioner.replicated] * len(others)),
                out_shardings=partitioner.replicated,
            )
        except ValueError as error:
            raise UserError(f"{type(self._sharded.model).__name__}, {name}: {error}") from error
        self._check_room(compiled, name)
        return _Program(compiled, shardings)

    def _check_room(self, compiled: jax.stages.Compiled, name: str) -> None:
        """Raises UserError where a device has no room for what a program makes: running it would end the process."""
        try:
            memory: Any = compiled.memory_analysis()  # None where a backend has none
            needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
        except (AttributeError, NotImplementedError, RuntimeError):  # XLA's own errors are RuntimeErrors
            return
        room = free_memory(jax.local_devices()[0])
        if room is not None and needed > room:
            raise UserError(
                f"a batch of {self._batch_size:,} examples ({name}) needs {format_bytes(needed)} of each device, "
                f"which has {format_bytes(room)} free: give a smaller batch_size, or fewer predictions or tokens"
            )
