"""meshway bench parallel: what each layout makes a recipe's devices send in a step, beside the least it could be.

    meshway bench parallel --gin_file=recipes/quickstart.gin --simulated_devices=8
    meshway bench parallel --layouts=fsdp,model_1d --steps=5 --gin_file=...    # and how long a step takes

The real train step is compiled for each layout, and its collectives are read from the compiled program. The closed
forms beside them, and their sources, are in `framework/planning/communication.py`.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from meshway.framework.distributed import processes
from meshway.framework.errors import UserError
from meshway.framework.planning.collectives import Collective, read_collectives
from meshway.framework.planning.communication import Setting
from meshway.framework.planning.comparison import Line, compare, ratio, setting_of
from meshway.framework.terminal import format_bytes, format_columns
from meshway.launch.bench.rounds import seconds_of
from meshway.launch.recipe.files import GinFiles

if TYPE_CHECKING:
    from meshway.framework.training.program import TrainProgram
    from meshway.launch.invocation import Invocation


@dataclasses.dataclass(frozen=True)
class Result:
    """One layout: the lines of its table, or why it does not fit this recipe on these devices.

    Attributes:
      layout: its name.
      mesh: sizes of its axes.
      notes: what makes the numbers less sure.
      seconds: the median of a step; None where steps were not timed.
    """

    layout: str = ""
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    lines: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    misfit: str = ""
    seconds: float | None = None

    @property
    def measured(self) -> float:
        """Bytes a device sends in a step."""
        return sum(line.measured for line in self.lines)

    @property
    def minimum(self) -> float:
        """The closed forms' bytes."""
        return sum(line.minimum for line in self.lines)


def compiled_step(program: "TrainProgram") -> tuple[Setting, list[Collective], jax.stages.Compiled]:
    """Compiles a program's step; returns the setting of its closed forms, its collectives, and the step.

    Raises:
      UserError, ValueError: the model does not fit the layout.
    """
    setting = setting_of(program)
    compiled = program.compile_step()
    return setting, read_collectives(compiled.as_text() or "", setting.mesh), compiled


def compared(setting: Setting, rows: Sequence[Collective], microbatches: int) -> Result:
    """Returns what a step sends beside its closed forms."""
    notes = dict.fromkeys(f"{row.instruction}: {row.note}" for row in rows if row.note)
    return Result(mesh=dict(setting.mesh), lines=tuple(compare(setting, rows, microbatches)), notes=tuple(notes))


def measure(program: "TrainProgram", layouts: str = "", steps: int = 0) -> Result:
    """Compiles a program's step and compares what it sends with the closed forms; `compare_layouts` calls it for each.

    Args:
      program: the recipe under one layout.
      layouts: names or files of layouts, with commas between; "" for all shipped ones.
      steps: how many steps to time after a first one; 0 runs none.

    Raises:
      UserError, ValueError: the model does not fit the layout.
    """
    setting, rows, step = compiled_step(program)
    result = compared(setting, rows, program.num_microbatches)
    if not steps:
        return result
    state, batch = program.init(), program.shard_batch(program.synthetic_batch())

    def once() -> object:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    times = [seconds_of(once) for _ in range(steps + 1)]
    return dataclasses.replace(result, seconds=statistics.median(times[1:]))


def format_result(result: Result) -> str:
    """Returns one layout's table, each excess with what it comes from."""
    mesh = ", ".join(f"{name}={size}" for name, size in result.mesh.items())
    if result.misfit:
        return f"{result.layout}: does not fit: {result.misfit}"
    if not result.lines:
        return f"{result.layout} ({mesh}): nothing is sent"
    total = f"{format_bytes(result.measured)} a device and step, ratio {ratio(result.measured, result.minimum)}"
    timed = "" if result.seconds is None else f", {result.seconds * 1e3:,.1f} ms a step"
    cells = [("axes", "what", "sent", "minimum", "ratio", "collectives")]
    for line in result.lines:
        least = format_bytes(line.minimum) if line.minimum else "-"
        sent = format_bytes(line.measured)
        cells.append(("+".join(line.axes), line.role, sent, least, ratio(line.measured, line.minimum), line.calls))
    text = [f"{result.layout} ({mesh}): {total}{timed}"]
    for row, why in zip(format_columns(cells), [(), *[line.why for line in result.lines]], strict=True):
        text.append(f"  {row}")
        text += [f"      {reason}" for reason in why]
    return "\n".join([*text, *[f"  counted with care: {note}" for note in result.notes]])


def format_summary(results: Sequence[Result]) -> str:
    """Returns a line a layout."""
    cells = [("layout", "sent", "minimum", "ratio", "step")]
    for result in results:
        timed = "" if result.seconds is None else f"{result.seconds * 1e3:,.1f} ms"
        sent, least = format_bytes(result.measured), format_bytes(result.minimum)
        figures = (sent, least, ratio(result.measured, result.minimum), timed)
        cells.append((result.layout, *(("does not fit", "", "", "") if result.misfit else figures)))
    return "\n".join(format_columns(cells))


def compare_layouts(invocation: "Invocation") -> list[Result]:
    """Measures the layouts that the command names, else all shipped ones, and prints each as it is done.

    Raises:
      UserError: the recipe is wrong, or no layout that was named fits it.
    """
    from meshway.launch.recipe import config

    def arguments(layout: str) -> dict[str, Any]:
        chosen = dataclasses.replace(invocation, bindings=(*invocation.bindings, f"LAYOUT={layout!r}"))
        return config.load(chosen, import_unreferenced=False).build("bench.parallel.measure")

    named, shipped = _names(invocation, arguments("single").get("layouts", ""))
    results = []
    for name in named:
        try:
            result = dataclasses.replace(measure(**arguments(name)), layout=name)
        except (UserError, ValueError) as error:
            result = Result(name, misfit=str(error).splitlines()[0])
        results.append(result)
        print(f"{format_result(result)}\n", flush=True)
    if not shipped and all(result.misfit for result in results):
        raise UserError("none of these layouts fits: " + "; ".join(f"{each.layout}: {each.misfit}" for each in results))
    print(format_summary(results))
    return results


def _names(invocation: "Invocation", listed: str) -> tuple[list[str], bool]:
    """Returns the layouts to measure, and whether they are all the shipped ones."""
    if listed:
        return [name.strip() for name in listed.split(",") if name.strip()], False
    given = [binding.partition("=")[2] for binding in invocation.bindings if binding.startswith("LAYOUT=")]
    if given:
        return [given[-1].strip("'\"")], False
    shipped = GinFiles(invocation.search_paths).shipped_names("layouts")
    names = [name.removeprefix("layouts/") for name in shipped]
    return [name for name in names if not name.startswith("inference/")], True  # those train nothing


def run(invocation: "Invocation") -> None:
    """Runs `meshway bench parallel`."""
    with processes.joined(*invocation.processes):
        compare_layouts(invocation)
