"""meshway inspect: every tensor of a recipe, where it lies, what it costs a device, and which rule said so.

meshway inspect --gin_file=recipes/quickstart.gin --gin.LAYOUT=fsdp --simulated_devices=8
"""

import sys
from typing import TYPE_CHECKING

from meshway.framework import distributed
from meshway.framework.partitioning.explain import format_rows
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.run_directory import summarize

if TYPE_CHECKING:
    from meshway.launch.config import Invocation


def inspect(program: TrainProgram) -> str:
    """Returns the layout table of a program as text; nothing is allocated.

    Raises:
      UserError: the model does not fit the layout.
    """
    program.trace_loss()
    rows = program.explain()
    return f"{format_rows(rows)}\n\n{summarize(program, rows)}"


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch import config

    distributed.start(*invocation.processes)
    print(inspect(**config.load(invocation, import_unreferenced=False).build("inspect.inspect")))


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["inspect", *sys.argv[1:]]))
