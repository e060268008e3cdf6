"""The two kinds of errors of a run, how they are reported, and suggestions for wrong names."""

import contextlib
import difflib
import functools
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake in the user's input: one message (what, where, the nearest right value), exit code 2."""


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
    """Prints the error that ended a command to standard error, and returns the exit code.

    A user's mistake (2), a failure of the machine (1) and an interruption (130) get one line; any other error (1) its
    traceback, as do all with MESHWAY_TRACEBACK=1. If the reader of our output is gone (141, as for `cat`), nothing is
    printed.
    """
    if isinstance(error, BrokenPipeError) and mute():
        return 128 + signal.SIGPIPE
    expected = isinstance(error, (UserError, EnvironmentFailure))
    with contextlib.suppress(BrokenPipeError):  # standard error has no reader: the exit code remains
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
    """Redirects output to os.devnull if its reader is gone, as in `meshway ... | head -1`; returns whether it was.

    Otherwise Python reports an error when it flushes its buffers at exit.
    """
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


def described(error: BaseException) -> str:
    """Returns the kind of an error and the first line of its message: what is told of an error in a user's own code."""
    return f"{type(error).__name__}: {first_line(error)}"


def nearest_steps(step: int, steps: Sequence[int], limit: int = 6) -> str:
    """Returns in words the steps nearest to one that is not among `steps`, which are ascending and not empty."""
    near = sorted(sorted(steps, key=lambda other: abs(other - step))[:limit])
    if len(near) == len(steps):
        return f"there are {near}"
    return f"the nearest are {near}, of {len(steps)} in all"


def first_line(error: BaseException) -> str:
    """Returns the message of another library's error, in one line of at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    # TensorStore appends the whole spec that it was asked to open.
    return text.splitlines()[0].partition(" [tensorstore_spec=")[0][:300]


def did_you_mean(name: str, candidates: Iterable[str], limit: int = 3) -> str:
    """Returns ``"; did you mean 'x'?"`` for the candidates nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(candidates), n=limit, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(repr(n) for n in near) + "?"


def nearest_names(name: str, candidates: list[str], limit: int = 3) -> list[str]:
    """Returns the candidates most like a parameter's path."""
    return difflib.get_close_matches(name, candidates, n=limit, cutoff=0.3)


def innermost(error: BaseException) -> BaseException:
    """Returns the first cause of an Orbax error: it names the file or the array, the error itself only an index."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@functools.cache
def quiet_closed_loops() -> None:
    """Drops the tracebacks after a failed read: Orbax closes its event loop and leaves its coroutines, and each array
    whose read ends after that, and each coroutine that is thrown away, raises another error."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        closed = isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"
        left = getattr(getattr(found.object, "cr_code", None), "co_filename", "")  # of a coroutine
        if not closed and "orbax" not in Path(left).parts:
            before(found)

    sys.unraisablehook = hook
