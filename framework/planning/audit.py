"""What a compiled program does beside arithmetic, read from its optimised HLO: the collectives that it issues, and
which of the arguments that were given up for its results it really writes them into."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from meshway.framework.planning import hlo
from meshway.framework.planning.collectives import Collective, read_collectives
from meshway.framework.terminal import format_bytes, format_columns


@dataclasses.dataclass(frozen=True)
class Donated:
    """A donated argument: its label in the program, its bytes on a device, and whether a result takes its memory."""

    name: str
    bytes: int
    aliased: bool


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The collectives of one kind over the same mesh axes.

    Attributes:
      instructions: of the program.
      count: executions in a run of the program, loops counted by their trips.
      payload: bytes on a device (see `collectives.Collective.array`) of all executions.
      sent: bytes that a device sends in all executions.
    """

    kind: str
    axes: tuple[str, ...]
    instructions: int
    count: int
    payload: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Audit:
    """What `audit` found in a program."""

    collectives: tuple[Collective, ...]
    donated: tuple[Donated, ...]

    @property
    def copied(self) -> list[Donated]:
        """The donated arguments whose memory no result takes: they exist twice while the program runs."""
        return [each for each in self.donated if not each.aliased]


def audit(text: str, mesh: Mapping[str, int], donated: Collection[str] = ()) -> Audit:
    """Reads a program.

    Args:
      text: HLO of one SPMD program (`compiled.as_text()`).
      mesh: sizes of the mesh's axes in order.
      donated: the names of the arguments that were donated, as the function calls them ("state").

    Raises:
      UserError: the text is not HLO.
    """
    module = hlo.parse(text)
    leaves = []
    for number, parameter in enumerate(hlo.entry_parameters(module)):
        name = parameter.op_name or parameter.name
        if name.partition("[")[0].partition(".")[0] in donated:
            size = sum(array.bytes for array in parameter.arrays)
            leaves.append(Donated(name, size, number in module.aliased))
    return Audit(tuple(read_collectives(text, mesh)), tuple(leaves))


def exchanges(collectives: Iterable[Collective]) -> list[Exchange]:
    """Returns the collectives summed by kind and mesh axes, those that send most first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for each in collectives:
        groups.setdefault((each.kind, each.axes), []).append(each)
    found = []
    for (kind, axes), rows in groups.items():
        counts = {row.instruction: row.count for row in rows}
        payload, sent = sum(row.payload for row in rows), sum(row.sent for row in rows)
        found.append(Exchange(kind, axes, len(counts), sum(counts.values()), payload, sent))
    return sorted(found, key=lambda one: (-one.sent, one.kind, one.axes))


def format_audit(title: str, found: Audit) -> str:
    """Returns a table of a program's collectives, a line on its donated arguments, and one for each that is copied."""
    rows = exchanges(found.collectives)
    total = format_bytes(sum(row.sent for row in rows))
    head = f"{title}: a device sends {total}" if rows else f"{title}: nothing is sent"
    cells = [("collective", "axes", "instructions", "executions", "payload", "sent")]
    for row in rows:
        sizes = (f"{row.instructions:,}", f"{row.count:,}", format_bytes(row.payload), format_bytes(row.sent))
        cells.append((row.kind, "+".join(row.axes), *sizes))
    lines = [head, *[f"  {line}" for line in format_columns(cells)]] if rows else [head]
    if found.donated:
        copied, size = found.copied, format_bytes(sum(each.bytes for each in found.donated))
        written = f"  donated: {len(found.donated) - len(copied)} of {len(found.donated)} arrays, {size} a device"
        lines.append(f"{written}, are written in place")
        lines += [f"    not aliased: {each.name} ({format_bytes(each.bytes)})" for each in copied]
    notes = dict.fromkeys(f"{each.instruction}: {each.note}" for each in found.collectives if each.note)
    return "\n".join([*lines, *[f"  counted with care: {note}" for note in notes]])
