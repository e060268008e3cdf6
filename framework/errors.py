"""The two ways a run may end badly, and how a wrong name is answered."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What the user wrote or gave is wrong: one message (what, where, the nearest right thing), exit code 2."""


class EnvironmentFailure(Exception):
    """The machine failed (a peer process, the network): one message, exit code 1."""


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ``"; did you mean 'x'?"`` for the candidates nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
