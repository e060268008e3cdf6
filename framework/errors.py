"""The two ways a run may end badly, and how a wrong name is answered."""

import contextlib
import difflib
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence


class UserError(Exception):
    """What the user wrote or gave is wrong: one message (what, where, the nearest right thing), exit code 2."""


class EnvironmentFailure(Exception):
    """The machine failed (a peer process, the network): one message, exit code 1."""


@contextlib.contextmanager
def at_the_end(call: Callable[[], object]) -> Iterator[None]:
    """Makes a call when a `with` block ends, however it ends.

    Where an error ends it, that is what is told: not that the call failed as well, as everything does on a full disk.
    """
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError, EnvironmentFailure):
            call()
        raise
    call()


def report(error: BaseException) -> int:
    """Prints what ended a command to standard error, and returns its exit code.

    A user's mistake (2), a failure of the machine (1) and an interruption (130) get one line; an error of our own (1)
    its traceback, as all do with MESHWAY_TRACEBACK=1. Where the reader of our output has gone (141, as `cat` has it),
    nothing is said, nor any more.
    """
    if isinstance(error, BrokenPipeError) and mute():
        return 128 + signal.SIGPIPE
    expected = isinstance(error, (UserError, EnvironmentFailure))
    with contextlib.suppress(BrokenPipeError):  # nobody reads what goes wrong, and the exit code still tells
        if isinstance(error, KeyboardInterrupt):
            print("meshway: interrupted", file=sys.stderr, flush=True)
        elif not expected or os.environ.get("MESHWAY_TRACEBACK") == "1":
            traceback.print_exception(error)
        if expected:
            print(f"meshway: error: {error}", file=sys.stderr, flush=True)
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 2 if isinstance(error, UserError) else 1


def mute() -> bool:
    """Sends to nowhere what would go to a reader that has gone, as in `meshway ... | head -1`; returns whether any
    has. Python would complain about what it still holds back."""
    streams = select.poll()
    for number in (1, 2):
        streams.register(number, 0)
    gone = [number for number, event in streams.poll(0) if event & select.POLLERR]
    if gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in gone:
            os.dup2(nowhere, number)
        os.close(nowhere)
    return bool(gone)


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
