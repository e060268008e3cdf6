"""From the selectors of a recipe to Python objects: imports, attributes, parameters."""

import dataclasses
import functools
import importlib
import importlib.machinery
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
import gin.config

from meshway.framework import terminal
from meshway.framework.data import seqio_adapter
from meshway.framework.errors import UserError, did_you_mean
from meshway.launch.recipe import t5x
from meshway.launch.recipe.text import REQUIRED, Binding, Import, Macro, Reference, Target, leaves, map_leaves

_BUILTINS = {"singleton": gin.config.singleton}  # what selectors beginning with `gin.` may name


class Unresolved(UserError):
    """A selector names nothing; the caller adds the place."""


class Moved(Unresolved):
    """A module of ours is elsewhere now."""


class ImportTable:
    """The words that selectors may begin with, and the modules they stand for.

    Attributes:
      words: each with the import that it comes from.
      problems: modules that do not exist, and words bound to two different modules.
    """

    def __init__(self, imports: Iterable[Import]):
        self.problems: list[str] = []
        self._absent: set[str] = set()
        self.words: dict[str, Import] = {}
        self._plain: set[str] = set()  # `import a.b.c` serves selectors a.b.c.x
        moved: list[tuple[Import, Unresolved]] = []
        for statement in imports:
            try:
                require_module(statement.module)
            except Unresolved as error:
                if isinstance(error, Moved):
                    moved.append((statement, error))
                else:
                    self.problems.append(f"{statement.place}: {error}")
                self._absent.add(statement.module)
                self.words.setdefault(statement.bound_name, statement)
                continue
            if not (statement.alias or statement.is_from):
                self._plain.add(statement.module)
            first = self.words.setdefault(statement.bound_name, statement)
            if first.module in self._absent:  # which was noted: no reason to note it as a second meaning too
                self.words[statement.bound_name] = statement
            elif first.bound_module != statement.bound_module:
                self.problems.append(
                    f"{statement.place}: `{statement}` gives {statement.bound_name!r} a second meaning, "
                    f"after `{first}` at {first.place}; rename one with `as`"
                )
        self.problems += _moved_modules(moved)

    def target(self, selector: str) -> Target:
        """Returns what a selector names.

        Raises:
          Unresolved: its first word is not imported.
        """
        word, *path = selector.split(".")
        if word == "gin":
            return Target("gin", tuple(path))
        if word not in self.words:
            if not path:
                near = did_you_mean(selector, self.words)
                raise Unresolved(f"{selector!r} is not imported; write its module and name, as module.{selector}{near}")
            renamed = _MOVED.get(f"meshway.launch.{word}")
            near = f"; it is now {renamed}" if renamed else did_you_mean(word, self.words)
            raise Unresolved(f"{word!r} of {selector!r} is not imported{near}")
        module = self.words[word].bound_module
        while path and f"{module}.{path[0]}" in self._prefixes():
            module = f"{module}.{path.pop(0)}"
        return Target(module, tuple(path))

    def _prefixes(self) -> set[str]:
        return {".".join(m.split(".")[:n]) for m in self._plain for n in range(1, m.count(".") + 2)}

    def link(self, binding: Binding) -> Binding:
        """Returns `binding` with the targets of its selector and its references; notes unknown words."""

        def target(selector: str, where: str) -> Target | None:
            try:
                found = self.target(selector)
            except Unresolved as error:
                theirs = t5x.near(binding.name, binding.value) if selector == binding.selector else ""
                self.problems.append(f"{where}: {theirs or error}")
                return None
            return None if found.module in self._absent else found  # an absent module was noted once

        def leaf(value: Any) -> Any:
            if isinstance(value, Reference):
                return dataclasses.replace(value, target=target(value.selector, f"{binding.place}: {value}"))
            dotted = isinstance(value, Macro) and "." in value.name and value.name != REQUIRED
            if dotted and not is_gin_constant(value.name):
                return dataclasses.replace(value, target=target(value.name, f"{binding.place}: {value}"))
            return value

        linked = dataclasses.replace(binding, value=map_leaves(leaf, binding.value))
        if binding.is_macro:
            return linked
        return dataclasses.replace(linked, target=target(binding.selector, binding.where))


def _search_path(module: str) -> Any:
    """Returns where a module's submodules are looked for; None if there is no module.

    Runs no module's code, but for packages that hold a folder without `__init__.py`: Python cannot look
    inside that before its parent is imported.
    """
    path: Any = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name in sys.modules:
            path = getattr(sys.modules[name], "__path__", [])
            continue
        try:
            spec = _find_spec(name, path)
        except KeyError:
            importlib.import_module(".".join(parts[: count - 1]))
            spec = _find_spec(name, path)
        if spec is None:
            return None
        if spec.submodule_search_locations is not None and not spec.has_location:
            importlib.import_module(name)  # a folder without __init__.py: there is no code to run
        path = spec.submodule_search_locations or []
    return path


def _find_spec(name: str, path: Any) -> importlib.machinery.ModuleSpec | None:
    specs = (finder.find_spec(name, path) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


def require_module(module: str) -> None:
    """Raises Unresolved, with the nearest name, if a module cannot be found; imports nothing.

    A folder of ours where a module was is none: Moved is raised.
    """
    if now := moved_to(module):
        parent, _, name = module.rpartition(".")
        raise Moved(f"there is no module {module} (no {name!r} in {parent}); it is now {now}")
    if _search_path(module) is not None:
        return
    parent, _, name = module.rpartition(".")
    while parent and _search_path(parent) is None:
        parent, _, name = parent.rpartition(".")
    siblings = [module for module in sys.modules if "." not in module]
    if parent:
        siblings = [found.name for found in pkgutil.iter_modules(list(_search_path(parent)))]
    near = did_you_mean(name, siblings, limit=1)
    within = f" (no {name!r} in {parent})" if parent else ""
    raise Unresolved(f"there is no module {module}{within}{near}")


_MOVED = {  # modules that recipes of older runs name, whose contents have another name now or are in another module
    "meshway.framework.partitioning.placed_model": "meshway.framework.partitioning.sharded_model",
    "meshway.launch.bench_seqio": "meshway.launch.bench.stages",
    "meshway.launch.data_stages": "meshway.launch.bench.stages",
    "meshway.launch.eval": "meshway.launch.evaluate",
    "meshway.launch.inspect": "meshway.launch.inspection",
    "meshway.models.layers.kernels.kernel_forms": "meshway.models.layers.forms",
    "meshway.models.layers.mixture.moe_forms": "meshway.models.layers.forms",
    "meshway.models.layers.linear": "meshway.models.layers.mlp",
    "meshway.models.layers.relative": "meshway.models.layers.positions",
}
_MOVED |= {
    f"meshway.models.{objective}": "meshway.models.objectives"
    for objective in ("classifier", "decoder_only", "encoder_decoder", "encoder_only")
}
_MOVED |= {
    f"meshway.launch.bench_{subject}": f"meshway.launch.bench.{subject}"
    for subject in ("attention", "data", "decode", "moe", "parallel", "routing")
}


def moved_to(module: str) -> str:
    """Returns where a module of ours is today, for a recipe of an older run; "" where it has not moved or its name does
    not tell. A file of its name in its own top folder is preferred to those in others."""
    if module in _MOVED or not module.startswith("meshway."):
        return _MOVED.get(module, "")
    root, (folder, *within) = Path(__file__).parents[2], module.split(".")[1:]
    if not within or (root / folder).joinpath(*within).with_suffix(".py").is_file():
        return ""
    for among in ([folder], ("framework", "models", "launch")):
        paths = [path for each in among for path in (root / each).rglob(f"{within[-1]}.py")]
        if len(paths) == 1:
            return ".".join(["meshway", *paths[0].relative_to(root).with_suffix("").parts])
    return ""


def _moved_modules(moved: Sequence[tuple[Import, Unresolved]]) -> list[str]:
    """Returns the problem of modules that have moved, one for all: the lines to write instead of the recipe's."""
    if len(moved) < 2:
        return [f"{statement.place}: {error}" for statement, error in moved]
    lines = [f"\n    {statement.place}: `{_now(statement)}`, not `{statement}`" for statement, _ in moved]
    return [f"{len(moved)} modules of meshway have moved since the recipe was written; write:{''.join(lines)}"]


def _now(statement: Import) -> Import:
    """Returns the import of a module where it is now, under the word by which the recipe knows it."""
    now = dataclasses.replace(statement, module=moved_to(statement.module))
    known = now.bound_name == statement.bound_name
    return now if known else dataclasses.replace(now, alias=statement.bound_name)


def import_module(module: str) -> Any:
    """Imports a module that a recipe names.

    Raises:
      Unresolved: there is none, or it needs one that is not installed.
    """
    if module in sys.modules:
        return sys.modules[module]
    require_module(module)
    try:
        if module.startswith("meshway."):
            return importlib.import_module(module)
        with terminal.stage(f"importing {module}"), seqio_adapter.dropped():
            return importlib.import_module(module)
    except ImportError as error:
        raise Unresolved(f"module {module} cannot be imported: {error}") from error


def find(target: Target, importing: bool) -> Any:
    """Returns the object that `target` names; None if its module is not imported and may not be.

    Raises:
      Unresolved: the module or the attribute does not exist.
    """
    if target.module == "gin":
        if len(target.path) == 1 and target.path[0] in _BUILTINS:
            return _BUILTINS[target.path[0]]
        raise Unresolved(f"gin has no {'.'.join(target.path)!r}{did_you_mean('.'.join(target.path), _BUILTINS)}")
    if not importing and target.module not in sys.modules:
        return None
    found = import_module(target.module)
    where = f"module {target.module}"
    for name in target.path:
        missing = object()
        inner = getattr(found, name, missing)
        if inner is missing:
            if inspect.ismodule(found) and _search_path(f"{found.__name__}.{name}") is not None:
                raise Unresolved(f"{where} does not import its {name!r}: import {found.__name__}.{name} itself")
            names = [n for n in dir(found) if not n.startswith("_")]
            raise Unresolved(f"{where} has no {name!r}{did_you_mean(name, names)}")
        found, where = inner, f"{where} {name}"
    return found


def key(target: Target) -> Any:
    """Returns what two spellings of one object share: its identity once its module is imported."""
    try:
        found = find(target, importing=False)
    except Unresolved:
        return target
    if found is None:
        return target
    if inspect.ismethod(found):  # a new object at each access
        return id(found.__self__), id(found.__func__)
    return id(found)


def is_decorated(target: Target) -> bool:
    """Says whether an imported object was configurable in its source: any code may call it configured."""
    try:
        found = find(target, importing=False)
        return found is not None and gin.get_configurable(found) is found
    except (Unresolved, ValueError, TypeError):
        return False


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a call accepts: all names, those without a default, whether any other name is taken too, those that may be
    given by position; and of the defaults those that are classes or functions, or hold some, and those that gin text
    can say as they are (numbers, text, None, and lists, tuples and dicts of these)."""

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_any: bool
    positional: tuple[str, ...] = ()
    references: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@functools.cache
def parameters(found: Callable[..., Any]) -> Parameters:
    """Returns the parameters of a function or of a class's constructor.

    A class is asked for `__init__` (or `__new__`): its metaclass may hide it behind `__call__(*args,
    **kwargs)`, as flax's does.
    """
    function, skipped = found, 0
    if inspect.isclass(found):
        makers = (base.__dict__.get(name) for base in found.__mro__ for name in ("__init__", "__new__"))
        function = next(maker for maker in makers if maker is not None)
        function, skipped = getattr(function, "__func__", function), 1
        if function in (object.__init__, object.__new__):
            return Parameters((), (), False)
    try:
        listed = list(inspect.signature(function).parameters.values())[skipped:]
    except (ValueError, TypeError):  # some built-in functions have no signature
        return Parameters((), (), True)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [parameter for parameter in listed if parameter.kind in kinds]
    defaults = {each.name: each.default for each in named if each.default is not inspect.Parameter.empty}
    return Parameters(
        tuple(parameter.name for parameter in named),
        tuple(parameter.name for parameter in named if parameter.default is inspect.Parameter.empty),
        any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in listed),
        tuple(parameter.name for parameter in listed if parameter.kind in kinds[:1] + _POSITIONAL_ONLY),
        _references(found, defaults),
        {name: default for name, default in defaults.items() if all(map(_is_plain, leaves(default)))},
    )


_POSITIONAL_ONLY = (inspect.Parameter.POSITIONAL_ONLY,)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _references(found: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults that are, or hold, classes or functions of the package of `found`, as references to them."""
    package = (getattr(found, "__module__", None) or "").partition(".")[0]

    def leaf(value: Any) -> Any:
        if not (inspect.isclass(value) or inspect.isfunction(value)) or value.__module__.partition(".")[0] != package:
            return value
        target = Target(value.__module__, tuple(value.__qualname__.split(".")))
        if "<" in value.__qualname__ or find(target, importing=False) is not value:
            return value
        return Reference("", ".".join([target.module.rpartition(".")[2], *target.path]), False, target)

    made = {name: map_leaves(leaf, default) for name, default in defaults.items()}
    return {name: value for name, value in made.items() if any(isinstance(each, Reference) for each in leaves(value))}


def reaches(value: Any, keys: Collection[Any]) -> bool:
    """Says whether a value refers to something among `keys` (`key`), by itself or through Python's defaults."""
    for each in leaves(value):
        if isinstance(each, Reference) and each.target:
            found = find(each.target, importing=False)
            if key(each.target) in keys:
                return True
            if found is not None and any(reaches(inner, keys) for inner in parameters(found).references.values()):
                return True
    return False


def gin_selector(target: Target) -> str:
    """Returns the name by which gin knows an object that is configurable in its source."""
    return gin.config._inverse_lookup(find(target, importing=False)).selector  # gin has no public way


def is_gin_constant(name: str) -> bool:
    """Says whether some imported module gave gin a constant of this name."""
    try:
        gin_constant(name)
    except Unresolved:
        return False
    return True


def gin_constant(name: str) -> Any:
    """Returns a constant that some imported module gave to gin (`gin.constant`).

    Raises:
      Unresolved: there is none.
    """
    try:
        return gin.query_parameter(name)
    except ValueError as error:
        raise Unresolved(f"no macro {name} is defined") from error
