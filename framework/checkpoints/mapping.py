"""Starting from another run's parameters: ordered renames, and a written list of what is left at its initial value."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from meshway.framework.checkpoints.manager import Checkpoints
from meshway.framework.checkpoints.schema import Schema, nearest_names
from meshway.framework.errors import UserError
from meshway.framework.partitioning.partitioner import path_name


@dataclasses.dataclass(frozen=True)
class Initial:
    """Where a fresh run takes its parameters from; a run that has a checkpoint of its own never looks here.

    `path` is a run directory or one of its checkpoints; `step` None means the latest. `renames` are ordered
    (pattern, replacement): a parameter's name is looked up in the checkpoint under the replacement of the first
    pattern that matches it whole, else under its own name. `left_at_init` are patterns of parameters that keep
    their fresh values; any other parameter must be found, with its shape.
    """

    path: str
    step: int | None = None
    renames: Sequence[tuple[str, str]] = ()
    left_at_init: Sequence[str] = ()

    def restore(self, params: Any) -> Any:
        """Returns `params` (a tree of sharded arrays) with the checkpoint's values put in.

        Raises:
          UserError: no checkpoint there; a parameter without a source or with another shape; a pattern that
            matches nothing.
        """
        folder, step = self._locate()
        checkpoints = Checkpoints(folder, read_only=True)
        if step is None and not checkpoints.steps():
            raise UserError(f"Initial.path: there is no complete checkpoint in {folder}")
        step = checkpoints.steps()[-1] if step is None else step
        if step not in checkpoints.steps():
            raise UserError(f"Initial: {folder} has no checkpoint of step {step}; there are {checkpoints.steps()}")
        schema = checkpoints.recipe(step)["schema"]
        leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
        named = {path_name(path): leaf for path, leaf in leaves}
        sources = self.sources({name: list(leaf.shape) for name, leaf in named.items()}, schema)
        wanted: dict[str, Any] = {}
        for name, source in sources.items():
            leaf = named[name]
            _insert(wanted, source, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
        found = checkpoints.restore_params(step, wanted)
        values = [_lookup(found, sources[name]) if name in sources else leaf for name, leaf in named.items()]
        return jax.tree_util.tree_unflatten(treedef, values)

    def sources(self, shapes: dict[str, list[int]], schema: Schema) -> dict[str, str]:
        """Returns model parameter -> checkpoint parameter, without those left at init; raises as `restore` does."""
        saved = {name.removeprefix("params/"): spec for name, spec in schema.items() if name.startswith("params/")}
        used: set[str] = set()
        sources, problems = {}, []
        for name, shape in shapes.items():
            if _first_match(name, self.left_at_init, used):
                continue
            source = name
            pattern = _first_match(name, [pattern for pattern, _ in self.renames], used)
            if pattern is not None:
                source = re.sub(f"^{pattern}$", dict(self.renames)[pattern], name)
            if source not in saved:
                near = nearest_names(source, list(saved))
                problems.append(f"{name}: no {source!r} in the checkpoint (nearest: {', '.join(near) or 'none'})")
            elif saved[source][0] != shape:
                problems.append(f"{name} has shape {shape} but {source!r} has {saved[source][0]}")
            else:
                sources[name] = source
        unused = [p for p in (*[pattern for pattern, _ in self.renames], *self.left_at_init) if p not in used]
        problems += [f"pattern {pattern!r} matches no parameter of the model" for pattern in unused]
        if problems:
            raise UserError(
                f"Initial.path={self.path!r}: " + "; ".join(problems) + ". Add Initial.renames or Initial.left_at_init"
            )
        return sources

    def _locate(self) -> tuple[Path, int | None]:
        path = Path(self.path).expanduser()
        if path.name.isdigit() and (path / "state").is_dir():
            return path.parent, int(path.name)
        folder = path if path.name == "checkpoints" else path / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"Initial.path: {path} is neither a run directory nor a checkpoint (no {folder})")
        return folder, self.step


def _first_match(name: str, patterns: Sequence[str], used: set[str]) -> str | None:
    for pattern in patterns:
        if re.fullmatch(pattern, name):
            used.add(pattern)
            return pattern
    return None


def _insert(tree: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _lookup(tree: dict[str, Any], name: str) -> Any:
    for key in name.split("/"):
        tree = tree[key]
    return tree
