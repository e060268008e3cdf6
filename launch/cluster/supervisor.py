"""Starting a run again after a failure: it goes on from its last complete checkpoint."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from meshway.framework.distributed.barrier import Deadlines
from meshway.framework.distributed.watch import LOST_A_PEER
from meshway.framework.files import local_path
from meshway.launch.cluster.children import Child, Children, Notice

_FINAL = (0, 2, 130)  # done; a user's mistake, which another try repeats; an interruption
_PAUSE_SECONDS = 1.0  # before another try


def supervise(words: Sequence[str], restarts: int) -> int:
    """Runs `meshway WORDS` in one process, as one of a cluster's, and again up to `restarts` times when it fails.

    The others' supervisors do the same: a lost process ends them all, and their next attempts meet at process 0.
    SIGTERM and Ctrl-C are handed on, for the run to save and stop; a second one ends it.

    Returns:
      the exit code of the last attempt; 128 and the number for one that was killed by a signal. A run that was told to
      stop exits with 143 (130 by Ctrl-C) even if it saved: a cluster that preempts a host must not take it for done.
    """

    def attempt(number: int) -> Children:
        return Children([Child(0, words)], os.environ, grace=0.0)

    return run_attempts(attempt, restarts, model_directory(words), stopped_code=128 + signal.SIGTERM)


def run_attempts(
    attempt: Callable[[int], Children], restarts: int, model_dir: Path | None, stopped_code: int = 0
) -> int:
    """Runs attempts until one ends well, ends by a user's mistake or a signal, or none is left.

    Args:
      attempt: makes the processes of attempt 0, 1, ...
      restarts: how many may follow the first.
      model_dir: where checkpoints are, for messages; None if unknown.
      stopped_code: returned where SIGTERM made the run stop, and it did so well; 130 where Ctrl-C did.
    """
    with Notice() as notice:
        for number in range(restarts + 1):
            children = attempt(number)
            begin = time.monotonic()
            children.start(f"attempt {number + 1} of {restarts + 1}")
            children.wait(notice)
            code, cause = verdict(children)
            if code in _FINAL or notice.count:
                if code:
                    say(cause)
                return code or notice.code(stopped_code)
            say(f"attempt {number + 1} of {restarts + 1} ended after {time.monotonic() - begin:.0f} s: {cause}")
            if number < restarts:
                say(f"starting again, from {_last_checkpoint(model_dir)}; restarts left: {restarts - number - 1}")
                time.sleep(_PAUSE_SECONDS)
    return code


def verdict(children: Children) -> tuple[int, str]:
    """Returns the exit code of an attempt that has ended, and why: the first end that was not another's doing."""
    ended = children.ended
    final = [child for child in ended if child.code in _FINAL and child.code]
    own = [child for child in ended if child.code not in (0, LOST_A_PEER) and not child.ended_by_us]
    survivors = [child for child in ended if child.code == LOST_A_PEER]
    hung = [child for child in ended if child.ended_by_us]
    for first in [*final, *own, *hung, *survivors][:1]:
        causes = [first, *survivors[:1]] if first.code != LOST_A_PEER or first.ended_by_us else [first]
        code = LOST_A_PEER if first.ended_by_us else first.code or 0
        return (code if code >= 0 else 128 - code), "; ".join(cause.outcome() for cause in causes)
    return 0, ""


def model_directory(words: Sequence[str]) -> Path | None:
    """Returns the run directory that a command names; None where only its recipe does."""
    flags = ("--gin.MODEL_DIR=", "--model_dir=")
    values = [word.partition("=")[2] for word in words if word.startswith(flags)]
    return local_path(values[-1].strip("'\"")) if values else None


def say(text: str) -> None:
    """Prints a line to standard error."""
    print(f"meshway: {text}", file=sys.stderr, flush=True)


def grace() -> float:
    """Returns the seconds within which survivors of a lost process end by themselves."""
    return Deadlines.of().survivors


def _last_checkpoint(model_dir: Path | None) -> str:
    """Says where a run goes on: only complete checkpoints have a bare number for a name."""
    if model_dir is None:
        return "the last complete checkpoint"
    steps = [int(path.name) for path in (model_dir / "checkpoints").glob("*") if path.name.isdecimal()]
    return f"step {max(steps)}" if steps else "the beginning"
