"""meshway launch: a command on many processes, here or on a cluster.

    meshway launch local --processes=4 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/four
    meshway launch slurm --nodes=4 --output=job.sbatch -- train --gin_file=my.gin --gin.MODEL_DIR=/data/runs/one

Places that take a file get one, to read before it is submitted by the place's own client.
"""

import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.framework.terminal import installed_version
from meshway.launch.cluster.job import Renderer
from meshway.launch.cluster.options import check_model_dir
from meshway.launch.invocation import Invocation

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Recipe


def run(invocation: Invocation) -> int:
    """Runs the verb from the command line; returns the exit code of what it ran."""
    job, place = invocation.job, invocation.place
    assert job is not None and place is not None
    recipe = None
    if invocation.subject != "worker":  # what it starts at once reads the recipe itself
        with _where_it_will_run(invocation):
            own = _own_files(invocation)
            recipe = None if job.unchecked else _checked(invocation)
    if not isinstance(place, Renderer):
        return place.run(job)
    job = dataclasses.replace(job, needs=_needs(invocation, own, recipe))
    text = place.render(job)
    needs = "".join(f"\n  it needs {line}" for line in job.needs)
    if invocation.output is None:
        path = f"{job.name}{place.suffix}"
        print(text, end="")
        print(f"meshway: with --output={path}, submit it by: {place.submit(path)}{needs}", file=sys.stderr)
        return 0
    try:
        local_path(invocation.output).write_text(text)
    except OSError as error:
        raise UserError(f"--output={invocation.output} cannot be written: {error.strerror}") from None
    print(f"wrote {shlex.quote(invocation.output)}; submit it by: {place.submit(invocation.output)}{needs}")
    return 0


def _folder(invocation: Invocation) -> str | None:
    """Returns the folder from which relative paths are read on the hosts, None for wherever a process starts."""
    assert invocation.job is not None
    return getattr(invocation.place, "upload", None) or invocation.job.workdir


@contextlib.contextmanager
def _where_it_will_run(invocation: Invocation) -> Iterator[None]:
    """Goes to the folder in which the command will run, if this machine has it too."""
    folder = _folder(invocation)
    if folder is None or not local_path(folder).is_dir():
        yield
        return
    before = sys.path[:]
    with contextlib.chdir(local_path(folder)):
        sys.path.insert(0, os.getcwd())
        try:
            yield
        finally:
            sys.path[:] = before


def _own_files(invocation: Invocation) -> list[str]:
    """Returns the recipes that do not come with meshway, as the command names them.

    Raises:
      UserError: one is not here, or would be another file on each host.
    """
    from meshway.launch.recipe.files import SHIPPED, GinFiles
    from meshway.launch.recipe.text import Place

    command, job = invocation.command, invocation.job
    assert command is not None and job is not None and invocation.place is not None
    scattered = invocation.place.shared_directory and _folder(invocation) is None
    own = []
    for name in command.gin_files:
        try:
            found = GinFiles(() if job.unchecked else command.search_paths).find(
                name, None, Place(f"--gin_file={name}")
            )
        except UserError as error:
            if not job.unchecked:
                raise UserError(f"after --: {error}{_hint(invocation)}") from None
            found = Path(name)
        if found.is_relative_to(SHIPPED.resolve()):
            continue
        own.append(name)
        if scattered and not name.startswith(("/", "~")):
            raise UserError(_elsewhere(f"--gin_file={name}"))
    for name in command.search_paths if scattered else ():
        if not name.startswith(("/", "~")):
            raise UserError(_elsewhere(f"--gin_search_paths={name}"))
    return own


def _elsewhere(flag: str) -> str:
    return (
        f"after --: {flag} would be looked for in another folder on each host: give its full path there, or the folder "
        "to start from by --workdir=DIR before --"
    )


def _hint(invocation: Invocation) -> str:
    if invocation.place is None or "unchecked" not in invocation.place.common:
        return ""
    return " (where it is on the hosts alone, --unchecked before -- leaves this to them)"


def _checked(invocation: Invocation) -> "Recipe | None":
    """Reads and checks the recipe as the command will; None for one in a run directory that is not here.

    Raises:
      UserError: as the command itself would raise.
    """
    from meshway.launch.recipe import config
    from meshway.launch.recipe.files import of_run, on_one_device, run_directory

    command = invocation.command
    assert command is not None and invocation.place is not None
    if not command.gin_files:
        directory = run_directory(command)
        if directory is None or not directory.is_dir():
            print(f"meshway: note: {directory} is not here: its recipe is left to the hosts to check", file=sys.stderr)
            return None
    subject = "infer" if command.verb == "infer" else command.subject
    try:
        # As these verbs load it: the others read no data.
        recipe = config.load(
            dataclasses.replace(of_run(on_one_device(command)), subject=subject),
            import_unreferenced=command.verb in ("train", "eval"),
        )
        if isinstance(directory := recipe.macro("MODEL_DIR"), str):
            check_model_dir(directory, invocation.place)
        if command.verb == "train" and isinstance(invocation.place, Renderer):  # others say so at once
            from meshway.launch.dry_run import check_training

            for line in check_training(recipe, invocation.place.chips):
                print(f"meshway: note: {line}", file=sys.stderr)
    except UserError as error:
        of_hosts = any(word in str(error) for word in ("import", "registered", "module ", "not cached"))
        raise UserError(f"after --: {error}{_hint(invocation) if of_hosts else ''}") from error
    return recipe


def _needs(invocation: Invocation, own: list[str], recipe: "Recipe | None") -> tuple[str, ...]:
    """Returns what must be there before a job file can run, in words."""
    folder, image = _folder(invocation), getattr(invocation.place, "image", None)
    where = f"in the image {image}" if image else "on every host"
    if getattr(invocation.place, "upload", None):
        where = f"{where} or in {folder}, which is uploaded"
    found = [f"meshway {installed_version()} {where}"]
    for name in own:
        path = name if name.startswith(("/", "~")) or folder is None else f"{folder.rstrip('/')}/{name}"
        found.append(f"the recipe {path}, with the files it includes, {where}")
    if recipe is not None and recipe.modules:
        found.append(f"the modules {', '.join(recipe.modules)}, to be imported from there or from PYTHONPATH, {where}")
    directory = recipe.macro("MODEL_DIR") if recipe is not None else None
    if isinstance(directory, str):
        found.append(f"{directory} on a file system that every host mounts")
    return tuple(found)
