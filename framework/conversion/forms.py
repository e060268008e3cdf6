"""How one tensor's dimensions become another's: reshapes and transposes written with named dimensions."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Sizes = Mapping[str, int]
Group = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """`theirs -> ours`, as '(heads head_dim) embed -> embed heads head_dim': names in brackets lie in one dimension,
    the first varying slowest. Values are only moved, so one way undoes the other, bit for bit.

    A name `part` that begins the right side counts parameters that lie in one tensor (GPT-2's queries, keys, values).
    """

    text: str

    @functools.cached_property
    def theirs(self) -> tuple[Group, ...]:
        """The names in each dimension of the tensor."""
        return _groups(self.text.partition("->")[0])

    @functools.cached_property
    def ours(self) -> Group:
        """The names of the parameter's dimensions."""
        return tuple(name for group in _groups(self.text.partition("->")[2]) for name in group)

    def __post_init__(self) -> None:
        if sorted(self._flat) != sorted(self.ours):
            raise ValueError(f"{self.text!r} does not have the same names on both sides")

    @property
    def _flat(self) -> Group:
        return tuple(name for group in self.theirs for name in group)

    @property
    def has_parts(self) -> bool:
        """Whether several parameters lie in one tensor."""
        return self.ours[:1] == ("part",)

    def sizes(self, shape: Sequence[int], num_parts: int = 1) -> dict[str, int] | None:
        """Returns the size of each name for a parameter [shape]; None where the number of dimensions is another."""
        names = self.ours[1:] if self.has_parts else self.ours
        if len(names) != len(shape):
            return None
        return dict(zip(names, shape, strict=True)) | ({"part": num_parts} if self.has_parts else {})

    def their_shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Returns the tensor's shape."""
        return tuple(math.prod(sizes[name] for name in group) for group in self.theirs)

    def to_ours(self, value: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Returns the tensor [their_shape] as the parameter, parts first where it has some."""
        names = self._flat
        spread = value.reshape([sizes[name] for name in names])
        return spread.transpose([names.index(name) for name in self.ours])

    def to_theirs(self, value: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Returns the parameter, parts first where it has some, as the tensor [their_shape]."""
        turned = value.transpose([self.ours.index(name) for name in self._flat])
        return turned.reshape(self.their_shape(sizes))

    def box(self, wanted: Mapping[str, slice], sizes: Sizes) -> tuple[tuple[slice, ...], dict[str, slice], Sizes]:
        """Returns what to read of a tensor to have a part of the parameter.

        Args:
          wanted: name -> the slice of it, with bounds; a missing one is whole.
          sizes: of the whole.

        Returns:
          (the tensor's slices, what is then to be cut from the names that were read beyond `wanted`, the sizes of what
          is read). Of names in one dimension only the first can be cut while reading.
        """
        box: list[slice] = []
        rest: dict[str, slice] = {}
        read = dict(sizes)
        for group in self.theirs:
            inner = math.prod(sizes[name] for name in group[1:])
            first = wanted.get(group[0], slice(0, sizes[group[0]])) if group else slice(0, 1)
            box.append(slice(first.start * inner, first.stop * inner))
            if group:
                read[group[0]] = first.stop - first.start
            rest |= {name: wanted[name] for name in group[1:] if name in wanted}
        return tuple(box), rest, read


def _groups(text: str) -> tuple[Group, ...]:
    """Returns the names of each dimension: 'a (b c)' -> (('a',), ('b', 'c'))."""
    return tuple(tuple((inside or name).split()) for inside, name in re.findall(r"\(([^)]*)\)|([^\s()]+)", text))
