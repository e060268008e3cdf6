"""Recipe text as statements, each with the place it was written, and statements as text again."""

import copy
import dataclasses
import functools
import pprint
import re
import tokenize
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from meshway.framework.errors import EnvironmentFailure, UserError

try:
    from gin import config_parser
except ImportError as error:  # absent, or hidden by some folder named gin, which imports as an empty namespace
    raise EnvironmentFailure(
        "the gin library cannot be imported: install it with `pip install gin-config` (a folder named `gin` "
        "is not the library)"
    ) from error

REQUIRED = "gin.REQUIRED"
DYNAMIC_REGISTRATION = "__gin__.dynamic_registration"

_BINDING_NAME = re.compile(r"(?:[A-Za-z_]\w*/)*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
_WORD_OR_PATH = re.compile(r"(?:[A-Za-z_~/]|\.{1,2}/)[\w./~:+@=,-]*")
_NOT_WORDS = {"true": "True", "false": "False", "none": "None", "null": "None", "nan": None, "inf": None}


class Place(NamedTuple):
    """Where a statement was written: a file's line, or a flag (line 0)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def is_own_flag(self) -> bool:
        """Whether a flag with a name of its own said it, as `--task`, and no `--gin.NAME`."""
        return not self.line and self.file.startswith("--") and not self.file.startswith("--gin.")


class Target(NamedTuple):
    """A module and the attribute path inside it that a selector names, without importing anything."""

    module: str
    path: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join([self.module, *self.path])


@dataclasses.dataclass(frozen=True, repr=False)
class Reference:
    """`@scope/selector`, with `()` when evaluated. `target` is set once imports are known."""

    scope: str
    selector: str
    evaluate: bool
    target: Target | None = None

    def __repr__(self) -> str:
        return f"@{self.scope}/{self.selector}".replace("@/", "@") + ("()" if self.evaluate else "")


@dataclasses.dataclass(frozen=True, repr=False)
class Macro:
    """`%NAME`; `target` is set when the name is a module's constant (`%module.NAME`)."""

    name: str
    target: Target | None = None

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Import:
    module: str
    alias: str | None
    is_from: bool
    place: Place

    @property
    def bound_name(self) -> str:
        """The first word of the selectors this import serves."""
        return self.alias or (self.module.rpartition(".")[2] if self.is_from else self.module.partition(".")[0])

    @property
    def bound_module(self) -> str:
        """The module which that word stands for."""
        return self.module if self.alias or self.is_from else self.bound_name

    def __str__(self) -> str:
        parent, _, name = self.module.rpartition(".")
        text = f"from {parent} import {name}" if self.is_from else f"import {self.module}"
        return f"{text} as {self.alias}" if self.alias else text


@dataclasses.dataclass(frozen=True, eq=False)
class Include:
    file: str
    place: Place


@dataclasses.dataclass(frozen=True, eq=False)
class Binding:
    """`scope/selector.parameter = value`, or `parameter = value` for a macro (whose selector is empty)."""

    scope: str
    selector: str
    parameter: str
    value: Any
    place: Place
    target: Target | None = None
    is_default: bool = False  # offered by the verb's own file: nothing has to use it

    @property
    def is_macro(self) -> bool:
        return not self.selector

    @property
    def name(self) -> str:
        """The left side, as the file and the command line spell it."""
        if self.is_macro:
            return self.parameter
        return f"{self.scope}/{self.selector}.{self.parameter}".lstrip("/")

    @property
    def where(self) -> str:
        """Place and name, for errors; a flag contains its own name."""
        return f"{self.place}: {self.name}" if self.place.line else str(self.place)

    @property
    def said(self) -> str:
        """Place, name and value, for errors; of a flag with a name of its own as it was written. Of long values the
        beginning: the message says the rest."""
        value = str(self.value) if self.place.is_own_flag else repr(self.value)
        shown = value if len(value) <= _LONGEST_SAID else f"{value[:_LONGEST_BEGINNING]}..."
        return f"{self.place}={shown}" if self.place.is_own_flag else f"{self.place}: {self.name} = {shown}"


Statement = Import | Include | Binding
_LONGEST_SAID, _LONGEST_BEGINNING = 200, 40  # characters of a value, of its beginning


class _Values(config_parser.ParserDelegate):
    """Makes the parser return references as data: nothing is imported while reading."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(REQUIRED if macro_name == "REQUIRED" else macro_name)


def parse(text: str, file: str) -> list[Statement]:
    """Reads gin text.

    Args:
      text: the whole text of a file.
      file: its name for people.

    Raises:
      UserError: a statement does not parse; the message has its place.
    """
    return [_of_its_own(statement) for statement in _parse(text, file)]


def _of_its_own(statement: Statement) -> Statement:
    """Returns a copy that shares no list or mapping, which who takes it may change."""
    if isinstance(statement, Binding) and isinstance(statement.value, (list, tuple, dict)):
        return dataclasses.replace(statement, value=copy.deepcopy(statement.value))
    return dataclasses.replace(statement)


@functools.cache  # a process that loads several recipes meets the shipped files again and again
def _parse(text: str, file: str) -> list[Statement]:
    statements: list[Statement] = []
    try:
        for parsed in config_parser.ConfigParser(text, _Values()):
            statement = _statement(parsed, file)
            if statement is not None:
                statements.append(statement)
    except (SyntaxError, tokenize.TokenError) as error:
        raise UserError(_syntax_message(error, text, file)) from error
    return statements


def _statement(parsed: Any, file: str) -> Statement | None:
    place = Place(file, parsed.location.line_num)
    if isinstance(parsed, config_parser.ImportStatement):
        if parsed.module == DYNAMIC_REGISTRATION:
            return None
        return Import(parsed.module, parsed.alias, parsed.is_from, place)
    if isinstance(parsed, config_parser.IncludeStatement):
        return Include(parsed.filename, place)
    if isinstance(parsed, config_parser.BlockDeclaration):
        return None  # its bindings follow, each a statement
    if parsed.arg_name:
        return Binding(parsed.scope, parsed.selector, parsed.arg_name, parsed.value, place)
    name = f"{parsed.scope}/{parsed.selector}".lstrip("/")
    return Binding("", "", name, parsed.value, place)


def _syntax_message(error: Exception, text: str, file: str) -> str:
    if isinstance(error, SyntaxError):
        line, reason = error.lineno or 1, str(error.msg)
    else:
        reason, (line, _) = error.args
    lines = text.split("\n")
    shown = lines[line - 1].strip() if 0 < line <= len(lines) else ""
    word = re.search(r"Failed to parse token '(\w+)'", reason)
    if word:
        name = word.group(1)
        reason = f"{name} is not a value: write '{name}' for text, %{name} for a macro, @{name} for a reference"
    else:
        reason = reason.splitlines()[0].rstrip(".")
    return f"{Place(file, line)}: cannot read `{shown}`: {reason}"


def parse_flag(flag: str) -> Binding:
    """Reads `NAME=VALUE` as written after `--gin.`.

    A value that is not a gin value but a bare word or path (`fsdp`, `/tmp/x`, `gs://bucket/run`) is text.

    Raises:
      UserError: the name or the value cannot be read.
    """
    name, _, value = flag.partition("=")
    value = value.strip()
    if not _BINDING_NAME.fullmatch(name):
        raise UserError(f"--gin.{flag}: {name!r} is not the name of a macro or binding; write --gin.NAME=VALUE")
    place = Place(f"--gin.{name}")
    try:
        statements = parse(f"{name} = {value}", place.file)
    except UserError as error:
        if value.lower() in _NOT_WORDS:
            right = _NOT_WORDS[value.lower()]
            hint = f"write {right}" if right else "quote it if it is text"
            raise UserError(f"--gin.{name}: {value} is not a gin value: {hint}") from error
        if not _WORD_OR_PATH.fullmatch(value):
            raise UserError(
                f"--gin.{name}: cannot read the value `{value}`; it must be a Python literal, @reference, "
                f"%MACRO, or a word or path (quote other text: --gin.{name}='\"...\"')"
            ) from error
        statements = parse(f"{name} = {value!r}", place.file)
    if len(statements) != 1 or not isinstance(statements[0], Binding):
        raise UserError(f"--gin.{name}: `{value}` is more than one value")
    return dataclasses.replace(statements[0], place=place)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Returns `value` with `function` applied to what its lists, tuples and dicts hold; a NamedTuple is held whole."""
    if type(value) in (list, tuple):
        return type(value)(map_leaves(function, item) for item in value)
    if isinstance(value, dict):
        return {map_leaves(function, key): map_leaves(function, item) for key, item in value.items()}
    return function(value)


def leaves(value: Any) -> Iterator[Any]:
    """Yields what the lists, tuples and dicts of `value` hold, in order."""
    if type(value) in (list, tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    else:
        yield value


def format_binding(name: str, value: Any, width: int = 100) -> str:
    """Returns `name = value` as gin text; long values take several lines."""
    text = pprint.pformat(value, width=width - 4, sort_dicts=False)
    if "\n" not in text and len(name) + len(text) + 3 <= width:
        return f"{name} = {text}"
    return f"{name} = \\\n    " + text.replace("\n", "\n    ")
