"""Nested dicts of parameters, addressed by '/'-joined paths such as ``decoder/layers/mlp/wi/kernel``."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.interfaces import Axes, Params


def flatten(tree: Params) -> dict[str, Any]:
    """Returns the leaves by path, in the tree's order. A leaf is all that is not a dict, tuples included."""
    flat: dict[str, Any] = flatten_dict(tree, sep="/")
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Returns the nested dicts of leaves by path: the inverse of `flatten`."""
    tree: Params = unflatten_dict(dict(flat), sep="/")
    return tree


def map_paths(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """Returns the tree of ``function(path, leaf)``."""
    mapped: Any = path_aware_map(lambda path, leaf: function("/".join(map(str, path)), leaf), tree)
    return dict(mapped)


def select(tree: Params, paths: Collection[str]) -> Params:
    """Returns the nested dicts with only the leaves at `paths`, and no empty dict."""
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path in paths})


def merge(tree: Params, part: Params) -> Params:
    """Returns `tree` with the leaves of `part`, which has some of its paths, in place of its own."""
    return unflatten(flatten_dict(tree, keep_empty_nodes=True, sep="/") | flatten(part))


def check_pattern(pattern: str, where: str) -> None:
    """Raises UserError for what is no regular expression; the recipe gives it at `where`."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where}: {pattern!r} is not a regular expression: {error}") from None


def matching(pattern: str, paths: Iterable[str], where: str) -> list[str]:
    """Returns the paths that a regex, which the recipe gives at `where`, matches in full.

    Raises:
      UserError: it matches none, or is not a regex.
    """
    check_pattern(pattern, where)
    matched = [path for path in paths if re.fullmatch(pattern, path)]
    if not matched:
        hint = did_you_mean(pattern, paths) or f"; parameters left are {', '.join(sorted(paths)[:5])}, ..."
        raise UserError(f"{where}: {pattern!r} matches no (remaining) parameter{hint}")
    return matched


def axis_sizes(axes: Axes, shapes: Params, name: str) -> list[int]:
    """Returns the size of every dimension of the parameters that has the logical axis `name`."""

    def sizes(leaf: Any, names: tuple[str | None, ...]) -> list[int]:
        return [size for axis, size in zip(names, leaf.shape) if axis == name]

    found: list[int] = jax.tree.leaves(jax.tree.map(sizes, shapes, axes))
    return found


_BLOCK = re.compile(r"((?:.*/)?)block_(\d+)/(.*)")


@dataclasses.dataclass(frozen=True)
class Block:
    """A parameter's place in a stack: `stack`block_`index`/`rest`."""

    stack: str
    index: int
    rest: str

    def at(self, index: int) -> str:
        """Returns the name of this parameter in another block of the stack."""
        return f"{self.stack}block_{index}/{self.rest}"


def block_of(name: str) -> Block | None:
    """Returns which block of a stack's pattern a parameter belongs to, if to any (see `models.layers.stack`)."""
    match = _BLOCK.fullmatch(name)
    return None if match is None else Block(match[1], int(match[2]), match[3])


def pattern_lengths(names: Iterable[str]) -> dict[str, int]:
    """Returns how many blocks the pattern of each stack has."""
    lengths: dict[str, int] = {}
    for name in names:
        if block := block_of(name):
            lengths[block.stack] = max(lengths.get(block.stack, 0), block.index + 1)
    return lengths
