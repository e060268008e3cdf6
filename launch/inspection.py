"""meshway inspect: a recipe looked at instead of trained.

    meshway inspect --gin_file=recipes/quickstart.gin --gin.LAYOUT=fsdp --simulated_devices=8
    meshway inspect data --gin_file=recipes/quickstart.gin

The first prints every tensor, how it is sharded, its bytes a device, and which rule decided, and warns of what the
layout wastes; with --compile also what the step sends over each mesh axis, and with --hlo instead the collectives and
copies of compiled programs. The second prints
examples as the model sees them, their lengths, density and mixture shares, and writes the same as a page.
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from meshway.framework.data.inspection.decoded_rows import Lane, Token, Values
from meshway.framework.data.inspection.figures import Inspection, Sample
from meshway.framework.data.inspection.page import Table, tables
from meshway.framework.errors import UserError
from meshway.framework.files import io_errors, local_path

if TYPE_CHECKING:
    from meshway.framework.data.source import DataSource
    from meshway.framework.training.program import TrainProgram
    from meshway.launch.recipe.config import Invocation


_SEGMENTS = ("cyan", "yellow", "green", "blue")  # in turn along a row
_SHADES = " .:-=+*#%@"
_PIPE_WIDTH = 10**6  # outside a terminal lines stay whole, so that they can be searched
_MOST_TOKENS = 2048  # of a lane; the page shows them all


def standard_output() -> Console:
    """Returns a console on standard output; what its encoding lacks is spelled out."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def show(inspection: Inspection, console: Console) -> None:
    """Prints an inspection."""
    _line(console, Text(inspection.name, "bold"))
    width = max(len(name) for name in inspection.facts)
    for name, text in inspection.facts.items():
        _line(console, Text.assemble((f"  {name:{width}}  ", "dim"), text))
    for sentence in inspection.missing:
        _line(console, Text(f"note: {sentence}", "yellow"))
    for table in tables(inspection):
        _table(console, table)
    if any(row.lanes for sample in inspection.samples for row in sample.rows):
        _line(console, Text())
        _line(console, _legend(console))
    for sample in inspection.samples:
        _sample(console, sample)


def _line(console: Console, text: Text, indent: int = 0) -> None:
    """Prints a paragraph."""
    for line in text.wrap(console, max(20, console.width - indent)):
        console.print(Text(" " * indent) + line)


def _table(console: Console, table: Table) -> None:
    _line(console, Text())
    _line(console, Text(table.title, "bold"))
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(table.head):
        grid.add_column(name, justify="left" if place < table.words else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*map(Text, row))
    console.print(grid)
    if table.note:
        _line(console, Text(table.note, "dim"))


def _legend(console: Console) -> Text:
    if console.is_terminal:
        return Text.assemble(
            ("Rows, as the model sees them: a colour for each segment, ", ""),
            ("<special tokens>", "reverse"),
            (", and where only some tokens carry loss ", ""),
            ("those that do", "bold"),
            (" and ", ""),
            ("those that do not", "dim"),
            (".", ""),
        )
    return Text(
        "Rows, as the model sees them: [n] begins segment n; where only some tokens carry loss, \u00abthey\u00bb do."
    )


def _sample(console: Console, sample: Sample) -> None:
    for number, row in enumerate(sample.rows):
        _line(console, Text())
        of = f"{sample.source}, row {number}" if sample.source else f"row {number}"
        _line(console, Text(of, "bold"))
        for lane in row.lanes:
            segments = "1 segment" if lane.segments == 1 else f"{lane.segments} segments"
            _line(console, Text(f"{lane.title}: {lane.filled:,} of {lane.length:,} tokens, {segments}", "dim"), 2)
            _line(console, _coloured(lane) if console.is_terminal else _marked(lane), 4)
        for values in row.values:
            _values(console, values)


def _coloured(lane: Lane) -> Text:
    text = Text()
    for tokens in _shown(lane):
        first = tokens[0]
        style = _SEGMENTS[(first.segment - 1) % len(_SEGMENTS)]
        if lane.is_mixed:
            style = f"bold {style}" if first.weight else f"dim {style}"
        text.append(_words(tokens), f"{style} reverse" if first.special else style)
    return text + Text(_rest(lane), "dim")


def _marked(lane: Lane) -> Text:
    parts: list[str] = []
    segment, is_open = 0, False
    for tokens in _shown(lane):
        first = tokens[0]
        carries = lane.is_mixed and bool(first.weight)
        if is_open and (first.segment != segment or not carries):
            parts.append("\u00bb")
            is_open = False
        if first.segment != segment:
            segment = first.segment
            parts.append(f"{' ' if parts else ''}[{segment}] ")
        if carries and not is_open:
            parts.append("\u00ab")
            is_open = True
        parts.append(_words(tokens))
    return Text("".join([*parts, "\u00bb" if is_open else "", _rest(lane)]))


def _shown(lane: Lane) -> Iterator[list[Token]]:
    """Yields a lane's stretches as far as they are shown."""
    left = _MOST_TOKENS
    for tokens in lane.stretches():
        if left > 0:
            yield tokens[:left]
        left -= len(tokens)


def _rest(lane: Lane) -> str:
    hidden = sum(len(token.ids) for token in lane.tokens[_MOST_TOKENS:])
    parts = [f"{hidden:,} more tokens"] if hidden else []
    parts += [f"{lane.length - lane.filled:,} of padding"] if lane.filled < lane.length else []
    return f" [{', '.join(parts)}]" if parts else ""


def _words(tokens: Sequence[Token]) -> str:
    """Returns the text of tokens, its line ends and tabs made visible."""
    return "".join(token.text for token in tokens).replace("\n", "\u21b5").replace("\t", "\u21e5")


def _values(console: Console, values: Values) -> None:
    if not values.is_picture:
        _line(console, Text(f"{values.name}: {values.text}"), 2)
        return
    _line(console, Text(f"{values.name}: {values.array.dtype.name} {list(values.array.shape)}", "dim"), 2)
    for line in _blocks(values) if console.is_terminal else _shaded(values):
        console.print(Text("    ") + line, soft_wrap=True)


def _blocks(values: Values) -> Iterator[Text]:
    """Yields a picture's lines, each of two rows of pixels: a half block has two colours."""
    pixels = values.picture().tolist()
    if len(pixels) % 2:
        pixels.append([(0, 0, 0)] * len(pixels[0]))
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Text()
        for above, below in zip(upper, lower, strict=True):
            line.append("\u2580", f"rgb({','.join(map(str, above))}) on rgb({','.join(map(str, below))})")
        yield line


def _shaded(values: Values) -> Iterator[Text]:
    """Yields a picture's lines, a pixel two characters wide, the denser the lighter."""
    for row in values.picture().mean(axis=-1).astype(int).tolist():
        yield Text("".join(2 * _SHADES[level * (len(_SHADES) - 1) // 255] for level in row))


DATA = "data"


def layout(
    program: "TrainProgram",
    compile: bool = False,
    hardware: str | None = None,
    hlo: bool = False,
    programs: str | None = None,
    replicated_state: float = 0.1,
    replicated_activations: float = 0.5,
    resharding: float = 0.02,
) -> str:
    """Returns the layout table of a program as text, and warnings of what the layout wastes; nothing is allocated.

    Args:
      program: what to look at.
      hardware: report whether a step fits an accelerator, as 'TPU v5p'; None for the devices there are.
      compile: compile the step too, and report what it sends over which mesh axes, beside the closed forms.
      hlo: return instead what compiled programs do: their collectives, and the donated arrays that are copied.
      programs: which, with `hlo`: some of "step,score,prefill,decode"; None for the step.
      replicated_state: the share of a device's state above which to warn that others along one mesh axis hold the
        same, although the axis could shard it.
      replicated_activations: the same of the activations that the model constrains.
      resharding: the share of all bytes sent above which to warn of what no rule asks for.

    Raises:
      UserError: the model does not fit the layout, or options exclude each other.
    """
    if programs is not None and not hlo:
        raise UserError("--programs says what --hlo reads: give --hlo too")
    if hlo:
        from meshway.launch.audited_programs import audits

        if compile or hardware:
            raise UserError("--hlo reads compiled programs alone: leave out --compile and --hardware")
        return audits(program, "step" if programs is None else programs)
    from meshway.framework.partitioning.sharded_model import format_rows
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
    found += waste.activation_waste(program.trace_loss(), replicated_activations)
    if compile:
        from meshway.launch.bench.parallel import compared, compiled_step, format_result

        setting, collectives, _ = compiled_step(program)
        result = compared(setting, collectives, program.num_microbatches)
        parts.append(format_result(dataclasses.replace(result, layout="sent by the compiled step")))
        found += waste.resharding_waste(setting, collectives, resharding)
    return "\n\n".join([*parts, *(["\n".join(f"warning: {each}" for each in found)] if found else [])])


def _device(program: "TrainProgram", hardware: str | None) -> tuple[str, int | None]:
    """Returns (name, bytes of memory) of the accelerator that is asked about, else of the program's own; None where
    nothing tells."""
    from meshway.framework.planning.hardware import memory_of
    from meshway.framework.planning.topology import chip_named

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

    inspection = inspect(source, batches, rows)
    path = local_path(html) if html else local_path(model_dir or "") / "data.html"
    try:
        with io_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page(inspection), encoding="utf-8", errors="replace")
    except UserError as error:
        raise UserError(f"{error}; give another by --html=PATH") from error
    show(inspection, standard_output())
    print(f"\nthe same as a page: {path}")


def run(invocation: "Invocation") -> None:
    """Runs the verb from the command line."""
    from meshway.launch.recipe import config

    if invocation.subject == DATA:
        import jax

        if any(value is not None for value in invocation.processes):
            raise UserError("meshway inspect data runs in one process and needs no devices: leave their flags out")
        jax.config.update("jax_platforms", "cpu")  # a run that trains meanwhile keeps its accelerators
        data(**config.load(invocation).build("inspection.data"))
        return
    from meshway.framework.distributed import processes

    with processes.joined(*invocation.processes):
        text = layout(**config.load(invocation, import_unreferenced=False).build("inspection.layout"))
        if processes.is_primary():
            print(text)


if __name__ == "__main__":
    from meshway.launch import cli

    sys.exit(cli.main(["inspect", *sys.argv[1:]]))
