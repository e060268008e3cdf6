"""Which cases of a parametrised test run when: quick ones in `make test`, slow ones in `make slow`, the rest in
`make proofs`."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest


def tiers(cases: Iterable[Any], quick: Iterable[Any] = (), slow: Iterable[Any] = ()) -> list:
    """Returns the cases of a full product, each marked by the tier it belongs to.

    Args:
      cases: what `pytest.mark.parametrize` takes: values, or tuples of values.
      quick: those of them that run always.
      slow: those that run in CI; all others are proofs, run by hand before an issue is resolved.

    Raises:
      ValueError: a quick or slow one is not among the cases.
    """
    cases, quick, slow = list(cases), list(quick), list(slow)
    if unknown := [case for case in (*quick, *slow) if case not in cases]:
        raise ValueError(f"not among the cases: {unknown}")

    def mark(case):
        if case in quick:
            return ()
        return pytest.mark.slow if case in slow else pytest.mark.proofs

    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=mark(case)) for case in cases]


def pairwise(
    options: Mapping[str, Sequence[Any]],
    of: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
) -> list[dict[str, Any]]:
    """Returns few members of the product of `options` in which any two values of two options meet.

    Greedy: each takes the member of the product that holds most pairs not yet met, the first one of several.

    Args:
      options: name -> its values.
      of: what must meet, of a member: itself, or the parts that its values are made of, where it is by these that
        options touch each other.
    """
    names = list(options)
    product = [dict(zip(names, values)) for values in itertools.product(*options.values())]

    def pairs(member):
        return frozenset(itertools.combinations([(name, repr(value)) for name, value in of(member).items()], 2))

    held = [(member, pairs(member)) for member in product]
    missing = set().union(*(each for _, each in held))
    chosen = []
    while missing:
        best, met = max(held, key=lambda each: len(each[1] & missing))
        chosen.append(best)
        missing -= met
    return chosen
