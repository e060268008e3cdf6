"""What `meshway launch` checks of a training before it is submitted: what a dry run checks that needs no host.

The hosts' devices are played by simulated ones of this process, as many as the place was asked for.
"""

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.errors import EnvironmentFailure, UserError, first_line
from meshway.framework.files import local_path
from meshway.framework.partitioning.mesh import MeshShape
from meshway.launch.cluster.job import Chips
from meshway.launch.dry_run import check

if TYPE_CHECKING:
    from meshway.launch.recipe.config import Recipe

_MOST = 1024  # simulated devices of a process: each costs two threads


def check_training(recipe: "Recipe", chips: Chips | None) -> list[str]:
    """Checks task, split, vocabularies, converter, values, and whether the layout fits the devices that were asked for.

    Args:
      recipe: of the training.
      chips: the devices of the place; None where what was asked for does not tell.

    Returns:
      what only the hosts can check, in words.

    Raises:
      UserError: what the run would say there.
    """
    left = [
        f"the module {name} is not here: the task, its splits and vocabularies are left to the hosts to check"
        for name in _modules(recipe.macro("MIXTURE_OR_TASK_MODULE"))
        if not _is_here(name)  # one that is missing from a package that is here is a mistake
    ]
    mesh = vars(MeshShape()) | recipe.literals(MeshShape.__module__, MeshShape.__name__)
    if chips is not None:
        _check_mesh(mesh, chips)
    _simulate(_num_devices(mesh, chips))
    arguments = recipe.build("train.train", given=["resolved", "began"])
    arguments["program"].trace_loss()
    if left:
        return left
    known = ("program", "data", "model_dir", "periods", "evaluation", "keep", "initial", "train_eval", "infer_eval")
    given = {name: value for name, value in arguments.items() if name in known}
    if not local_path(given["model_dir"]).is_dir():
        given["model_dir"] = None  # where the hosts mount it
    initial = given.get("initial")
    if initial is not None and not local_path(initial.path).exists():
        left.append(f"{initial.path}, where parameters start from, is not here: left to the hosts to check")
        given["initial"] = None
    try:
        check(**given)
    except (OSError, EnvironmentFailure) as error:  # what it reads is on the hosts
        left.append(f"its data cannot be read here ({first_line(error)}): left to the hosts to check")
    return left


def _modules(value: Any) -> Sequence[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]


def _is_here(module: str) -> bool:
    """Whether a module's package can be imported here."""
    package = module.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _check_mesh(mesh: Mapping[str, Any], chips: Chips) -> None:
    """Raises UserError where the mesh cannot be made of the devices that were asked for."""
    sizes = [*mesh["ici"].values(), *mesh["dcn"].values()]
    fixed, free = math.prod(size for size in sizes if size != -1), -1 in sizes
    if fixed < 1:
        return  # said by MeshShape itself
    said = f"the mesh ici={dict(mesh['ici'])} dcn={dict(mesh['dcn'])}"
    if fixed > chips.devices or (free and chips.devices % fixed):
        raise UserError(
            f"{said} needs {'a multiple of ' if free else ''}{fixed} devices, and {chips.words} has {chips.devices}: "
            "change MeshShape, or what is asked for"
        )
    if not free and fixed <= chips.devices - chips.devices // chips.hosts:
        raise UserError(
            f"{said} takes {fixed} of the {chips.devices} devices of {chips.words} and leaves hosts without any: make "
            f"the product of its sizes {chips.devices}, or give one axis -1"
        )


def _num_devices(mesh: Mapping[str, Any], chips: Chips | None) -> int:
    """Returns how many devices to play: those of the place, or the most or the least of which such a mesh is made."""
    fixed = max(1, math.prod(size for part in mesh.values() for size in part.values() if size != -1))
    if chips is None:
        return fixed
    return chips.devices if chips.devices <= _MOST else max(1, _MOST // fixed) * fixed


def _simulate(devices: int) -> None:
    """Makes this process one of so many CPU devices; where JAX has begun, those that it has must do."""
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        return
