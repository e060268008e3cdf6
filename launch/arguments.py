"""What every verb's parser shares."""

import argparse
import math
from typing import NoReturn

from meshway.framework.errors import UserError


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


def real(text: str) -> float:
    """Returns a finite number, as the type of an argument."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value
