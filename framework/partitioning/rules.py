"""Rules from logical axis names to mesh axes, and every way in which they may not fit."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

from meshway.framework.axes import VOCABULARY, Names
from meshway.framework.errors import UserError, did_you_mean

Target = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Where an array lies: its spec, and for each dimension the rule that fired as text."""

    spec: PartitionSpec
    rules: tuple[str, ...]


class Rules:
    """One ordered table `(logical name, mesh axis | tuple of axes | None)`.

    None replicates, in writing: a name without any rule is an error, never a silent replication.
    """

    def __init__(self, table: Sequence[tuple[str, Target]], mesh_sizes: Mapping[str, int], title: str):
        """`title` names the table in messages, as gin binds it ("Layout.parameters").

        Raises:
          UserError: a rule is no pair, a name has two rules, or a target is no axis of the mesh.
        """
        self.title = title
        self.used: set[str] = set()
        self._sizes = dict(mesh_sizes)
        self._targets: dict[str, tuple[str, ...]] = {}
        for rule in table:
            if not (isinstance(rule, (tuple, list)) and len(rule) == 2):
                raise UserError(f"{title}: a rule is ('logical name', mesh axis or None), not {rule!r}")
            name, target = rule
            if name in self._targets:
                raise UserError(f"{title}: {name!r} has two rules; merge them: ('{name}', ('axis', 'axis'))")
            axes = () if target is None else (target,) if isinstance(target, str) else tuple(target)
            for axis in axes:
                if axis not in self._sizes:
                    raise UserError(
                        f"{title}: rule {(name, target)!r} names mesh axis {axis!r}, but the mesh has "
                        f"{list(self._sizes)}{did_you_mean(axis, self._sizes)}"
                    )
            self._targets[name] = axes

    def resolve(self, names: Names, shape: Sequence[int], what: str) -> Resolution:
        """Returns where an array of logical axes `names` and sizes `shape` lies; `what` names it in messages.

        Raises:
          UserError: a name no rule maps, two dimensions on one mesh axis, or a dimension that does not divide.
        """
        entries: list[tuple[str, ...]] = []
        fired: list[str] = []
        owner: dict[str, str | None] = {}
        for name, size in zip(names, shape, strict=True):
            axes = self._axes_of(name, what)
            for axis in axes:
                if axis in owner:
                    raise UserError(
                        f"{what} with axes {names}: both {owner[axis]!r} and {name!r} are mapped to mesh axis "
                        f"{axis!r} by {self.title}; an axis can cut one dimension only"
                    )
                owner[axis] = name
            parts = 1
            for axis in axes:
                parts *= self._sizes[axis]
            if size % parts:
                raise UserError(
                    f"{what} with shape {tuple(shape)} and axes {names}: {name!r} of size {size} does not divide "
                    f"by {' x '.join(f'{axis}={self._sizes[axis]}' for axis in axes)}, to which "
                    f"{self.title} maps it{_advice(name, size, parts)}"
                )
            entries.append(axes)
            fired.append(f"{name}->{'+'.join(axes) if axes else 'None'}")
        spec = PartitionSpec(*[axes[0] if len(axes) == 1 else (axes or None) for axes in entries])
        return Resolution(spec, tuple(fired))

    def unmatched(self) -> list[str]:
        """Returns the rules nothing used: those that cut a dimension, and names outside the vocabulary."""
        return [
            f"{self.title}: ({name!r}, {'+'.join(axes) if axes else None!r})"
            f"{did_you_mean(name, (VOCABULARY.keys() | self.used) - {name})}"
            for name, axes in self._targets.items()
            if name not in self.used and (axes or name not in VOCABULARY)
        ]

    def _axes_of(self, name: str | None, what: str) -> tuple[str, ...]:
        if name is None:
            return ()
        if name not in self._targets:
            raise UserError(
                f"{what} has logical axis {name!r}, which no rule of {self.title} maps; rules know "
                f"{sorted(self._targets)}{did_you_mean(name, self._targets)} "
                f"(write ({name!r}, None) to replicate it)"
            )
        self.used.add(name)
        return self._targets[name]


def _advice(name: str | None, size: int, parts: int) -> str:
    if name == "batch":
        return f"; set BATCH_SIZE to a multiple of {parts}, such as {(size // parts + 1) * parts}"
    return f"; change the size to a multiple of {parts}, the mesh, or map {name!r} to None"
