"""Which bindings of a recipe can have an effect: those reached from roots through references and macros."""

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from meshway.framework.errors import did_you_mean
from meshway.launch.recipe import configurables
from meshway.launch.recipe.configurables import Unresolved
from meshway.launch.recipe.text import REQUIRED, Binding, Macro, Place, Reference, Target, leaves

Scope = tuple[str, ...]


def binding_key(binding: Binding) -> Any:
    """Returns what two bindings of one thing share, however each spells it."""
    if binding.is_macro:
        return binding.parameter
    assert binding.target is not None
    return configurables.key(binding.target), binding.scope, binding.parameter


def final(bindings: Iterable[Binding]) -> list[Binding]:
    """Returns the last binding of each thing, in the order of the last ones."""
    last: dict[Any, Binding] = {}
    for binding in bindings:
        name = binding_key(binding)
        last.pop(name, None)
        last[name] = binding
    return list(last.values())


def applying_in(bindings: Iterable[Binding], scope: Scope) -> list[Binding]:
    """Returns those of one target's bindings that apply in a scope, that of the innermost scope last: it wins."""
    prefixes = {"/".join(scope[:count]): count for count in range(len(scope) + 1)}
    return sorted((each for each in bindings if each.scope in prefixes), key=lambda each: prefixes[each.scope])


@dataclasses.dataclass
class Reach:
    """What a walk found.

    Attributes:
      used: keys of the bindings and macros that apply somewhere.
      targets: what is referenced, as spelled.
      scopes: the scopes in which something is called, reduced to the part that some binding names.
      opened: the same scopes as written.
      required: name -> (binding, the place that asks) of values marked %gin.REQUIRED.
      undefined: message -> place, of references to configurables, constants and macros that do not exist.
      lacking: messages on calls without all their arguments.
      defaults: Python's own defaults, as bindings: those that the bindings configure, and where modules are imported
        every one of a class or function of ours that gin text can say.
    """

    used: set[Any] = dataclasses.field(default_factory=set)
    targets: set[Target] = dataclasses.field(default_factory=set)
    scopes: set[Scope] = dataclasses.field(default_factory=set)
    opened: set[str] = dataclasses.field(default_factory=set)
    required: dict[str, Place] = dataclasses.field(default_factory=dict)
    undefined: dict[str, Place] = dataclasses.field(default_factory=dict)
    lacking: list[str] = dataclasses.field(default_factory=list)
    defaults: dict[Any, Binding] = dataclasses.field(default_factory=dict)


class Walk:
    """One walk over a configuration, by gin's rules of scopes.

    A reference with a scope is called in that scope alone, one without in the scope of its consumer, and
    a macro's value in the scope of the macro's name. A reference without parentheses is a factory, which code
    may call in any scope that is open by then.

    Args:
      bindings: one per thing (see `final`), linked to targets.
      importing: import the modules of what is reached, and check it.
    """

    def __init__(self, bindings: Sequence[Binding], importing: bool):
        self.reach = Reach()
        self._importing = importing
        self._macros = {binding.parameter: binding for binding in bindings if binding.is_macro}
        self._bindings = [binding for binding in bindings if binding.target is not None]
        self._known_index: tuple[int, dict[Any, list[Binding]], dict[Any, list[Target]]] = (0, {}, {})
        self._scoped = {tuple(binding.scope.split("/")) for binding in self._bindings if binding.scope}
        self._factories: list[tuple[Target, Place, Reference | None]] = []
        self._seen: set[Any] = set()
        self._seen_macros: set[str] = set()
        self._open: list[Any] = []  # macros and calls that wait for the value being walked

    def run(self, roots: Iterable[Target]) -> Reach:
        """Walks from `roots`, which the verbs call, and from what is made configurable in its own source."""
        start = Place("the command")
        for root in roots:
            self._visit(root, (), start, None)
        decorated = [b.target for b in self._bindings if b.target and configurables.is_decorated(b.target)]
        self._factories += [(target, start, None) for target in decorated]
        count = -1
        while count != len(self._seen):  # a factory's own references may open further scopes
            count = len(self._seen)
            for target, place, by in list(self._factories):
                for scope in [(), *sorted(self.reach.scopes)]:
                    self._visit(target, scope, place, by)
            for target in decorated:
                for scope in sorted(self._scoped):
                    self._visit(target, scope, start, None)
        return self.reach

    def follow(self, binding: Binding) -> Reach:
        """Walks from the value of one binding."""
        scope = binding.parameter if binding.is_macro else binding.scope
        self._walk(binding.value, tuple(scope.split("/")) if scope else (), binding)
        return self.reach

    def _visit(self, target: Target, scope: Scope, place: Place, by: Reference | None) -> None:
        self.reach.opened.add("/".join(scope))
        while scope and scope not in self._scoped:  # keep the part that matters to some binding
            scope = scope[:-1]
        try:
            found = configurables.find(target, self._importing)
        except Unresolved as error:
            self.reach.undefined[f"{place}: @{by.selector if by else target}: {error}"] = place
            return
        called = by is not None and by.evaluate
        visit = configurables.key(target), scope, called
        if called and visit in self._open:
            self.reach.undefined[f"{place}: {by} needs its own value"] = place
        if visit in self._seen:
            return
        self._seen.add(visit)
        waiting = self._open
        self._open = [*waiting, visit] if called else []
        self._visit_inside(target, scope, place, by, found)
        self._open = waiting

    def _visit_inside(self, target: Target, scope: Scope, place: Place, by: Reference | None, found: Any) -> None:
        self.reach.targets.add(target)
        self.reach.scopes.add(scope)
        winners = self._winners(target, scope)
        for binding in winners.values():
            self._walk(binding.value, scope, binding)
        if found is None:
            return
        if not callable(found):
            self.reach.undefined[f"{place}: @{by.selector if by else target} is {found!r}, not a class or function"] = (
                place
            )
            return
        if by is not None and by.evaluate:
            self._check_arguments(found, winners, place, by)
        for name, default in configurables.parameters(found).references.items():
            if name not in winners and configurables.reaches(default, self._index()[1]):
                self._walk(default, scope, self._note_default(target, name, default, place))
        if self._importing and by is not None and target.module.startswith("meshway."):
            for name, default in configurables.parameters(found).plain.items():
                if name not in winners:
                    self._note_default(target, name, default, place)
        if inspect.isclass(found):
            self._visit_methods(target, scope, place)

    def _index(self) -> tuple[dict[Any, list[Binding]], dict[Any, list[Target]]]:
        """Returns key -> the bindings of that thing, and key of it or of a class around it -> what they bind in it.

        An import may change keys.
        """
        modules, of_target, within = self._known_index
        if modules != len(sys.modules):
            of_target, within = {}, {}
            for binding in self._bindings:
                assert binding.target is not None
                for owner in _owners(binding.target):
                    within.setdefault(configurables.key(owner), []).append(binding.target)
                of_target.setdefault(configurables.key(binding.target), []).append(binding)
            self._known_index = len(sys.modules), of_target, within
        return of_target, within

    def _note_default(self, target: Target, name: str, default: Any, place: Place) -> Binding:
        binding = Binding("", str(target), name, default, place, target)
        self.reach.defaults[binding_key(binding)] = binding
        return binding

    def _winners(self, target: Target, scope: Scope) -> dict[str, Binding]:
        """Returns parameter -> binding in force in `scope`, and notes all that apply there as used."""
        of_target, _ = self._index()
        applying = applying_in(of_target.get(configurables.key(target), []), scope)
        self.reach.used.update(binding_key(binding) for binding in applying)
        return {binding.parameter: binding for binding in applying}

    def _visit_methods(self, target: Target, scope: Scope, place: Place) -> None:
        wanted = configurables.key(target)
        _, within = self._index()
        for method in within.get(wanted, []):
            owner = Target(method.module, method.path[:-1])
            if len(method.path) > 1 and configurables.key(owner) == wanted:
                self._visit(method, scope, place, None)

    def _walk(self, value: Any, scope: Scope, binding: Binding) -> None:
        for leaf in leaves(value):
            if isinstance(leaf, Macro):
                self._walk_macro(leaf, binding)
            elif isinstance(leaf, Reference) and leaf.target is not None:
                inner = tuple(leaf.scope.split("/")) if leaf.scope else scope
                self._visit(leaf.target, inner, binding.place, leaf)
                if not (leaf.evaluate or leaf.scope):
                    self._factories.append((leaf.target, binding.place, leaf))

    def _walk_macro(self, macro: Macro, binding: Binding) -> None:
        if macro.name == REQUIRED:
            self.reach.required.setdefault(binding.name, binding.place)
        elif macro.target is not None:
            try:
                configurables.find(macro.target, self._importing)
            except Unresolved as error:
                self.reach.undefined[f"{binding.place}: {macro}: {error}"] = binding.place
        elif macro.name in self._open:
            self.reach.undefined[f"{binding.where}: the macro {macro.name} needs its own value"] = binding.place
        elif macro.name not in self._seen_macros:
            self._seen_macros.add(macro.name)
            self.reach.used.add(macro.name)
            if macro.name in self._macros:
                definition = self._macros[macro.name]
                self._open.append(macro.name)
                self._walk(definition.value, tuple(macro.name.split("/")), definition)
                self._open.remove(macro.name)
            elif not configurables.is_gin_constant(macro.name):
                near = did_you_mean(macro.name, self._macros)
                text = f"{binding.where}: no macro {macro.name} is defined{near}"
                self.reach.undefined[text] = binding.place

    def _check_arguments(self, found: Any, winners: dict[str, Binding], place: Place, called: Reference) -> None:
        lacking = [name for name in configurables.parameters(found).required if name not in winners]
        if lacking:
            scope = f"{called.scope}/" if called.scope else ""
            flags = ", ".join(f"--gin.{scope}{called.selector}.{name}=..." for name in lacking)
            self.reach.lacking.append(f"{place}: {called} needs {_listed(lacking)}, which nothing binds: {flags}")


def _default(binding: Binding) -> Any:
    """Returns the class or function by which Python fills a parameter that is not bound; None for any other default."""
    try:
        found = configurables.find(binding.target, importing=False) if binding.target else None
    except Unresolved:
        return None
    return configurables.parameters(found).references.get(binding.parameter) if callable(found) else None


def _owners(target: Target) -> Iterator[Target]:
    """Yields what a binding configures, and the class of which that is a method."""
    for count in range(1, len(target.path) + 1):
        yield Target(target.module, target.path[:count])


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def moments(bindings: Sequence[Binding]) -> Iterator[tuple[int, list[Binding]]]:
    """Yields (position, the configuration before it) for each override of a value, or of a default, with references.

    A recipe may replace a part of what it includes; what the included file bound for the replaced part had
    its use then. Each configuration has, for each thing, its last binding before the override, or else its
    first after.
    """
    seen: dict[Any, Binding] = {}
    for position, binding in enumerate(bindings):
        name = binding_key(binding)
        earlier = seen[name].value if name in seen else _default(binding)
        seen[name] = binding
        if any(isinstance(leaf, (Reference, Macro)) for leaf in leaves(earlier)):
            before = final(bindings[:position])
            known = {binding_key(other) for other in before} | {name}
            later: dict[Any, Binding] = {}
            for other in bindings[position:]:
                if binding_key(other) not in known:
                    later.setdefault(binding_key(other), other)
            yield position, [*before, *later.values()]
