"""Reads the recipe of a command, checks all of it, and builds what the verb runs."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import gin

from meshway.framework import stages
from meshway.framework.errors import UserError
from meshway.launch import configurables, recipe_files
from meshway.launch.checks import (
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
from meshway.launch.invocation import Invocation
from meshway.launch.reachability import Walk, binding_key, final
from meshway.launch.recipe_text import (
    DYNAMIC_REGISTRATION,
    Binding,
    Macro,
    Reference,
    Target,
    format_binding,
    leaves,
    map_leaves,
)
from meshway.launch.recipe_values import read_values

LAUNCH = "meshway.launch"
_CALL = re.compile(r"\n  In call to configurable '([^']+)' \((.*?)\)(?: in scope '([^']*)')?(?=\n|$)")
_MISSING_ARGUMENTS = re.compile(r"(\w+)(?:\.__\w+__)?\(\) missing \d+ required .*?arguments?: (.*)")


def load(
    invocation: Invocation,
    *,
    import_unreferenced: bool = True,
    package: str = LAUNCH,
    shipped: Path = recipe_files.SHIPPED,
) -> "Recipe":
    """Reads and checks the recipe of a command; builds nothing yet.

    Only modules that the command's own functions reach are imported, and those that nothing refers to.

    Args:
      invocation: the command.
      import_unreferenced: import modules that the recipe imports and never refers to, and all of the user's, which may
        register tasks. A verb that reads no data leaves them out.
      package: the package of the verbs' modules. Their functions are called by us, not by reference.
      shipped: the folder of shipped gin files.

    Raises:
      UserError: one message with everything that is wrong, each with its place.
    """
    named = stages.stage(f"reading the recipe {' '.join(invocation.gin_files)}")
    with named if invocation.gin_files else contextlib.nullcontext():  # some commands have one of their own
        return _load(invocation, import_unreferenced, package, shipped)


def _load(invocation: Invocation, import_unreferenced: bool, package: str, shipped: Path) -> "Recipe":
    files = recipe_files.GinFiles(invocation.search_paths, shipped)
    joined = recipe_files.join(invocation, files)
    program = link(joined, files, invocation, package)
    ours, every = check(program, invocation, import_unreferenced)
    program = dataclasses.replace(program, bindings=read_values(program.bindings, ours, files.shipped_names()))
    kept = [
        binding for binding in final(program.bindings) if binding_key(binding) in {*ours.used, *every.used, "LAYOUT"}
    ]
    return Recipe(program, _resolved(program, kept, joined.layout_is_shipped))


class Recipe:
    """A checked recipe.

    gin's configuration belongs to the process: factories that `build` returned read it when called. Build the
    arguments of one recipe, run it, then turn to another.

    Attributes:
      resolved: the whole configuration as gin text, each value as it is in force; running from it gives the
        same configuration and the same text.
    """

    def __init__(self, program: Program, resolved: str):
        self.resolved = resolved
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
        """Returns the value of a macro, None where there is none or it is no plain value."""
        values = [each.value for each in final(self._program.bindings) if each.is_macro and each.parameter == name]
        return None if not values or isinstance(values[-1], (Macro, Reference)) else values[-1]

    def build(self, root: str, given: Collection[str] = ()) -> dict[str, Any]:
        """Builds the keyword arguments of a verb's function; the verb calls it itself.

        Args:
          root: `module.function` inside the package of verbs, as `train.train`.
          given: names of the arguments that the caller passes itself.

        Returns:
          argument -> value, every reference evaluated.

        Raises:
          UserError: an argument is missing, or a constructor refuses its values (TypeError, ValueError).
        """
        module, _, name = root.partition(".")
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
        self._install(bound)
        with self._user_errors(root), stages.stage(f"building what {module} needs"):
            arguments: dict[str, Any] = gin.get_bindings(function) if own else {}
        for value in arguments.values():
            # A data source may start processes, which need the tasks too.
            if hasattr(value, "import_first") and not isinstance(value, type):
                value.import_first(self.registering)
        return arguments

    def fingerprint(self, root: str, without: Collection[str]) -> str:
        """Returns a hash of what a verb's function hangs on (`settings`): recipes that have the same one ask for the
        same."""
        lines = [f"{name} = {value}" for name, value in self.settings(root, without).items()]
        return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]

    def settings(self, root: str, without: Collection[str]) -> dict[str, str]:
        """Returns the bindings that a verb's function hangs on, as text: SCOPE/NAME to its value.

        Args:
          root: `module.function` inside the package of verbs, as `eval.evaluate`.
          without: arguments of it that do not matter. MODEL_DIR never does.
        """
        module, _, name = root.partition(".")
        target = Target(f"{self._program.package}.{module}", (name,))
        own = configurables.key(target)
        bindings = [
            binding
            for binding in final(self._program.bindings)
            if not (binding.target and configurables.key(binding.target) == own and binding.parameter in without)
        ]
        used = Walk(bindings, importing=True).run([target]).used - {"MODEL_DIR"}
        return dict(_plain(binding) for binding in bindings if binding_key(binding) in used)

    def _install(self, bindings: list[Binding]) -> None:
        """Gives gin these bindings and nothing else."""
        lines, written = _gin_lines(bindings)
        gin.clear_config()
        gin.enter_interactive_mode()  # a reloaded module may register its functions again
        try:
            gin.parse_config(lines)
        except (SyntaxError, ValueError, TypeError, NameError) as error:
            raise UserError(_gin_message(error, written)) from error
        finally:
            gin.exit_interactive_mode()

    @contextlib.contextmanager
    def _user_errors(self, root: str) -> Iterator[None]:
        """Turns what constructors say about bad values into errors of the user, naming the constructor."""
        try:
            yield
        except (UserError, TypeError, ValueError) as error:
            raise UserError(self._explain(error, root)) from error

    def _explain(self, error: Exception, root: str) -> str:
        """Returns one message from an exception to which gin has appended whom it called."""
        text = str(error)
        message = re.split(r"\n  (?:In call to configurable|No values supplied by Gin)", text)[0]
        call = _CALL.search(text)
        if call is None:
            return message if isinstance(error, UserError) else f"{root}: {message}"
        bindings = final(self._program.bindings)
        bound = [binding for binding in bindings if _is_shown(binding.target, call.group(2))]
        named = [(binding.selector, binding.target) for binding in bindings]
        for binding in bindings:
            references = (leaf for leaf in leaves(binding.value) if isinstance(leaf, Reference))
            named += [(leaf.selector, leaf.target) for leaf in references]
        names = [selector for selector, target in named if _is_shown(target, call.group(2))]
        name = next(iter(names), call.group(1))
        missing = _MISSING_ARGUMENTS.search(message) if isinstance(error, TypeError) else None
        if missing and missing.group(1) == call.group(1):
            lacking = ", ".join(f"{name}.{argument}" for argument in re.findall(r"'(\w+)'", missing.group(2)))
            return f"{name} is called without arguments it needs; bind {lacking}"
        blamed = [binding for binding in bound if re.search(rf"\b{binding.parameter}\b", message)]
        if isinstance(error, UserError):
            return message + self._origins(blamed)
        return f"{name}: {message}{self._origins(blamed or bound)}"

    def _origins(self, bindings: list[Binding], limit: int = 4) -> str:
        """Returns where values come from, through macros; the last bound first, the likeliest to be wrong."""
        order = final(self._program.bindings)
        macros = {binding.parameter: binding for binding in order if binding.is_macro}
        found = []
        for binding in bindings:
            origin = binding
            while isinstance(origin.value, Macro) and origin.value.name in macros:
                origin = macros[origin.value.name]
            found.append((order.index(origin), f"{binding.parameter} at {origin.place}"))
        shown = [text for _, text in sorted(found, reverse=True)[:limit]]
        return f" (bound: {', '.join(shown)})" if shown else ""


def _is_shown(target: Target | None, shown: str) -> bool:
    """Says whether gin's message shows the object that `target` names."""
    return target is not None and str(configurables.find(target, importing=False)) == shown


def _gin_lines(bindings: list[Binding]) -> tuple[list[str], dict[int, Binding]]:
    """Returns gin text with each module under a name of its own, and line number -> the binding there.

    gin knows what it configures by the name of its import, for the whole process: two recipes may use one
    short name for two modules.
    """
    modules: set[str] = set()

    def selector(target: Target) -> str:
        if target.module == "gin":
            return str(target)
        modules.add(target.module)
        return ".".join([_alias(target.module), *target.path])

    def leaf(value: Any) -> Any:
        if isinstance(value, Reference) and value.target:
            return Reference(value.scope, selector(value.target), value.evaluate)
        if isinstance(value, Macro) and value.target:
            return Macro(_constant(configurables.find(value.target, importing=True)))
        return value

    body = []
    for binding in bindings:
        name = binding.parameter
        if binding.target:
            scope = f"{binding.scope}/" if binding.scope else ""
            name = f"{scope}{selector(binding.target)}.{binding.parameter}"
        body.append(f"{name} = {map_leaves(leaf, binding.value)!r}")
    imports = [f"import {module} as {_alias(module)}" for module in sorted(modules)]
    head = ["from __gin__ import dynamic_registration", *imports]
    return [*head, *body], dict(enumerate(bindings, len(head) + 1))


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


def _alias(module: str) -> str:
    return module.replace(".", "__")


def _constant(value: Any) -> str:
    """Returns the name under which gin knows a module's constant."""
    name = f"constant_{id(value)}"  # gin keeps the value alive, so the id stays its own
    with contextlib.suppress(ValueError):  # known already
        gin.constant(name, value)
    return name


def _gin_message(error: Exception, written: dict[int, Binding]) -> str:
    line = re.search(r"line (\d+)", str(error))
    number = error.lineno if isinstance(error, SyntaxError) else int(line.group(1)) if line else 0
    message = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()[0]
    if number in written:
        binding = written[number]
        return f"{binding.where}: {message}"
    return f"the recipe cannot be configured: {message}"


def _resolved(program: Program, bindings: list[Binding], layout_is_shipped: bool) -> str:
    """Returns the bindings as a recipe: imports, macros, then the rest by what it configures."""
    # Modules that only register may do so one for the next: they stay in their order.
    alone = dict.fromkeys(str(each) for each in unreferenced(program) if is_foreign(each.module))
    named = {str(statement) for statement in program.imports}.difference(alone)
    imports = [*sorted(named, key=lambda text: text.split()[1:]), *alone]
    lines = [f"from {DYNAMIC_REGISTRATION.replace('.', ' import ')}", *imports, ""]
    macros = {binding.parameter: binding.value for binding in bindings if binding.is_macro}
    if "LAYOUT" in macros and not layout_is_shipped:
        macros["LAYOUT"] = None  # a user's file may be gone or changed by then: its bindings stand below
    lines += [format_binding(name, macros[name]) for name in sorted(macros)]
    group = None
    rest = [binding for binding in bindings if not binding.is_macro]
    for binding in sorted(rest, key=lambda binding: (binding.selector, binding.scope, binding.parameter)):
        if group != (binding.selector, binding.scope):
            lines.append("")
            group = (binding.selector, binding.scope)
        lines.append(format_binding(binding.name, binding.value))
    return "\n".join(lines) + "\n"
