"""Metrics of predictions, 0 to 100."""

import collections
import re
from collections.abc import Sequence
from typing import Any

from meshway.tasks.registry import not_installed


def token_f1(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the mean F1 of the words each prediction shares with its target, ignoring case and punctuation."""
    return {"token_f1": _mean([_f1(t, p) for t, p in zip(targets, predictions, strict=True)])}


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the share of predictions equal to their target, ignoring white space."""
    return {"exact_match": _mean([t.split() == p.split() for t, p in zip(targets, predictions, strict=True)])}


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
    """Returns the share of predictions, class numbers, that equal their target."""
    return {"accuracy": _mean([int(t) == int(p) for t, p in zip(targets, predictions, strict=True)])}


def chrf(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the corpus's chrF (Popovic 2015), the F score of character n-grams up to 6, as sacrebleu computes it.

    Raises:
      ValueError: sacrebleu is not installed.
    """
    try:
        import sacrebleu
    except ImportError as error:
        raise not_installed("sacrebleu", "gettext") from error
    return {"chrf": sacrebleu.corpus_chrf(list(predictions), [list(targets)]).score if targets else 0.0}


def _f1(target: str, prediction: str) -> float:
    wanted, found = (collections.Counter(re.findall(r"\w+", text.lower())) for text in (target, prediction))
    if not wanted or not found:
        return float(wanted == found)
    shared = (wanted & found).total()
    return 2 * shared / (wanted.total() + found.total())


def _mean(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values) if values else 0.0
