"""Finds everything that is wrong with a recipe before anything is built, and reports it in one message."""

import contextlib
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from meshway.framework.errors import UserError, did_you_mean
from meshway.launch.invocation import MACROS, Invocation
from meshway.launch.recipe import configurables, t5x
from meshway.launch.recipe.configurables import ImportTable, Moved, Unresolved
from meshway.launch.recipe.files import GinFiles, Joined
from meshway.launch.recipe.reachability import Reach, Walk, binding_key, final, moments
from meshway.launch.recipe.text import REQUIRED, Binding, Import, Macro, Place, Reference, Target, leaves
from meshway.launch.verbs import VERBS, module_of


@dataclasses.dataclass(frozen=True)
class Program:
    """A recipe with its names linked to modules.

    Attributes:
      bindings: the run's own, in order.
      others: the defaults of the other verbs, which one recipe serves as well.
      package: the package of the verbs' modules.
      problems: what linking found.
    """

    imports: list[Import]
    bindings: list[Binding]
    others: list[Binding]
    package: str
    problems: list[str]

    def roots(self) -> list[Target]:
        """Returns what the modules of all verbs hold and some binding names."""
        targets = dict.fromkeys(binding.target for binding in [*self.others, *self.bindings] if binding.target)
        return [target for target in targets if target.module.startswith(f"{self.package}.")]

    def roots_of(self, invocation: Invocation) -> list[Target]:
        """Returns those of one command: of its subject's module, or the function that its subject names."""
        verb, subject = VERBS[invocation.verb], invocation.subject
        module = module_of(invocation.verb, subject).replace("meshway.launch", self.package, 1)
        if subject and not verb.is_room:
            return [Target(module, (subject,))]
        return [target for target in self.roots() if target.module == module]


def link(joined: Joined, files: GinFiles, invocation: Invocation, package: str) -> Program:
    """Links a joined recipe, and the defaults of the verbs it was not joined for."""
    table = ImportTable(joined.imports)
    others: list[Binding] = []
    for verb, path in files.runs().items():
        if verb != invocation.verb:
            statements = files.read(path)
            other = ImportTable(statement for statement in statements if isinstance(statement, Import))
            others += [other.link(statement) for statement in statements if isinstance(statement, Binding)]
    if _undefined_macros(
        joined.bindings, others, table
    ):  # constants, perhaps, that modules give to gin when they are imported
        for statement in joined.imports:
            with contextlib.suppress(Unresolved):  # said where something needs it
                configurables.import_module(statement.module)
    bindings = [table.link(binding) for binding in joined.bindings]
    directories = [binding for binding in bindings if binding.name == "MODEL_DIR"]
    if invocation.dry_run and directories and directories[-1].value == Macro(REQUIRED):
        place = Place("--dry_run")
        bindings.append(Binding("", "", "MODEL_DIR", None, place, is_default=True))  # writes nothing: needs none
    return Program(joined.imports, _linked(bindings), _linked(others), package, table.problems)


def _undefined_macros(bindings: Sequence[Binding], others: Sequence[Binding], table: ImportTable) -> set[str]:
    """Returns the names after % that are neither a macro of any verb's nor in a module that it imports. After `import
    mylab.tasks`, mylab.PEAK may be the package's or a constant that one of its modules gives to gin."""
    defined = {binding.parameter for binding in [*bindings, *others] if binding.is_macro} | {REQUIRED}
    named = {leaf.name for binding in bindings for leaf in leaves(binding.value) if isinstance(leaf, Macro)}
    modules = {word for word, statement in table.words.items() if statement.is_from or statement.alias}
    return {name for name in named - defined if name.partition(".")[0] not in modules}


def _linked(bindings: Iterable[Binding]) -> list[Binding]:
    return [binding for binding in bindings if binding.is_macro or binding.target]


def check(program: Program, invocation: Invocation, import_unreferenced: bool) -> tuple[Reach, Reach]:
    """Returns what the command's own roots reach and what the roots of all verbs reach.

    Raises:
      UserError: with every problem found.
    """
    problems = list(program.problems)
    if import_unreferenced:
        problems += _import_in_order(program)
    ours = Walk(final(program.bindings), importing=True).run(program.roots_of(invocation))
    every, unused = _unused(program, ours)
    places = {binding.place for binding in program.bindings}
    undefined = [text for text, place in {**every.undefined, **ours.undefined}.items() if place in places]
    problems += undefined
    for binding in program.bindings:
        problems += _binding_problems(binding, program)
    if not undefined and not program.problems:  # else what hangs on a broken name would be blamed as well
        known = {line.partition(": ")[0] for line in problems}
        problems += [_unused_message(binding, ours, every) for binding in unused if str(binding.place) not in known]
    problems += ours.lacking
    problems += required_problems(ours)
    raise_problems(problems)
    return ours, every


def raise_problems(problems: Sequence[str]) -> None:
    """Raises one UserError with all problems, if there are any."""
    listed = list(dict.fromkeys(problems))
    if len(listed) == 1:
        raise UserError(listed[0])
    if listed:
        raise UserError(f"{len(listed)} problems:" + "".join(f"\n  {text}" for text in listed))


def unreferenced(program: Program) -> list[Import]:
    """Returns the imports that no binding refers to and that may do something by themselves, as registering tasks does:
    of ours those of `tasks` alone."""
    named = {binding.target.module for binding in program.bindings if binding.target}
    for binding in program.bindings:
        for leaf in leaves(binding.value):
            if isinstance(leaf, (Reference, Macro)) and leaf.target:
                named.add(leaf.target.module)
    modules = {each.module for each in program.imports} - named
    ours = {each for each in modules if not is_foreign(each) and not each.startswith("meshway.tasks")}
    return [statement for statement in program.imports if statement.module not in named | ours]


def registering(program: Program) -> list[str]:
    """Returns the modules that may have registered tasks, in the recipe's order: those it imports that are imported,
    without those of ours that a binding refers to."""
    alone = {statement.module for statement in unreferenced(program)}
    modules = [each.module for each in program.imports if each.module in alone or is_foreign(each.module)]
    return [module for module in dict.fromkeys(modules) if module in sys.modules]


def _import_in_order(program: Program) -> list[str]:
    """Imports what may register tasks, as the recipe has it: what no binding refers to, and all that is not ours.

    What a binding refers to may be out of reach of this verb, and then need not be there: it is named if it is reached.
    """
    problems = []
    alone = {statement.module for statement in unreferenced(program)}
    for statement in program.imports:
        if statement.module in alone or is_foreign(statement.module):
            try:
                configurables.import_module(statement.module)
            except Moved:
                continue  # said when names were linked
            except Unresolved as error:
                problems += [f"{statement.place}: {error}"] if statement.module in alone else []
    return problems


def is_foreign(module: str) -> bool:
    """Whether a module is the user's, or anyone's but ours."""
    return module.partition(".")[0] != "meshway"


def _unused(program: Program, ours: Reach) -> tuple[Reach, list[Binding]]:
    """Returns what all verbs reach, and the bindings without effect at any moment after they were made."""
    everything = [*program.others, *program.bindings]
    roots = program.roots()

    def leftover(reach: Reach) -> list[Binding]:
        used = ours.used | reach.used | {"LAYOUT"}
        last = final(program.bindings)
        return [binding for binding in last if not binding.is_default and binding_key(binding) not in used]

    def judged(reach: Reach, packages: set[str]) -> list[Binding]:
        left = leftover(reach)
        return _visible(left, final(everything), packages) if left and packages else left

    every = Walk(final(everything), importing=False).run(roots)
    packages = _hidden_packages(every, program) if leftover(every) else set[str]()
    left = judged(every, packages)
    if not left:
        return every, []
    for binding in left:  # two spellings of one object are known as one when both modules are imported
        if binding.target:
            try:
                configurables.find(binding.target, importing=True)
            except Unresolved:
                continue  # reported with the other problems of bindings
    every = Walk(final(everything), importing=False).run(roots)
    left = judged(every, packages)
    positions = {id(binding): position for position, binding in enumerate(everything)}
    for moment, bindings in moments(everything):
        if not left:
            break
        if any(positions[id(binding)] < moment for binding in left):  # a walk takes milliseconds, moments are hundreds
            used = Walk(bindings, importing=False).run(roots).used
            left = [b for b in left if positions[id(b)] >= moment or binding_key(b) not in used]
    return every, _first(left, final(everything))


def _hidden_packages(every: Reach, program: Program) -> set[str]:
    """Returns the packages of what a recipe refers to and this verb does not import: Python's defaults there are not
    known, and may refer to anything of the same package."""
    ours = ("meshway.launch.", "meshway.framework.", f"{program.package}.")
    found = [target for target in every.targets if not target.module.startswith(ours)]
    return {_package(target) for target in found if _is_hidden(target)}


def _visible(unused: list[Binding], bindings: list[Binding], packages: set[str]) -> list[Binding]:
    """Returns the unused bindings without those of `packages`, and without what only these use: the verb that imports
    what the recipe refers to there judges them."""
    hidden = [each for each in unused if each.target and _package(each.target) in packages]
    theirs = {binding_key(binding) for binding in hidden}
    for binding in hidden:
        theirs |= Walk(bindings, importing=False).follow(binding).used
    return [binding for binding in unused if binding_key(binding) not in theirs]


def _package(target: Target) -> str:
    """Returns the package of a target: of ours, whose parts import each other one way only, `meshway.models` or the
    like."""
    whole, _, rest = target.module.partition(".")
    return whole if is_foreign(target.module) else f"{whole}.{rest.partition('.')[0]}"


def _is_hidden(target: Target) -> bool:
    try:
        return configurables.find(target, importing=False) is None
    except Unresolved:
        return False


def _first(unused: list[Binding], bindings: list[Binding]) -> list[Binding]:
    """Returns the unused bindings that no other unused one refers to: those to mend first."""
    hanging: set[Any] = set()
    for binding in unused:
        hanging |= Walk(bindings, importing=False).follow(binding).used - {binding_key(binding)}
    return [binding for binding in unused if binding_key(binding) not in hanging] or unused


def _binding_problems(binding: Binding, program: Program) -> list[str]:
    """Returns what is wrong with the left side of a binding whose module is imported."""
    if not binding.target:
        return []
    try:
        found = configurables.find(binding.target, importing=False)
    except Unresolved as error:
        return [f"{binding.where}: {error}"]
    if found is None:
        return []
    if inspect.ismodule(found):
        whole = {
            f"{binding.selector}.{name}.{binding.parameter}"
            for name, inner in vars(found).items()
            if callable(inner) and binding.parameter in configurables.parameters(inner).names
        }
        near = did_you_mean(binding.name, whole)
        return [f"{binding.where}: {binding.selector} is a module, not a class or function{near}"]
    if not callable(found):
        return [f"{binding.where}: {binding.selector} is not a class or function"]
    accepted = configurables.parameters(found)
    if accepted.takes_any or binding.parameter in accepted.names:
        return []
    near = did_you_mean(binding.parameter, accepted.names)
    return [f"{binding.where}: {binding.selector} has no parameter {binding.parameter!r}{near}"]


def _unused_message(binding: Binding, ours: Reach, every: Reach) -> str:
    used = ours.used | every.used
    if binding.is_macro:
        theirs = t5x.near(binding.name, binding.value)
        names = [name for name in used if isinstance(name, str)]
        near = f"; {theirs}" if theirs else did_you_mean(binding.name, names)
        return f"{binding.place}: nothing uses the macro {binding.name}{near}"
    assert binding.target is not None
    wanted = configurables.key(binding.target)
    if binding.scope and wanted in {configurables.key(target) for target in ours.targets | every.targets}:
        scopes = ours.opened | every.opened
        why = f"no reference opens the scope {binding.scope!r}{did_you_mean(binding.scope, scopes)}"
        if binding.scope in scopes:
            why = f"nothing refers to {binding.selector} in the scope {binding.scope!r}"
        return f"{binding.where} has no effect: {why}"
    return f"{binding.where} has no effect: nothing in use refers to @{binding.selector}; remove it, or refer to it"


def required_problems(reach: Reach) -> list[str]:
    """Returns one problem that lists all values marked %gin.REQUIRED, each with its flag."""
    if not reach.required:
        return []
    lines = []
    for name, place in reach.required.items():
        meaning = f"  {MACROS[name]}" if name in MACROS else ""
        lines.append(f"\n    --gin.{name}=...{meaning}  ({place})")
    return ["missing, give each in the recipe or by its flag:" + "".join(lines)]


def required_arguments(found: Any, bound: Iterable[str]) -> list[str]:
    """Returns the parameters of `found` that have no default and are not among `bound`."""
    given = set(bound)
    return [name for name in configurables.parameters(found).required if name not in given]
