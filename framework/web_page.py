"""Pages of HTML that stand alone: no script, no other file, the same bytes for the same content.

`report.html` of a run and `data.html` of a recipe's data are such pages. Each has its own sections and its own style
sheet, which is added to what all pages share (`web_page.html`).
"""

import html
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def web_page(title: str, sections: Iterable[str], style: Path) -> str:
    """Returns a page.

    Args:
      title: its name, as plain text.
      sections: its body, as HTML in which all text is escaped.
      style: a CSS file; its rules come after the shared ones.
    """
    template = string.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    css = style.read_text(encoding="utf-8").rstrip()
    return template.substitute(title=escape(title), style=css, body="\n".join(sections))


def escape(value: Any) -> str:
    """Returns text safe inside an element or a quoted attribute, without control characters."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", str(value)))


def numbers(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns the cells of a description list, (name, value)."""
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)


def table(columns: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of texts under `columns`, (title, whether it holds numbers)."""
    number = [' class="number"' if is_number else "" for _, is_number in columns]
    head = "".join(f"<th{style}>{escape(title)}</th>" for (title, _), style in zip(columns, number, strict=True))
    lines = [f"<tr>{head}</tr>"]
    for row in rows:
        cells = "".join(f"<td{style}>{escape(text)}</td>" for text, style in zip(row, number, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def framed(title: str, plot: str, keys: str = "") -> str:
    """Returns a plot under its title; `keys` is its legend."""
    return f"<figure><figcaption>{escape(title)}{keys}</figcaption>{plot}</figure>"
