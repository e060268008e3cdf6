"""Programs over a model's parameters and batches, compiled once for each shape: what evaluation and inference share."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import NamedSharding

from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec, Batch, Params
from meshway.framework.partitioning.mesh import free_memory
from meshway.framework.partitioning.sharded_model import ShardedModel
from meshway.framework.terminal import format_bytes

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
