"""Reads the recipe of a command, checks all of it, and builds what the verb runs."""

import contextlib
import dataclasses
import hashlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from meshway.framework import terminal
from meshway.launch.invocation import Invocation
from meshway.launch.recipe import configurables
from meshway.launch.recipe import files as recipe_files
from meshway.launch.recipe.checks import (
    Program,
    check,
    is_foreign,
    link,
    raise_problems,
    registering,
    required_arguments,
    required_problems,
    unreferenced,
)
from meshway.launch.recipe.reachability import Walk, binding_key, final
from meshway.launch.recipe.resolver import Factory, Resolver
from meshway.launch.recipe.text import (
    DYNAMIC_REGISTRATION,
    Binding,
    Import,
    Macro,
    Place,
    Reference,
    Target,
    format_binding,
    leaves,
    map_leaves,
)
from meshway.launch.recipe.values import read_values

LAUNCH = "meshway.launch"


def load(
    invocation: Invocation,
    *,
    import_unreferenced: bool = True,
    package: str = LAUNCH,
    shipped: Path = recipe_files.SHIPPED,
    shown: bool = True,
) -> "Recipe":
    """Reads and checks the recipe of a command; builds nothing yet.

    Only modules that the command's own functions reach are imported, and those that nothing refers to.

    Args:
      invocation: the command.
      import_unreferenced: import modules that the recipe imports and never refers to, and all of the user's, which may
        register tasks. A verb that reads no data leaves them out.
      package: the package of the verbs' modules. Their functions are called by us, not by reference.
      shipped: the folder of shipped gin files.
      shown: whether a command says that it reads the recipe and builds from it; of variants of one that it has read it
        does not.

    Raises:
      UserError: one message with everything that is wrong, each with its place.
    """
    named = terminal.stage(f"reading the recipe {' '.join(invocation.gin_files)}")
    with named if shown and invocation.gin_files else contextlib.nullcontext():  # some commands have one of their own
        recipe = _load(invocation, import_unreferenced, package, shipped)
    recipe.shown = shown
    return recipe


def _load(invocation: Invocation, import_unreferenced: bool, package: str, shipped: Path) -> "Recipe":
    files = recipe_files.GinFiles(invocation.search_paths, shipped)
    joined = recipe_files.join(invocation, files)
    program = link(joined, files, invocation, package)
    ours, every = check(program, invocation, import_unreferenced)
    program = dataclasses.replace(program, bindings=read_values(program.bindings, ours, files.shipped_names()))
    kept = [
        binding for binding in final(program.bindings) if binding_key(binding) in {*ours.used, *every.used, "LAYOUT"}
    ]
    defaults = list({**every.defaults, **ours.defaults}.values())
    return Recipe(program, _resolved(program, kept, defaults, joined.layout_is_shipped))


class Recipe:
    """A checked recipe.

    Attributes:
      resolved: the whole configuration as gin text, each value as it is in force; running from it gives the
        same configuration and the same text.
      shown: whether a command says that it builds from it.
    """

    def __init__(self, program: Program, resolved: str):
        self.resolved = resolved
        self.shown = True
        self._program = program

    @property
    def registering(self) -> list[str]:
        """The modules imported by the recipe that may have registered tasks, in its order."""
        return registering(self._program)

    @property
    def modules(self) -> list[str]:
        """The modules that the recipe imports and that do not come with meshway."""
        names = {statement.module for statement in self._program.imports}
        return sorted(name for name in names if name.partition(".")[0] not in ("meshway", "gin", "__gin__"))

    def macro(self, name: str) -> Any:
        """Returns the value of a macro, None where there is none or it is not a plain value."""
        values = [each.value for each in final(self._program.bindings) if each.is_macro and each.parameter == name]
        return None if not values or isinstance(values[-1], (Macro, Reference)) else values[-1]

    def literals(self, module: str, name: str) -> dict[str, Any]:
        """Returns the plain values that are bound to parameters of a class or function, in no scope."""
        last = final(self._program.bindings)
        macros = {each.parameter: each.value for each in last if each.is_macro}
        found = {}
        for binding in last:
            if binding.target == Target(module, (name,)) and not binding.scope:
                value = binding.value
                while isinstance(value, Macro) and value.target is None:
                    value = macros.get(value.name)
                if not any(isinstance(leaf, (Macro, Reference)) for leaf in leaves(value)):
                    found[binding.parameter] = value
        return found

    def would_use(self, root: str, module: str, name: str, parameter: str) -> bool:
        """Whether a binding of a class's or function's parameter would change what a verb's function is built of."""
        verb, _, function = root.rpartition(".")
        start = Target(f"{self._program.package}.{verb}", (function,))
        asked = Binding("", name, parameter, None, Place(name), Target(module, (name,)))
        bindings = final([*self._program.bindings, asked])
        return binding_key(asked) in Walk(bindings, importing=True).run([start]).used

    def build(self, root: str, given: Collection[str] = ()) -> dict[str, Any]:
        """Builds the keyword arguments of a verb's function that the recipe binds; the verb calls it itself.

        Args:
          root: `module.function` inside the package of verbs, as `train.train` or `bench.moe.measure`.
          given: names of the arguments that the caller passes itself.

        Returns:
          argument -> value, every reference evaluated.

        Raises:
          UserError: an argument is missing, or a constructor refuses its values (TypeError, ValueError).
        """
        with self.parts(root, given) as part:
            return part.rest()

    @contextlib.contextmanager
    def parts(self, root: str, given: Collection[str] = ()) -> Iterator["Parts"]:
        """Checks what a verb's function needs, and gives its arguments one by one; see `build`.

        with recipe.parts("train.train", given=["resolved"]) as part:
            program: TrainProgram = part("program")
            options = part.rest()
        """
        module, _, name = root.rpartition(".")
        target = Target(f"{self._program.package}.{module}", (name,))
        function = configurables.find(target, importing=True)
        bindings = final(self._program.bindings)
        reach = Walk(bindings, importing=True).run([target])
        bound = [b for b in bindings if binding_key(b) in reach.used]
        key = configurables.key(target)
        own = {b.parameter for b in bound if b.target and not b.scope and configurables.key(b.target) == key}
        lacking = [
            f"{root} needs {argument!r}: bind {root}.{argument}, or give --gin.{root}.{argument}=..."
            for argument in required_arguments(function, [*own, *given])
        ]
        raise_problems([*reach.undefined, *reach.lacking, *required_problems(reach), *lacking])
        resolver = Resolver(bound)
        named = terminal.stage(f"building what {module} needs") if self.shown else contextlib.nullcontext()
        with named, resolver.building(root):
            part = Parts(resolver, target, self.registering)
            yield part
            if left := part.left():
                raise AssertionError(f"the verb does not ask for what the recipe may bind to {root}: {', '.join(left)}")

    def fingerprint(self, root: str, without: Collection[str]) -> str:
        """Returns a hash of what a verb's function hangs on (`settings`): recipes that have the same one ask for the
        same."""
        lines = [f"{name} = {value}" for name, value in self.settings(root, without).items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

    def settings(self, root: str, without: Collection[str]) -> dict[str, str]:
        """Returns the bindings that a verb's function hangs on, as text: SCOPE/NAME to its value.

        Args:
          root: `module.function` inside the package of verbs, as `evaluate.evaluate`.
          without: arguments of it that do not matter. MODEL_DIR never does.
        """
        module, _, name = root.rpartition(".")
        target = Target(f"{self._program.package}.{module}", (name,))
        own = configurables.key(target)
        bindings = [
            binding
            for binding in final(self._program.bindings)
            if not (binding.target and configurables.key(binding.target) == own and binding.parameter in without)
        ]
        used = Walk(bindings, importing=True).run([target]).used - {"MODEL_DIR"}
        return dict(_plain(binding) for binding in bindings if binding_key(binding) in used)


class Parts:
    """The arguments of a verb's function as the recipe has them, each built when it is asked for.

    Args:
      resolver: of the recipe.
      function: of the verb.
      registering: modules that may have registered tasks, for data sources.
    """

    def __init__(self, resolver: Resolver, function: Target, registering: Sequence[str]):
        self._resolver, self._function, self._registering = resolver, function, registering
        self._left = resolver.bound(function)

    def __call__(self, name: str) -> Any:
        """Returns what the recipe binds to an argument, built; where it binds nothing, Python's default."""
        if name not in self._left:
            return inspect.signature(configurables.find(self._function, importing=True)).parameters[name].default
        self._left.remove(name)
        value = self._resolver.argument(self._function, name)
        # A data source may start processes, which need the tasks too.
        if hasattr(value, "import_first") and not isinstance(value, type | Factory):
            value.import_first(self._registering)
        return value

    def rest(self) -> dict[str, Any]:
        """Returns argument -> value of all that the recipe binds and nobody asked for."""
        return {name: self(name) for name in list(self._left)}

    def left(self) -> list[str]:
        """Returns the arguments that the recipe binds and nobody asked for."""
        return list(self._left)


def _plain(binding: Binding) -> tuple[str, str]:
    """Returns a binding's name and value as text that does not depend on how the recipe imports what it names."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Reference) and value.target:
            return Reference(value.scope, str(value.target), value.evaluate)
        if isinstance(value, Macro) and value.target:
            return Macro(str(value.target))
        return value

    name = f"{binding.target}.{binding.parameter}" if binding.target else binding.parameter
    return f"{binding.scope}/{name}", repr(map_leaves(leaf, binding.value))


def _resolved(program: Program, bindings: list[Binding], defaults: list[Binding], layout_is_shipped: bool) -> str:
    """Returns the bindings as a recipe: imports, macros, then the rest by what it configures. The defaults of Python on
    which they hang are written out, so that it stays what it is when those change."""
    words = _Words(program.imports)
    bindings = [*bindings, *map(words.spelled, defaults)]
    # Modules that only register may do so one for the next: they stay in their order.
    alone = dict.fromkeys(str(each) for each in unreferenced(program) if is_foreign(each.module))
    named = [text for text in words.imports() if text not in alone]
    lines = [f"from {DYNAMIC_REGISTRATION.replace('.', ' import ')}", *named, *alone, ""]
    macros = {binding.parameter: binding.value for binding in bindings if binding.is_macro}
    if "LAYOUT" in macros and not layout_is_shipped:
        macros["LAYOUT"] = None  # a user's file may be gone or changed by then: its bindings follow below
    lines += [format_binding(name, macros[name]) for name in sorted(macros)]
    group = None
    rest = [binding for binding in bindings if not binding.is_macro]
    for binding in sorted(rest, key=lambda binding: (binding.selector, binding.scope, binding.parameter)):
        if group != (binding.selector, binding.scope):
            lines.append("")
            group = (binding.selector, binding.scope)
        lines.append(format_binding(binding.name, binding.value))
    return "\n".join(lines) + "\n"


class _Words:
    """How a recipe writes modules: as its own imports do; those of Python's defaults by imports that are added."""

    def __init__(self, imports: list[Import]):
        self._imports = list(imports)
        self._taken = {statement.bound_name for statement in imports}
        self._words = {s.bound_module: s.bound_name for s in imports if s.is_from or s.alias}
        words = dict(self._words)
        for module in (s.module for s in imports if not (s.is_from or s.alias)):  # `bench.moe`, or by its full name
            package = max((each for each in words if module.startswith(f"{each}.")), key=len, default="")
            self._words.setdefault(module, words[package] + module.removeprefix(package) if package else module)

    def imports(self) -> list[str]:
        return sorted({str(statement) for statement in self._imports}, key=lambda text: text.split()[1:])

    def spelled(self, binding: Binding) -> Binding:
        """Returns a binding with selectors that can be read again; adds the imports that they need."""

        def leaf(value: Any) -> Any:
            if isinstance(value, Reference) and value.target:
                return dataclasses.replace(value, selector=self._selector(value.target))
            return value

        assert binding.target is not None
        selector = self._selector(binding.target)
        return dataclasses.replace(binding, selector=selector, value=map_leaves(leaf, binding.value))

    def _selector(self, target: Target) -> str:
        if target.module not in self._words:
            name = target.module.rpartition(".")[2]
            alias = None if name not in self._taken else target.module.replace(".", "__")
            self._imports.append(Import(target.module, alias, not alias, Place("a default")))
            self._words[target.module] = alias or name
            self._taken.add(alias or name)
        return ".".join([self._words[target.module], *target.path])
