"""A layout as a model meets it while it is traced, with a record of what the model asked for."""

from collections import Counter

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.axes import Names, sharded_by
from meshway.framework.partitioning.rules import Rules


class Activations:
    """Answers a model's questions about the layout (`axes.Ambient`). `Partitioner.activate` makes a new one each time,
    so what it records belongs to what was traced inside that `with` block and to nothing else.

    Attributes:
      constrained: (axes, shape, spec) of the activations that were constrained -> how often (a scanned layer once).
      names: the logical names that were asked for, of all questions.
    """

    def __init__(self, mesh: Mesh, activation_rules: Rules, parameter_rules: Rules):
        self.mesh = mesh
        self.constrained: Counter[tuple[Names, tuple[int, ...], PartitionSpec]] = Counter()
        self.names: set[str] = set()
        self._activation_rules, self._parameter_rules = activation_rules, parameter_rules

    def sharding(self, names: Names, shape: tuple[int, ...]) -> NamedSharding:
        """Returns the sharding of an activation with logical axes `names`; UserError as `Rules.resolve`."""
        resolved = self._activation_rules.resolve(names, shape, "an activation")
        self.names |= resolved.fired
        self.constrained[names, shape, resolved.spec] += 1
        return NamedSharding(self.mesh, resolved.spec)

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes, of more than one device, that shard logical axis `name` of activations.

        Raises:
          UserError: no rule maps `name`.
        """
        self.names.add(name)
        return tuple(axis for axis in self._activation_rules.axes_of(name) if self.mesh.shape[axis] > 1)

    def lookup(
        self, names: Names, shape: tuple[int, ...], table_names: Names, table_shape: tuple[int, ...]
    ) -> list[NamedSharding]:
        """Returns the shardings that entries looked up in a parameter go through, from where they are found to where
        `names` say.

        An example: four devices, a mesh of fsdp=4, an embedding table [vocab, embed] whose `embed` is stored sharded
        over fsdp, and activations [batch, length, embed] whose `batch` is sharded over fsdp. Device d holds columns d
        of the table, so given all token ids it looks up columns d of every token (the first sharding). One all-to-all
        over fsdp then turns some columns of all tokens into all columns of some tokens (the second):

                        embed                                       embed
                   d0 | d1 | d2 | d3                           +------------------+
                 +----+----+----+----+                         |        d0        |
                 |    |    |    |    |       all-to-all        +------------------+
          batch  |    |    |    |    |    --------------->     |        d1        |
                 |    |    |    |    |       over fsdp         +------------------+
                 |    |    |    |    |                         |        d2        |
                 +----+----+----+----+                         +------------------+
                                                               |        d3        |
                  (None, None, fsdp)                           +------------------+
                                                                (fsdp, None, None)

        In general, dimensions of the table keep at first the mesh axes that the table is stored over, and the others
        have the axes that `names` want, except those of the table. Where a mesh axis of the table's dimensions is
        wanted elsewhere, it is handed over, one axis at a time and the innermost first, since the compiler knows how to
        exchange two dimensions over one mesh axis. What remains (axes that only the table has) is the caller's last
        constraint.

        Args:
          names: the logical axes of what was looked up, of sizes `shape`.
          table_names: those of the parameter, of sizes `table_shape`; names in both are the entries' own dimensions.

        Raises:
          UserError: see `Rules.resolve`.
        """
        stored = sharded_by(self._parameter_rules.resolve(table_names, table_shape, "a table").spec)
        resolved = self._activation_rules.resolve(names, shape, "an activation")
        self.names |= resolved.fired
        wanted = sharded_by(resolved.spec)
        of_table = [stored[table_names.index(name)] if name in table_names else None for name in names]
        held = [axis for axes in stored for axis in axes]  # the table's mesh axes that were not handed over yet
        steps = []
        while True:
            entries = [
                tuple(axis for axis in (want if own is None else own) if (axis in held) == (own is not None))
                for want, own in zip(wanted, of_table, strict=True)
            ]
            steps.append(NamedSharding(self.mesh, PartitionSpec(*[axes or None for axes in entries])))
            movable = [axis for own in of_table for axis in own or () if axis in held]
            elsewhere = {axis for want, own in zip(wanted, of_table, strict=True) if own is None for axis in want}
            if elsewhere.isdisjoint(movable):
                return steps
            held.remove(movable[-1])
