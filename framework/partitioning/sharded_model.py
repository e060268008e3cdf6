"""A model on a mesh: how its parameters and batches are sharded. Every program over a model begins with this."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jax.sharding import NamedSharding

from meshway.framework.errors import UserError
from meshway.framework.interfaces import ArraySpec, Axes, Batch, Model, Params
from meshway.framework.partitioning.partitioner import Layout, Partitioner


class ShardedModel:
    """A model under a layout; nothing is allocated.

    Attributes:
      model: as given.
      partitioner: the layout on the devices.
      axes: the logical axes of each parameter.
      param_shapes: ShapeDtypeStructs of the parameters.
    """

    def __init__(self, model: Model, layout: Layout):
        """Raises UserError where the layout does not fit the devices."""
        self.model = model
        self.partitioner = Partitioner(layout)
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
