"""Names, shapes and dtypes of a state: compared before a restore, so that a mismatch is explained, not thrown."""

import difflib
from typing import Any

import jax

from meshway.framework.partitioning.partitioner import path_name

Schema = dict[str, list[Any]]  # path -> [shape as a list, dtype name]


def schema_of(tree: Any) -> Schema:
    """Returns the schema of a tree of arrays or ShapeDtypeStructs."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def differences(saved: Schema, wanted: Schema, limit: int = 4) -> str:
    """Returns what differs in words, the first `limit` of each kind; '' where nothing does."""
    wanted = dict(sorted(wanted.items(), key=lambda item: not item[0].startswith("params/")))  # what people know
    shapes = [
        f"{name} is {_shown(saved[name])} there and {_shown(spec)} here"
        for name, spec in wanted.items()
        if name in saved and saved[name] != spec
    ]
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    parts = [
        _listed("", shapes, limit),
        _listed("not in the checkpoint: ", missing, limit),
        _listed("only in the checkpoint: ", extra, limit),
    ]
    return "; ".join(part for part in parts if part)


def nearest_names(name: str, candidates: list[str], limit: int = 3) -> list[str]:
    """Returns the candidates most like a parameter's path."""
    return difflib.get_close_matches(name, candidates, n=limit, cutoff=0.3)


def _shown(spec: list[Any]) -> str:
    return f"{spec[1]}[{','.join(map(str, spec[0]))}]"


def _listed(title: str, items: list[str], limit: int) -> str:
    if not items:
        return ""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return title + ", ".join(items[:limit]) + more
