"""What every verb's parser shares."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

from meshway.framework.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """A parser whose errors are a user's errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def help_formatter(prog: str) -> argparse.HelpFormatter:
    """Returns the formatter of every help."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=100)


def count(text: str) -> int:
    """Returns a whole number of at least 1, as the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """Returns a whole number of at least 0, as the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Returns what reads one of several words, as the type of an argument."""

    def read(text: str) -> str:
        if text not in choices:
            near = did_you_mean(text, choices)
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(choices)}{near}")
        return text

    return read


def not_negative(text: str) -> float:
    """Returns a finite number of at least 0, as the type of an argument."""
    return _number(text, lambda value: value >= 0, "a number of at least 0")


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
