"""The map between a Hugging Face model's tensors and our parameters: rules and forms that serve both ways."""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

import einops
import numpy as np

from meshway.framework.errors import UserError, nearest_names
from meshway.framework.terminal import count_of, listed
from meshway.framework.trees import block_of, pattern_lengths

Sizes = Mapping[str, int]
Group = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """`theirs -> ours`, a pattern of einops such as '(heads head_dim) embed -> embed heads head_dim': names in brackets
    lie in one dimension, the first varying slowest. Values are only moved, so one way undoes the other, bit for bit.

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
        if sorted(name for group in self.theirs for name in group) != sorted(self.ours):
            raise ValueError(f"{self.text!r} does not have the same names on both sides")

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
        return einops.rearrange(value, self.text, **self._own(sizes))

    def to_theirs(self, value: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Returns the parameter, parts first where it has some, as the tensor [their_shape]."""
        theirs, ours = self.text.split("->")
        return einops.rearrange(value, f"{ours} -> {theirs}", **self._own(sizes))

    def _own(self, sizes: Sizes) -> dict[str, int]:
        """Returns the sizes of the pattern's names alone; einops refuses others."""
        return {name: sizes[name] for name in self.ours}

    def box(self, wanted: Mapping[str, slice], sizes: Sizes) -> tuple[tuple[slice, ...], dict[str, slice], Sizes]:
        """Returns what to read of a tensor to have a part of the parameter.

        Args:
          wanted: name -> the slice of it, with bounds; a missing one is whole.
          sizes: of the whole.

        Returns:
          (the tensor's slices, the slices to take afterwards of the names that were read beyond `wanted`, the sizes
          of what is read). Of names in one dimension only the first can be sliced while reading.
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


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which tensor holds which parameter.

    Attributes:
      theirs: the tensor's name; {base} is the family's prefix, {layer} the layer's number
        ({layer:03d} with zeros before it), {expert} the expert's.
      ours: the parameter's path, where {block} stands for the block of the stack's pattern that the layer is; several
        paths where one tensor holds several parameters, in the order of `part`.
      form: how dimensions differ, without those of layers and experts, which lead ours.
      beside: only where the model has a parameter whose path ends so; with '!' only where it has none.
    """

    theirs: str
    ours: str | tuple[str, ...]
    form: Form
    beside: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters, one or several."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def applies(self, paths: Collection[str]) -> bool:
        """Whether the rule is one for the model with these parameters."""
        wanted = self.beside.removeprefix("!")
        return not wanted or any(path.endswith(wanted) for path in paths) != self.beside.startswith("!")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor, and the entries of our parameters that it holds.

    Attributes:
      theirs: the tensor's name.
      ours: the parameters, in the order of parts.
      index: the entry of them all: (layer,), (layer, expert) or ().
      form: how dimensions differ.
      sizes: of the form's names.
    """

    theirs: str
    ours: tuple[str, ...]
    index: tuple[int, ...]
    form: Form
    sizes: Mapping[str, int]

    @property
    def their_shape(self) -> Shape:
        """The tensor's shape."""
        return self.form.their_shape(self.sizes)


def pieces_of(rules: Sequence[Rule], base: str, shapes: Mapping[str, Shape]) -> list[Piece]:
    """Returns the tensors that a model with parameters [shapes] is made of, in the order of the parameters.

    Raises:
      UserError: a parameter that no rule speaks of, or that has other dimensions than its rule: all are listed.
    """
    rules = [rule for rule in rules if rule.applies(shapes)]
    lengths = pattern_lengths(shapes)
    pieces, problems = [], []
    for path, shape in shapes.items():
        found = next(((rule, part, stack) for rule in rules for part, stack in _matches(rule, path)), None)
        if found is None:
            problems.append(path)
            continue
        rule, part, stack = found
        if part:
            continue  # it lies in the tensor of the first one
        count = ("{layer" in rule.theirs) + ("{expert" in rule.theirs)
        sizes = rule.form.sizes(shape[count:], len(rule.paths))
        if sizes is None:
            problems.append(f"{path} (of {len(shape)} dimensions)")
            continue
        block = block_of(path)
        for index in _indices(shape[:count]):
            layer = index[0] * lengths[block.stack] + block.index if block and index else 0
            name = rule.theirs.format(base=base, layer=layer, expert=index[-1] if index else 0)
            ours = tuple(each.replace("{block}", stack) for each in rule.paths)
            pieces.append(Piece(name, ours, index, rule.form, sizes))
    if problems:
        raise UserError(
            f"{count_of(len(problems), 'parameter')} of the model without a place in this family: {listed(problems)}"
        )
    return pieces


def check_tensors(
    pieces: Sequence[Piece], tensors: Mapping[str, Shape], ignored: Sequence[str], copies: Collection[str] = ()
) -> None:
    """Compares the tensors that a model is made of with those that are there.

    Args:
      pieces: what the model is made of.
      tensors: the shapes of those there.
      ignored: patterns of tensors that hold nothing learned, such as a table of rotary frequencies.
      copies: names that repeat another tensor, and were compared with it.

    Raises:
      UserError: parameters without a tensor, tensors without a parameter, or other shapes: all are listed.
    """
    wanted = {piece.theirs: piece.their_shape for piece in pieces}
    missing = [name for name in wanted if name not in tensors]
    left = [
        name
        for name in tensors
        if name not in wanted and name not in copies and not any(re.fullmatch(each, name) for each in ignored)
    ]
    shapes = [
        f"{name} is {list(tensors[name])}, not {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name] != shape
    ]
    problems = []
    if missing:
        near = nearest_names(missing[0], left) if left else []
        hint = f" (nearest there: {near[0]})" if near else ""
        problems.append(f"{count_of(len(missing), 'tensor', 'is')} missing: {listed(missing)}{hint}")
    if left:
        problems.append(f"{count_of(len(left), 'tensor', 'has')} no place in the model: {listed(left)}")
    if shapes:
        problems.append(f"{count_of(len(shapes), 'tensor', 'has')} another shape than the model: {listed(shapes)}")
    if problems:
        raise UserError("; ".join(problems))


def by_parameter(pieces: Sequence[Piece]) -> dict[str, list[tuple[Piece, int]]]:
    """Returns the pieces of each parameter, each with the number of its part in the tensor."""
    found: dict[str, list[tuple[Piece, int]]] = defaultdict(list)
    for piece in pieces:
        for part, path in enumerate(piece.ours):
            found[path].append((piece, part))
    return dict(found)


def _matches(rule: Rule, path: str) -> Iterator[tuple[int, str]]:
    """Yields (the number of `path` among the rule's parameters, its block)."""
    for part, pattern in enumerate(rule.paths):
        before, block, after = pattern.partition("{block}")
        match = re.fullmatch(re.escape(before) + (r"(block_\d+)" if block else "") + re.escape(after), path)
        if match:
            yield part, match[1] if block else ""


def _indices(shape: Shape) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)
