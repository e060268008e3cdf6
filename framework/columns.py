"""Columns of text: the tables that commands print."""

from collections.abc import Container, Iterable, Sequence


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
