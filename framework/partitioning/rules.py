"""Rules from logical axis names to mesh axes, and an error for every way in which they may not fit."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

from jax.sharding import PartitionSpec

from meshway.framework.axes import FOLLOWS, VOCABULARY, Names
from meshway.framework.errors import UserError, did_you_mean

Target = str | Sequence[str] | None
OTHERS = "*"  # in a table: all other names of the vocabulary
Axes = tuple[str, ...]  # mesh axes that shard one dimension together; () for none


class UnmappedAxis(UserError, LookupError):
    """A logical axis that no rule maps: a LookupError to models, which know no UserError."""


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Where an array lies.

    Attributes:
      spec: its sharding.
      rules: for each dimension the rule that fired, as text.
      fired: the logical names whose rules fired.
    """

    spec: PartitionSpec
    rules: tuple[str, ...]
    fired: frozenset[str]


class Rules:
    """One ordered table `(logical name, target)`.

    A target is a mesh axis, several that shard a dimension together (`('data', 'fsdp')`, or `'data + fsdp'`), or None,
    which replicates, in writing: a name without any rule is an error, never a silent replication. `('*', None)` writes
    it for all other names of the axis vocabulary, and for no name outside it.

    Alternatives are written out too: `'model | data | None'` takes, for each array, the first whose axes are free and
    divide the dimension. The names of attention's own dimensions follow the rule of another where they have none
    (`axes.FOLLOWS`). Axes are taken in the order of the table: with `heads` before `length`, `('length', 'model |
    None')` shards the length of the residual stream, and not that of queries, whose heads are sharded.
    """

    def __init__(
        self,
        table: Sequence[tuple[str, Target]],
        mesh_sizes: Mapping[str, int],
        title: str,
        whole_when_single: Collection[str] = (),
    ):
        """`title` names the table in messages, as gin binds it ("Layout.parameters"). Dimensions of the names in
        `whole_when_single` are not sharded where their size is 1: the length of a decoding step.

        Raises:
          UserError: a rule is not a pair, a name has two rules, or a target is not an axis of the mesh.
        """
        self.title = title
        self._sizes = dict(mesh_sizes)
        self._whole_when_single = frozenset(whole_when_single)
        self._targets: dict[str, tuple[Axes, ...]] = {}
        for rule in table:
            if not (isinstance(rule, (tuple, list)) and len(rule) == 2):
                raise UserError(f"{title}: a rule is ('logical name', mesh axis or None), not {rule!r}")
            name, target = rule
            if name == OTHERS and target is not None:
                raise UserError(f"{title}: {(name, target)!r}: the other names can only be replicated, by ('*', None)")
            if name in self._targets:
                raise UserError(f"{title}: {name!r} has two rules; merge them: ('{name}', ('axis', 'axis'))")
            self._targets[name] = self._alternatives(name, target)

    def resolve(self, names: Names, shape: Sequence[int], what: str) -> Resolution:
        """Returns where an array of logical axes `names` and sizes `shape` lies; `what` names it in messages.

        Raises:
          UserError: a name no rule maps, two dimensions on one mesh axis, or a dimension that is not divisible.
        """
        entries: list[Axes] = [()] * len(names)
        owner: dict[str, str | None] = {}
        for place in self._in_table_order(names, what):
            name, size = names[place], shape[place]
            axes = self._choose(name, size, owner, what)
            for axis in axes:
                if axis in owner:
                    first, second = sorted((owner[axis], name), key=names.index)
                    raise UserError(
                        f"{what} with axes {names}: both {first!r} and {second!r} are mapped to mesh axis "
                        f"{axis!r} by {self.title}; an axis can shard one dimension only"
                    )
                owner[axis] = name
            parts = self._parts(axes)
            if size % parts:
                raise UserError(
                    f"{what} with shape {tuple(shape)} and axes {names}: {name!r} of size {size} is not "
                    f"divisible by {' x '.join(f'{axis}={self._sizes[axis]}' for axis in axes)}, to which "
                    f"{self.title} maps it{_advice(name, size, parts)}"
                )
            entries[place] = axes
        spec = PartitionSpec(*[axes[0] if len(axes) == 1 else (axes or None) for axes in entries])
        rules = [f"{name}->{'+'.join(axes) if axes else 'None'}" for name, axes in zip(names, entries, strict=True)]
        return Resolution(spec, tuple(rules), frozenset(name for name in names if name is not None))

    def axes_of(self, name: str, what: str = "an activation") -> Axes:
        """Returns the mesh axes that shard `name`, the first alternative where there are several; UserError when no
        rule maps it."""
        return self._targets_of(name, what)[0]

    def unmatched(self, fired: Collection[str]) -> list[str]:
        """Returns the rules that are an error where only those of the names `fired` were ever used: of the others,
        those that shard a dimension, and those of names outside the vocabulary. Where all heads have keys and values of
        their own, models may call them `heads` throughout: then a rule of `kv_heads` says nothing wrong."""
        fired = {*fired, "kv_heads"} if "heads" in fired else fired
        return [
            f"{self.title}: ({name!r}, {_text(targets)}){did_you_mean(name, {*VOCABULARY, *fired} - {name})}"
            for name, targets in self._targets.items()
            if name not in fired and name != OTHERS and (any(targets) or name not in VOCABULARY)
        ]

    def _alternatives(self, name: str, target: Target) -> tuple[Axes, ...]:
        """Reads a target."""
        if target is None:
            return ((),)
        if isinstance(target, str):
            words = [[word.strip() for word in part.split("+")] for part in target.split("|")]
            found = tuple(() if part == ["None"] else tuple(part) for part in words)
        elif isinstance(target, (tuple, list)):
            found = (tuple(target),)
        else:
            raise UserError(
                f"{self.title}: rule {(name, target)!r}: {target!r} is neither a mesh axis, nor several, nor None"
            )
        for axis in (axis for axes in found for axis in axes):
            if axis not in self._sizes:
                raise UserError(
                    f"{self.title}: rule {(name, target)!r} names mesh axis {axis!r}, but the mesh has "
                    f"{list(self._sizes)}{did_you_mean(str(axis), self._sizes)}"
                )
        return found

    def _in_table_order(self, names: Names, what: str) -> list[int]:
        """Returns the dimensions whose rules come first, first; unknown names raise."""
        order = {name: rank for rank, name in enumerate(self._targets)}
        order |= {
            name: order[followed] for name, followed in FOLLOWS.items() if name not in order and followed in order
        }
        for name in names:
            if name is not None:
                self._targets_of(name, what)
        return sorted(range(len(names)), key=lambda place: order.get(names[place] or "", -1))

    def _choose(self, name: str | None, size: int, owner: Mapping[str, str | None], what: str) -> Axes:
        """Returns the mesh axes for a dimension: the first alternative that fits, else the last, to complain about."""
        if name is None:
            return ()
        targets = self._targets_of(name, what)
        if size == 1 and name in self._whole_when_single:
            return ()
        for axes in targets:
            if not size % self._parts(axes) and not any(axis in owner for axis in axes):
                return axes
        return targets[-1]

    def _parts(self, axes: Axes) -> int:
        return math.prod(self._sizes[axis] for axis in axes)

    def _targets_of(self, name: str, what: str) -> tuple[Axes, ...]:
        if name not in self._targets and FOLLOWS.get(name) in self._targets:
            return self._targets[FOLLOWS[name]]
        if name not in self._targets and OTHERS in self._targets and name in VOCABULARY:
            return self._targets[OTHERS]
        if name not in self._targets:
            known = self._targets.keys() - {OTHERS} | (VOCABULARY.keys() if OTHERS in self._targets else set())
            raise UnmappedAxis(
                f"{what} has logical axis {name!r}, which no rule of {self.title} maps; rules know "
                f"{sorted(known)}{did_you_mean(name, known)} (write ({name!r}, None) to replicate it)"
            )
        return self._targets[name]


def _text(targets: tuple[Axes, ...]) -> str:
    text = " | ".join("+".join(axes) if axes else "None" for axes in targets)
    return text if text == "None" else repr(text)


def _advice(name: str | None, size: int, parts: int) -> str:
    if name == "batch":
        return f"; set BATCH_SIZE to a multiple of {parts}, such as {(size // parts + 1) * parts}"
    return f"; change the size to a multiple of {parts}, the mesh, or map {name!r} to None"
