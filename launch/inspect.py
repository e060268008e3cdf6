"""meshway inspect: a recipe looked at instead of trained.

    meshway inspect --gin_file=recipes/quickstart.gin --gin.LAYOUT=fsdp --simulated_devices=8
    meshway inspect data --gin_file=recipes/quickstart.gin

The first prints every tensor, where it lies, what it costs a device, and which rule said so, and warns of what the
layout wastes; with --compile also what the step sends over each mesh axis. The second prints
examples as the model sees them, their lengths, density and mixture shares, and writes the same as a page.
"""

import dataclasses
import sys
from typing import TYPE_CHECKING

from meshway.framework.errors import UserError
from meshway.framework.files import local_path

if TYPE_CHECKING:
    from meshway.framework.interfaces import DataSource
    from meshway.framework.training.program import TrainProgram
    from meshway.launch.config import Invocation

DATA = "data"


def layout(
    program: "TrainProgram",
    compile: bool = False,
    hardware: str | None = None,
    replicated_state: float = 0.1,
    replicated_activations: float = 0.5,
    resharding: float = 0.02,
) -> str:
    """Returns the layout table of a program as text, and warnings of what the layout wastes; nothing is allocated.

    Args:
      program: what to look at.
      hardware: say whether a step fits an accelerator, as 'TPU v5p'; None for the devices there are.
      compile: compile the step too, and say what it sends over which mesh axes, beside the closed forms.
      replicated_state: the share of a device's state above which to warn that others along one mesh axis hold the
        same, although the axis could cut it.
      replicated_activations: the same of the activations that the model constrains.
      resharding: the share of all bytes sent above which to warn of what no rule asks for.

    Raises:
      UserError: the model does not fit the layout.
    """
    from meshway.framework.partitioning.explain import format_rows
    from meshway.framework.planning import waste
    from meshway.framework.planning.memory import step_memory
    from meshway.framework.training.run_directory import summarize

    name, capacity = _device(program, hardware)
    memory = step_memory(program)
    rows = program.explain()
    parts = [format_rows(rows), summarize(program, rows, memory)]
    if capacity:
        parts[-1] += f"\n{memory.fits(name, capacity)}"
    found = waste.state_waste(rows, program.partitioner.mesh.shape, replicated_state)
    found += waste.activation_waste(program.partitioner, replicated_activations)
    if compile:
        from meshway.launch.bench_parallel import compared, compiled_step, format_result

        setting, collectives, _ = compiled_step(program)
        result = compared(setting, collectives, program.num_microbatches)
        parts.append(format_result(dataclasses.replace(result, layout="sent by the compiled step")))
        found += waste.resharding_waste(setting, collectives, resharding)
    return "\n\n".join([*parts, *(["\n".join(f"warning: {each}" for each in found)] if found else [])])


def _device(program: "TrainProgram", hardware: str | None) -> tuple[str, int | None]:
    """Returns (name, bytes of memory) of the accelerator that is asked about, else of the program's own; None where
    nothing tells."""
    from meshway.framework.planning.hardware import chip_named, memory_of

    if hardware is None:
        device = program.partitioner.mesh.devices.flat[0]
        return device.device_kind, memory_of(device)
    try:
        name, chip = chip_named(hardware)
    except UserError as error:
        raise UserError(f"--hardware: {error}") from None
    return name, chip.memory_bytes


def data(
    source: "DataSource", batches: int = 20, rows: int = 3, html: str | None = None, model_dir: str | None = None
) -> None:
    """Prints what a recipe's data is like, and writes it as a page.

    Args:
      source: where batches come from.
      batches: how many to draw for the figures.
      rows: how many rows to show of each source.
      html: the page; None for `data.html` in `model_dir`.
      model_dir: the run directory; None for the current folder.

    Raises:
      UserError: the data cannot be read, or the page cannot be written.
    """
    from meshway.framework.data.inspection.figures import inspect
    from meshway.framework.data.inspection.page import page
    from meshway.launch.inspect_data import show, standard_output

    inspection = inspect(source, batches, rows)
    path = local_path(html) if html else local_path(model_dir or "") / "data.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(inspection), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give another by --html=PATH") from error
    show(inspection, standard_output())
    print(f"\nthe same as a page: {path}")


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch import config

    if invocation.subject == DATA:
        import jax

        if any(value is not None for value in invocation.processes):
            raise UserError("meshway inspect data runs in one process and needs no devices: leave their flags out")
        jax.config.update("jax_platforms", "cpu")  # a run that trains meanwhile keeps its accelerators
        data(**config.load(invocation).build("inspect.data"))
        return
    from meshway.framework.distributed import processes

    with processes.joined(*invocation.processes):
        text = layout(**config.load(invocation, import_unreferenced=False).build("inspect.layout"))
        if processes.is_primary():
            print(text)


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["inspect", *sys.argv[1:]]))
