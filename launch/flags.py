"""Flags of the command line, declared as fields of dataclasses: a field gives the parser, the help, and its value.

    @dataclasses.dataclass(frozen=True)
    class Slurm:
        nodes: int = flag("how many nodes", "N")                   # required: it has no default
        spot: bool = flag("use spot capacity", default=False)

    @dataclasses.dataclass(frozen=True)
    class Cache:
        workers: int | None = binds("cache.cache.workers", "processes (default: one a core)", "N")

The second is short for a gin binding: `--workers=4` for `--gin.cache.cache.workers=4`. No gin and no JAX here: `--help`
must be quick.
"""

import argparse
import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from meshway.framework.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      help: what it is for.
      value: what the help calls the value; "" for a flag without one.
      least: the least whole number that means something.
      reads: what reads a value that is another number than a whole one.
      binding: the gin binding that it is short for; "" for none.
      name: as `--nodes`.
      field: of the dataclass.
      kind: the field's annotation: what the value is.
      is_required: whether it has no default.
    """

    help: str
    value: str = ""
    least: int = 1
    reads: Callable[[str], float] | None = None
    binding: str = ""
    name: str = ""
    field: str = ""
    kind: Any = bool
    is_required: bool = False

    @property
    def usage(self) -> str:
        """How it is written: `--nodes=N`."""
        return f"{self.name}={self.value}" if self.value else self.name

    def bound(self, value: Any) -> str:
        """Returns the binding for a value of the field."""
        return f"{self.binding}={list(value) if isinstance(value, tuple) else value!r}"

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        """Gives the flag to a parser, or to a group of one; left out, it leaves no value."""
        takes: dict[str, Any] = {"action": "store_true"}
        if self.value:
            takes = {"metavar": self.value, "type": self._reader(), "action": _Once}
        if typing.get_origin(self.kind) is tuple:
            takes["action"] = "append"
        parser.add_argument(self.name, dest=self.field, default=argparse.SUPPRESS, help=self.help, **takes)

    def _reader(self) -> Callable[[str], Any]:
        if self.kind is int:
            return positive_int if self.least else non_negative_int
        if typing.get_origin(self.kind) is typing.Literal:
            return functools.partial(one_of, typing.get_args(self.kind))
        several = typing.get_origin(self.kind) is tuple  # texts, of which one may be empty: whoever takes them checks
        return self.reads or (str if several else some_text)


class _Once(argparse.Action):
    """Takes one value: another one for the same flag would be lost."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, values)
        if before != values:
            parser.error(f"{option} takes one value, and is given two: {before} and {values}")
        setattr(namespace, self.dest, values)


def flag(
    help: str,
    value: str = "",
    default: Any = dataclasses.MISSING,
    least: int = 1,
    name: str = "",
    reads: Callable[[str], float] | None = None,
) -> Any:
    """Returns a dataclass field that is also a flag; for the arguments see `Flag`.

    Args:
      default: the value where the flag is left out; a field without a default must be given.
      name: where the field is not called like the flag.
    """
    return dataclasses.field(default=default, metadata={"flag": Flag(help, value, least, reads, name=name)})


def binds(
    binding: str,
    help: str,
    value: str = "",
    least: int = 1,
    reads: Callable[[str], float] | None = None,
    name: str = "",
    required: bool = False,
) -> Any:
    """Returns a dataclass field that is also a flag and short for a gin binding; for the arguments see `Flag`.

    Left out it is None, or False where it takes no value, and binds nothing.
    """
    default = dataclasses.MISSING if required else None if value else False
    return dataclasses.field(default=default, metadata={"flag": Flag(help, value, least, reads, binding, name)})


@functools.cache
def flags_of(kind: type) -> tuple[Flag, ...]:
    """Returns the flags of a dataclass: its own in the order of its fields, then those that it inherits; fields made
    otherwise are left out."""
    hints, own = typing.get_type_hints(kind), vars(kind).get("__annotations__", {})
    return tuple(
        dataclasses.replace(
            found,
            name=found.name or f"--{field.name}",
            field=field.name,
            kind=_without_none(hints[field.name]),
            is_required=field.default is dataclasses.MISSING,
        )
        for field in sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)
        if (found := field.metadata.get("flag"))
    )


def _without_none(hint: Any) -> Any:
    """Returns `X` for `X | None`."""
    kinds = [each for each in typing.get_args(hint) if each is not type(None)]
    return kinds[0] if type(None) in typing.get_args(hint) and len(kinds) == 1 else hint


def add_flags(parser: argparse._ActionsContainer, flags: Iterable[Flag]) -> None:
    """Gives flags to a parser, or to a group of one."""
    for each in flags:
        each.add_to(parser)


def given(flags: Iterable[Flag], options: argparse.Namespace, command: str) -> dict[str, Any]:
    """Returns field -> value of the flags that a command line gave.

    Raises:
      UserError: one that is required is missing.
    """
    values = vars(options)
    found = {}
    for each in flags:
        if each.field in values:
            value = values[each.field]
            found[each.field] = tuple(value) if isinstance(value, list) else value
        elif each.is_required:
            raise UserError(f"{command} needs {each.usage}: {each.help}")
    return found


def refuse_unknown(name: str, command: str, own: Iterable[Flag], others: Mapping[str, Iterable[Flag]]) -> NoReturn:
    """Raises UserError for a flag that a command does not have: whose it is, or which one may be meant.

    Args:
      name: as it was typed, `--nodes`.
      command: which does not have it.
      own: the flags it has.
      others: those of other commands, by command.
    """
    owners = [other for other, flags in others.items() if name in {flag.name for flag in flags}]
    if owners:
        listed = " and ".join(f"`{other}`" for other in owners)
        raise UserError(f"{name} is a flag of {listed}, not of `{command}`")
    foreign = {flag.name for flags in others.values() for flag in flags}
    near = did_you_mean(name, [flag.name for flag in own], limit=1) or did_you_mean(name, foreign, limit=1)
    raise UserError(f"{command}: unknown flag {name}{near}")


def sentence(help: str) -> str:
    """Returns a line of a list as a sentence."""
    return f"{help[0].upper()}{help[1:]}."


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a user's errors, and which takes no abbreviated flags."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"formatter_class": _help_formatter, "allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def positive_int(text: str) -> int:
    """Returns a whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Returns a whole number of at least 0, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def some_text(text: str) -> str:
    """Returns a text that is not empty, as the type of an argument."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a text")
    return text


def one_of(choices: Sequence[str], text: str) -> str:
    """Returns one of several words, as the type of an argument."""
    if text not in choices:
        near = did_you_mean(text, choices)
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{near}")
    return text


def not_negative(text: str) -> float:
    """Returns a finite number of at least 0, as the type of an argument."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


def above_zero(text: str) -> float:
    """Returns a finite number above 0, as the type of an argument."""
    return _number(text, lambda value: value > 0, "a number above 0")


def share(text: str) -> float:
    """Returns a number above 0, at most 1, as the type of an argument."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def _number(text: str, holds: Callable[[float], bool], words: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and holds(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value
