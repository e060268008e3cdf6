"""The two ways a run may end badly, and how a wrong name is answered."""

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """What the user wrote or gave is wrong: one message (what, where, the nearest right thing), exit code 2."""


class EnvironmentFailure(Exception):
    """The machine failed (a peer process, the network): one message, exit code 1."""


def report(error: BaseException) -> int:
    """Prints what ended a command to standard error, and returns its exit code.

    A user's mistake (2), a failure of the machine (1) and an interruption (130) get one line; an error of our own (1)
    its traceback, as all do with MESHWAY_TRACEBACK=1.
    """
    if isinstance(error, KeyboardInterrupt):
        print("meshway: interrupted", file=sys.stderr)
        return 130
    expected = isinstance(error, (UserError, EnvironmentFailure))
    if not expected or os.environ.get("MESHWAY_TRACEBACK") == "1":
        traceback.print_exception(error)
    if expected:
        print(f"meshway: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, UserError) else 1


def nearest_steps(step: int, steps: Sequence[int], limit: int = 6) -> str:
    """Returns the steps nearest to one that is not among them, in words; `steps` are ascending, and some."""
    near = sorted(sorted(steps, key=lambda other: abs(other - step))[:limit])
    if len(near) == len(steps):
        return f"there are {near}"
    return f"the nearest are {near}, of {len(steps)} in all"


def first_line(error: BaseException) -> str:
    """Returns what another library's error says, in one line of at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    # TensorStore ends its messages with all of what it was asked to open.
    return text.splitlines()[0].partition(" [tensorstore_spec=")[0][:300]


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ``"; did you mean 'x'?"`` for the candidates nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
