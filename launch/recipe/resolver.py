"""Builds what a recipe names: a reference with parentheses becomes an object, one without becomes a factory.

No state of it belongs to the process: each recipe has a resolver of its own, and a factory remembers the one that it
came from, so that two recipes live beside each other. Only code that is configurable in its own source
(`@gin.configurable`) asks gin, which answers with the values of the recipe on whose behalf it is called.
"""

import contextlib
import contextvars
import copy
import functools
import inspect
import itertools
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gin

from meshway.framework.errors import UserError
from meshway.launch.recipe import configurables
from meshway.launch.recipe.reachability import Scope, applying_in
from meshway.launch.recipe.text import Binding, Macro, Reference, Target, map_leaves

_SINGLETON = Target("gin", ("singleton",))
_calling: contextvars.ContextVar["tuple[Resolver, Scope] | None"] = contextvars.ContextVar("calling", default=None)
_resolvers: "weakref.WeakSet[Resolver]" = weakref.WeakSet()
_numbers = itertools.count()


class ConstructionError(UserError):
    """A class or function lacks a value, or refuses one that the recipe gives it."""


class Factory:
    """A class or function with what a recipe binds to it. What the caller gives wins; attributes are its own.

    Args:
      resolver: of the recipe.
      target: the class or function.
      scope: the scope in which the recipe's values are looked up.
      fixed: whether the reference names that scope. If not, a call that the recipe has under way brings its own.
    """

    def __init__(self, resolver: "Resolver", target: Target, scope: Scope, fixed: bool = False):
        functools.update_wrapper(self, configurables.find(target, importing=True), updated=())
        self._resolver, self._target, self._scope, self._fixed = resolver, target, scope, fixed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        calling = _calling.get()
        scope = self._scope
        if not self._fixed and calling is not None and calling[0] is self._resolver:
            scope = calling[1]
        return self._resolver.call(self._target, scope, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":  # an instance that is being copied has nothing yet
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factory) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __deepcopy__(self, memo: dict) -> "Factory":
        return self

    def __repr__(self) -> str:
        return f"@{'/'.join([*self._scope, str(self._target)])}"

    def _identity(self) -> tuple[Any, ...]:
        return id(self._resolver), configurables.key(self._target), self._scope, self._fixed


class Resolver:
    """What the names of one recipe stand for.

    Args:
      bindings: linked, one of each thing, in the order in which they were written.
    """

    def __init__(self, bindings: Sequence[Binding]):
        self._order = list(bindings)
        self._macros = {binding.parameter: binding for binding in bindings if binding.is_macro}
        self._bound: dict[Any, list[Binding]] = {}
        self._methods: dict[Any, dict[str, Target]] = {}
        for binding in bindings:
            if binding.target:
                self._bound.setdefault(configurables.key(binding.target), []).append(binding)
                *owner, name = binding.target.path
                if owner:
                    of_owner = configurables.key(Target(binding.target.module, tuple(owner)))
                    self._methods.setdefault(of_owner, {})[name] = binding.target
        self._singletons: dict[Scope, Any] = {}
        self._verb: str | None = None  # whose arguments are being built
        self._gin_scope = f"recipe_{next(_numbers)}"
        _resolvers.add(self)

    @contextlib.contextmanager
    def building(self, verb: str) -> Iterator[None]:
        """While the arguments of a verb's function are built.

        Args:
          verb: its name for people.

        Raises:
          UserError: a class or function lacks a value, or refuses one (TypeError, ValueError).
        """
        self._tell_gin()
        self._verb = verb
        try:
            with self._in_scope(()):
                yield
        except ConstructionError:
            raise
        except (UserError, TypeError, ValueError) as error:
            raise UserError(str(error) if isinstance(error, UserError) else f"{verb}: {error}") from error
        finally:
            self._verb = None

    def bound(self, function: Target) -> list[str]:
        """Returns the parameters of a verb's function to which the recipe binds something."""
        return list(self._winners(function, ()))

    def argument(self, function: Target, name: str) -> Any:
        """Returns what the recipe binds to one parameter of a verb's function, built; within `building`."""
        return self._resolve(self._winners(function, ())[name].value, (), ())

    def call(self, target: Target, scope: Scope, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = {}) -> Any:
        """Calls a class or function with what the caller gives and, for the rest, with what the recipe binds.

        Raises:
          ConstructionError: an argument is missing; or, while the arguments of a verb are built, one is refused.
        """
        if target == _SINGLETON:
            return self._singleton(scope)
        found = configurables.find(target, importing=True)
        accepted = configurables.parameters(found)
        given = {*accepted.positional[: len(args)], *kwargs}
        winners = self._winners(target, scope)
        lacking = [name for name in accepted.required if name not in winners and name not in given]
        if lacking:
            name = self._written(target)
            wanted = ", ".join(f"{name}.{argument}" for argument in lacking)
            raise ConstructionError(f"{name} is called without arguments it needs; bind {wanted}")
        with self._in_scope(scope):
            values = {}
            if not configurables.is_decorated(target):  # else gin gives them
                values = self._values(winners, scope, given) | self._defaults(found, scope, {*winners, *given})
            try:
                return self._with_methods(found, target, scope)(*args, **(values | dict(kwargs)))
            except ConstructionError:
                raise
            except (UserError, TypeError, ValueError) as error:
                if self._verb is None:
                    raise
                raise ConstructionError(self._refusal(error, target, winners)) from error

    def _winners(self, target: Target, scope: Scope) -> dict[str, Binding]:
        """Returns parameter -> binding in force in `scope`."""
        applying = applying_in(self._bound.get(configurables.key(target), ()), scope)
        return {binding.parameter: binding for binding in applying}

    def _values(self, winners: Mapping[str, Binding], scope: Scope, given: Sequence[str] | set[str]) -> dict[str, Any]:
        return {name: self._resolve(each.value, scope, scope) for name, each in winners.items() if name not in given}

    def _resolve(self, value: Any, scope: Scope, factory_scope: Scope) -> Any:
        """Returns what a bound value stands for.

        Args:
          scope: in which references are called: a macro's value is, as in gin, called in the scope of its name.
          factory_scope: which factories remember: that of the parameter which takes them.
        """

        def leaf(each: Any) -> Any:
            if isinstance(each, Macro):
                if each.name in self._macros:
                    return self._resolve(self._macros[each.name].value, tuple(each.name.split("/")), factory_scope)
                if each.target is not None:
                    return configurables.find(each.target, importing=True)
                return configurables.gin_constant(each.name)
            if isinstance(each, Reference) and each.target is not None:
                fixed = tuple(each.scope.split("/")) if each.scope else ()
                if each.evaluate:
                    return self.call(each.target, fixed or scope)
                return Factory(self, each.target, fixed or factory_scope, bool(fixed))
            return copy.deepcopy(each)

        return map_leaves(leaf, value)

    def _defaults(self, found: Any, scope: Scope, known: set[str]) -> dict[str, Any]:
        """Returns the defaults of parameters that are classes or functions to which the recipe binds something."""
        references = configurables.parameters(found).references
        return {
            name: self._resolve(value, scope, scope)
            for name, value in references.items()
            if name not in known and configurables.reaches(value, {*self._bound, *self._methods})
        }

    def _with_methods(self, found: Any, target: Target, scope: Scope) -> Any:
        """Returns a class whose methods take what is bound to them; itself where nothing is."""
        bound = self._methods.get(configurables.key(target), {})
        methods = {name: method for name, method in bound.items() if inspect.isfunction(vars(found).get(name))}
        if not methods:
            return found

        def configured(method: Target) -> Any:
            @functools.wraps(configurables.find(method, importing=True))
            def call(*args: Any, **kwargs: Any) -> Any:
                return self.call(method, scope, args, kwargs)

            return call

        names = {name: configured(method) for name, method in methods.items()}
        return type(found)(found.__name__, (found,), {"__module__": found.__module__, **names})

    def _singleton(self, scope: Scope) -> Any:
        """Returns the object of `scope/gin.singleton`, made at the first call."""
        if scope not in self._singletons:
            constructor = self._winners(_SINGLETON, scope)["constructor"]
            self._singletons[scope] = self._resolve(constructor.value, scope, scope)()
        return self._singletons[scope]

    # Code that is configurable in its own source looks its values up in gin, by gin's scope: each recipe has one there.

    @contextlib.contextmanager
    def _in_scope(self, scope: Scope) -> Iterator[None]:
        token = _calling.set((self, scope))
        try:
            with gin.config_scope([self._gin_scope, *scope]):
                yield
        finally:
            _calling.reset(token)

    def _tell_gin(self) -> None:
        """Gives gin what the living recipes bind to such code; called by anyone else, it takes this recipe's."""
        gin.clear_config()
        for resolver in _resolvers:
            for binding in resolver._order:
                if binding.target and configurables.is_decorated(binding.target):
                    selector = configurables.gin_selector(binding.target)
                    scopes = [part for part in (resolver._gin_scope, binding.scope) if part]
                    late = _Late(weakref.proxy(resolver), binding)
                    gin.bind_parameter(("/".join(scopes), selector, binding.parameter), late)
                    if resolver is self:
                        gin.bind_parameter((binding.scope, selector, binding.parameter), _Late(self, binding))

    # What is said of a value that is refused.

    def _written(self, target: Target) -> str:
        """Returns a class or function as the recipe writes it."""
        wanted = configurables.key(target)
        if wanted in self._bound:
            return self._bound[wanted][0].selector
        for binding in self._order:
            found: list[str] = []

            def note(leaf: Any, found: list[str] = found) -> None:
                if isinstance(leaf, Reference) and leaf.target and configurables.key(leaf.target) == wanted:
                    found.append(leaf.selector)

            map_leaves(note, binding.value)
            if found:
                return found[0]
        return ".".join([target.module.rpartition(".")[2], *target.path])

    def _refusal(self, error: Exception, target: Target, winners: Mapping[str, Binding]) -> str:
        message = str(error).split("\n  In call to configurable")[0].split("\n  No values supplied by Gin")[0]
        words = re.sub(r"(?<!\w)'[^']*'(?!\w)", "", message)  # without values, which may be called as a parameter is
        blamed = [each for each in winners.values() if re.search(rf"\b{each.parameter}\b", words)]
        if isinstance(error, UserError):
            return message + self._origins(blamed)
        return f"{self._written(target)}: {message}{self._origins(blamed or list(winners.values()))}"

    def _origins(self, bindings: Sequence[Binding], limit: int = 4) -> str:
        """Returns where values come from, through macros; the last bound first, the likeliest to be wrong."""
        found = []
        for binding in bindings:
            origin = binding
            while isinstance(origin.value, Macro) and origin.value.name in self._macros:
                origin = self._macros[origin.value.name]
            found.append((self._order.index(origin), f"{binding.parameter} at {origin.place}"))
        shown = [text for _, text in sorted(found, reverse=True)[:limit]]
        return f" (bound: {', '.join(shown)})" if shown else ""


class _Late:
    """A bound value, for gin: gin copies what it gives to a call, and a copy of this is the value itself."""

    def __init__(self, resolver: Resolver, binding: Binding):
        self._resolver, self._binding = resolver, binding

    def __deepcopy__(self, memo: dict) -> Any:
        calling = _calling.get()
        scope = calling[1] if calling else tuple(filter(None, self._binding.scope.split("/")))
        return self._resolver._resolve(self._binding.value, scope, scope)
