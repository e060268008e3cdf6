"""A seqio task that a small model learns within minutes: dates as people write them -> ISO 8601, as bytes.

    dates   inputs: 'Friday, 3rd of July 1987'; targets: '1987-07-03'

Texts are made by `datetime.date.__format__` (English, as Python writes without a locale). In every format it is clear
which number is the day: by the month's name, by a year that comes first, or by the separators: 7/3/1987 has the month
first, 3.7.1987 the day.
"""

import datetime
import functools
import hashlib
from collections.abc import Callable

import seqio
import tensorflow as tf

from meshway.tasks import metrics, preprocessors, vocabularies
from meshway.tasks.registry import CountedSource, add_task

SPLITS = ("train", "validation")
FIRST, LAST = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
VALIDATION_PER_MILLE = 5  # of 73,049 dates
# d, m and y are the numbers of day, month and year, nth is the day with its suffix; the formats of date are strftime's.
PATTERNS = (
    "{date:%A}, {nth} of {date:%B} {y}",
    "{date:%A}, {d} {date:%B} {y}",
    "{date:%A} {d} {date:%B} {y}",
    "{date:%A}, {date:%B} {d}, {y}",
    "{date:%A}, {date:%B} {nth}, {y}",
    "{date:%a}, {date:%d} {date:%b} {y}",
    "{date:%a} {date:%b} {d} {y}",
    "{date:%a} {d} {date:%b} {y}",
    "{date:%B} {d}, {y}",
    "{date:%B} {nth}, {y}",
    "{date:%B} {d} {y}",
    "{date:%b} {d}, {y}",
    "{date:%b}. {d}, {y}",
    "{date:%b} {date:%d} {y}",
    "{d} {date:%B} {y}",
    "{d} {date:%b} {y}",
    "{d}. {date:%B} {y}",
    "{nth} of {date:%B} {y}",
    "{nth} of {date:%B}, {y}",
    "{nth} {date:%B} {y}",
    "the {nth} of {date:%B}, {y}",
    "{date:%d}-{date:%b}-{y}",
    "{y} {date:%B} {d}",
    "{y}, {date:%B} {nth}",
    "{y}-{date:%b}-{date:%d}",
    "{date:%Y/%m/%d}",
    "{date:%Y.%m.%d}",
    "{date:%Y%m%d}",
    "{date:%Y-%m-%d}",
    "{y}-{m}-{d}",
    "{m}/{d}/{y}",
    "{date:%m/%d/%Y}",
    "{d}.{m}.{y}",
    "{date:%d.%m.%Y}",
)
CASES: tuple[Callable[[str], str], ...] = (str, str, str, str, str.lower, str.upper)


@functools.cache
def dates(split: str) -> tuple[datetime.date, ...]:
    """Returns the dates of 'train' or 'validation', ascending: a date is in one of them, whatever its format."""
    every = (FIRST + datetime.timedelta(days) for days in range((LAST - FIRST).days + 1))
    return tuple(date for date in every if split_of(date) == split)


def split_of(date: datetime.date) -> str:
    """Returns the split of a date, by a hash of it."""
    return "validation" if _hash(date, "split") % 1000 < VALIDATION_PER_MILLE else "train"


def written(date: datetime.date) -> str:
    """Returns a date as a person may write it, in the pattern and the case that its hash chooses."""
    return CASES[_hash(date, "case") % len(CASES)](in_pattern(date, PATTERNS[_hash(date, "pattern") % len(PATTERNS)]))


def in_pattern(date: datetime.date, pattern: str) -> str:
    """Returns a date in one of PATTERNS."""
    nth = f"{date.day}{_suffix(date.day)}"
    return pattern.format(date=date, d=date.day, nth=nth, m=date.month, y=date.year)


def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    """Returns {'inputs', 'targets'} texts of each date of a split; neighbours are not near each other in time."""
    chosen = sorted(dates(split), key=lambda date: _hash(date, "order"))
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": [written(date) for date in chosen], "targets": [date.isoformat() for date in chosen]}
    )


def _suffix(day: int) -> str:
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _hash(date: datetime.date, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose} {date.isoformat()}".encode()).digest()[:8], "big")


def _count(split: str) -> int:
    return len(dates(split))


def _add_all() -> None:
    feature = seqio.Feature(vocabularies.byte(), add_eos=True)
    add_task(
        "dates",
        CountedSource(dataset, SPLITS, _count),
        {"inputs": feature, "targets": feature},
        preprocessors.text_to_text(),
        [metrics.exact_match],
    )


_add_all()
