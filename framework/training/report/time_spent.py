"""Where the time of a run went: one bar and one row of numbers an attempt."""

import textwrap
import time
from collections.abc import Iterable, Mapping

from meshway.framework.counting import count_of
from meshway.framework.training.goodput import KINDS, Attempt
from meshway.framework.training.progress import format_duration
from meshway.framework.training.report.elements import framed, legend, table
from meshway.framework.training.report.plots import bar_plot
from meshway.framework.training.report.run_files import Run

_MAX_BARS = 24  # the table has all of them
_MAX_OUTCOME = 80  # characters; the file has all of them
_OPEN_ROWS = 40  # a longer table is folded away
_COLOURS = {  # what counts, what must be, what should not
    "productive": 2,
    "compile": 4,
    "startup": 6,
    "data_wait": 1,
    "checkpoint": 0,
    "evaluation": 3,
    "lost": 5,
    "restart": 7,
}
_COLUMNS = [  # (title, whether it holds numbers), before those of the kinds
    ("attempt", False),
    ("began (UTC)", False),
    ("steps", False),
    ("devices", True),
    ("end", False),
    ("time", True),
]


def time_spent(run: Run) -> str:
    """Returns the bars and the table; nothing where no attempt wrote down how it went."""
    found = run.goodput
    if not found.wall:
        return ""
    attempts = list(enumerate(found.attempts, 1))
    shown = attempts[-_MAX_BARS:]
    used = [kind for kind, seconds in found.seconds.items() if seconds]
    bars = {f"{index}": [(_COLOURS[kind], attempt.seconds[kind]) for kind in _order(used)] for index, attempt in shown}
    title = "Time by attempt" if len(shown) == len(attempts) else f"Time by attempt, the last {len(shown)}"
    keys = legend({_COLOURS[kind]: KINDS[kind] for kind in _order(used)})
    plot = framed(title, keys, bar_plot(bars))
    rows = [_row(str(index), attempt, last=index == len(attempts)) for index, attempt in attempts]
    rows.append(["all", "", "", "", "", format_seconds(found.wall), *map(format_seconds, _of_kinds(found.seconds))])
    rows.append(["share", "", "", "", "", "100.0%", *(f"{share:.1%}" for share in _of_kinds(found.shares))])
    numbers = table([*_COLUMNS, *((title, True) for title in KINDS.values())], rows)
    if len(rows) > _OPEN_ROWS:
        numbers = f"<details><summary>{len(attempts)} attempts</summary>{numbers}</details>"
    return f"<h2>Where the time went</h2>\n<p>{_sentence(run)}</p>\n{plot}\n{numbers}"


def _sentence(run: Run) -> str:
    attempts = count_of(len(run.goodput.attempts), "attempt")
    share = f"{run.goodput.shares['productive']:.1%}"
    lost = ". Lost are steps that a later attempt did again" if run.goodput.seconds["lost"] else ""
    return f"{share} of {format_seconds(run.goodput.wall)} in {attempts} went into steps that count{lost}."


def _order(kinds: Iterable[str]) -> list[str]:
    """Returns kinds in the order in which they come about in an attempt, as far as that can be said."""
    return sorted(kinds, key=["restart", "startup", "compile", *KINDS].index)


def _of_kinds(values: Mapping[str, float]) -> list[float]:
    return [values[kind] for kind in KINDS]


def _row(index: str, attempt: Attempt, last: bool) -> list[str]:
    unknown = "not written yet" if last else "killed"
    return [
        index,
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(attempt.began)) if attempt.began < 1e11 else "-",
        f"{attempt.start_step:,} to {attempt.last_step:,}",
        "-" if attempt.devices is None else f"{attempt.devices:,}",
        textwrap.shorten(attempt.outcome or unknown, _MAX_OUTCOME),
        format_seconds(sum(attempt.seconds.values())),
        *map(format_seconds, _of_kinds(attempt.seconds)),
    ]


def format_seconds(seconds: float) -> str:
    """Returns `12.3 s`, from 100 seconds on `m:ss`."""
    return f"{seconds:.1f} s" if seconds < 99.95 else format_duration(seconds)
