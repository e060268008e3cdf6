"""Nested dicts of parameters, addressed by '/'-joined paths such as ``decoder/layers/mlp/wi/kernel``."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from meshway.framework.interfaces import Params


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves by path, in the tree's order. A leaf is all that is not a dict, tuples included."""
    flat: dict[str, Any] = {}
    for key, child in tree.items():
        flat.update(flatten(child, f"{prefix}{key}/") if isinstance(child, dict) else {prefix + key: child})
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Returns the nested dicts of leaves by path: the inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def map_paths(function: Callable[[str, Any], Any], tree: Params, prefix: str = "") -> Params:
    """Returns the tree of ``function(path, leaf)``."""
    return {
        key: map_paths(function, child, f"{prefix}{key}/") if isinstance(child, dict) else function(prefix + key, child)
        for key, child in tree.items()
    }


def select(tree: Params, paths: Collection[str], prefix: str = "") -> Params:
    """Returns the nested dicts with only the leaves at `paths`, and no empty dict."""
    chosen: Params = {}
    for key, child in tree.items():
        if isinstance(child, dict):
            if part := select(child, paths, f"{prefix}{key}/"):
                chosen[key] = part
        elif prefix + key in paths:
            chosen[key] = child
    return chosen


def merge(tree: Params, part: Params) -> Params:
    """Returns `tree` with the leaves of `part`, which has some of its paths, in place of its own."""
    return {
        key: (merge(child, part[key]) if isinstance(child, dict) else part[key]) if key in part else child
        for key, child in tree.items()
    }
