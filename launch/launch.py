"""meshway launch: a command on many processes, here or on a cluster.

    meshway launch local --processes=4 --devices=2 -- train --gin_file=quickstart --gin.MODEL_DIR=runs/four
    meshway launch slurm --nodes=4 --output=job.sbatch -- train --gin_file=my.gin --gin.MODEL_DIR=/data/runs/one

Places that take a file get one, to read before it is submitted by the place's own client.
"""

import shlex
import sys

from meshway.framework.errors import UserError
from meshway.framework.files import local_path
from meshway.launch.invocation import Invocation
from meshway.launch.launchers.job import Renderer


def run(invocation: Invocation) -> int:
    """Runs the verb from the command line; returns the exit code of what it ran."""
    job, place = invocation.job, invocation.place
    assert job is not None and place is not None
    if not isinstance(place, Renderer):
        return place.run(job)
    _note_recipes(invocation)
    text = place.render(job)
    if invocation.output is None:
        path = f"{job.name}{place.suffix}"
        print(text, end="")
        print(f"meshway: with --output={path}, submit it by: {place.submit(path)}", file=sys.stderr)
        return 0
    try:
        local_path(invocation.output).write_text(text)
    except OSError as error:
        raise UserError(f"--output={invocation.output} cannot be written: {error.strerror}") from None
    print(f"wrote {shlex.quote(invocation.output)}; submit it by: {place.submit(invocation.output)}")
    return 0


def _note_recipes(invocation: Invocation) -> None:
    """Says which recipes are not here: they may well be on the hosts, or misspelt."""
    from meshway.launch.recipe_files import GinFiles
    from meshway.launch.recipe_text import Place

    job = invocation.job
    assert job is not None
    for name in invocation.gin_files:
        try:
            GinFiles(invocation.search_paths).find(name, None, Place(f"--gin_file={name}"))
        except UserError as error:
            where = job.workdir or "the folder it starts in"
            print(f"meshway: note: {error}; the hosts will look for it in {where}", file=sys.stderr)
