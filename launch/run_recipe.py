"""The recipe of a run that exists: verbs that work on a run directory need no --gin_file."""

import dataclasses
from pathlib import Path

from meshway.framework.errors import UserError, did_you_mean
from meshway.framework.files import local_path
from meshway.launch.invocation import Invocation
from meshway.launch.recipe_text import parse_flag

RECIPES = ("recipe.gin", "config.gin")  # what `meshway convert` writes; what `meshway train` resolved
_MACRO = "MODEL_DIR"


def of_run(invocation: Invocation) -> Invocation:
    """Returns the command with the recipe of its run: MODEL_DIR's `recipe.gin`, else its `config.gin`. MODEL_DIR may be
    one of the run's checkpoints.

    A command that has recipes of its own keeps them. Its other bindings stand on top of either.

    Raises:
      UserError: no recipe is given and MODEL_DIR is not, is no directory, or holds no recipe.
    """
    if invocation.gin_files:
        return invocation
    directory = run_directory(invocation)
    if directory is None:
        raise UserError(f"meshway {invocation.verb} needs a run: --model_dir=DIR, or a recipe: --gin_file=FILE")
    if not directory.is_dir():
        raise UserError(f"--model_dir={directory}: there is no such directory{_beside(directory)}")
    run = (
        directory.parent.parent if directory.name.isdecimal() and directory.parent.name == "checkpoints" else directory
    )
    for name in RECIPES:
        if (run / name).is_file():
            return dataclasses.replace(invocation, gin_files=(str((run / name).absolute()),))
    raise UserError(
        f"--model_dir={directory} is no run directory: it holds neither {' nor '.join(RECIPES)}; give the recipe by "
        f"--gin_file=FILE, or a run{_inside(directory)}"
    )


def run_directory(invocation: Invocation) -> Path | None:
    """Returns the run directory that a command line names, by --model_dir or --gin.MODEL_DIR; None where it does not.

    Raises:
      UserError: it is no text.
    """
    values = [flag for flag in invocation.bindings if flag.partition("=")[0].strip() == _MACRO]
    if not values:
        return None
    value = parse_flag(values[-1]).value
    if not isinstance(value, str) or not value:
        raise UserError(f"--gin.{_MACRO}={value!r} is no directory; write --model_dir=DIR")
    return local_path(value)


def _beside(directory: Path) -> str:
    """Returns the names beside a missing directory that are like its own, as a question."""
    parent = directory.parent
    if not parent.is_dir():
        return f" (nor {parent})"
    return did_you_mean(directory.name, [path.name for path in parent.iterdir() if path.is_dir()])


def _inside(directory: Path) -> str:
    """Returns the runs that lie in a directory, as an example."""
    runs = sorted(path for path in directory.iterdir() if any((path / name).is_file() for name in RECIPES))
    return f", as --model_dir={runs[0]}" if runs else ""
