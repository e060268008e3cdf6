"""What commands show on a terminal: columns of text, and how far bytes have come."""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence


def format_columns(rows: Iterable[Sequence[str]], right: Container[int] = ()) -> list[str]:
    """Returns a line for each row, cells padded to the widest of their column and two spaces apart.

    Args:
      rows: cells, as many in each row; the first may be a heading.
      right: numbers of the columns that are aligned right; the others are left.

    Raises:
      ValueError: a row has more or fewer cells than another.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if number in right else "<" for number in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def progress_of_bytes(total_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
    """Yields what to tell the bytes that were written; shows a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda size: bar.advance(task, size)
