"""Points that every process must reach, and how long processes wait for each other."""

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping

from meshway.framework.distributed.store import Store
from meshway.framework.errors import EnvironmentFailure, UserError


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """All in seconds.

    Attributes:
      start: for every process to have come to process 0 (MESHWAY_START_SECONDS).
      heartbeat: of silence after which a process is missing, and the others stop (MESHWAY_HEARTBEAT_SECONDS).
      agreement: for every process to have said what its recipe is (MESHWAY_AGREEMENT_SECONDS).
      hang: without a step, evaluations and checkpoints apart, after which a run gives up (MESHWAY_HANG_SECONDS).
    """

    start: float = 300.0
    heartbeat: float = 30.0
    agreement: float = 600.0
    hang: float = 1800.0

    @property
    def survivors(self) -> float:
        """Within which every survivor of a process that is killed, stopped or cut off has ended."""
        return 1.5 * self.heartbeat + 5.0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Deadlines":
        """Reads what the environment sets; raises UserError for what is no number above 0."""
        given: dict[str, float] = {}
        for field in dataclasses.fields(cls):
            variable = f"MESHWAY_{field.name.upper()}_SECONDS"
            if not (text := environment.get(variable, "")):
                continue
            try:
                given[field.name] = float(text)
            except ValueError:
                given[field.name] = math.nan
            if not 0 < given[field.name] < math.inf:
                raise UserError(f"{variable}={text!r} is not a number of seconds above 0")
        return cls(**given)


_SAY_SECONDS = 30.0
_uses: collections.Counter[str] = collections.Counter()  # a name may come again: each use has keys of its own


def barrier(
    store: Store,
    process_id: int,
    num_processes: int,
    name: str,
    seconds: float | None,
    value: str = "",
    waiting: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[int, str]:
    """Waits until all processes have come to `name`, and returns what each has brought, by process.

    Process 0 counts and tells the others. All of them must come to barriers of one name in the same order.

    Args:
      store: what they have in common.
      process_id, num_processes: which this one is, and of how many.
      name: what is waited for, for messages.
      seconds: how long; None: until the heartbeats' watch ends the wait.
      value: what this process brings.
      waiting: called now and then meanwhile, except in process 0.
      clock, sleep: for tests.

    Raises:
      EnvironmentFailure: some did not come in time; it names them.
    """
    _uses[name] += 1
    folder = f"barrier/{name}/{_uses[name]}"
    done = f"barrier-done/{name}/{_uses[name]}"
    store.set(f"{folder}/{process_id}", value)
    end = None if seconds is None else clock() + seconds
    if process_id == 0:
        pause = 0.02
        while (missing := set(range(num_processes)) - _come(store.list(folder))) and (end is None or clock() < end):
            sleep(pause)
            pause = min(2 * pause, 1.0)
        store.set(done, json.dumps(sorted(missing)))
    else:
        missing = _await_word(store, done, seconds, waiting, clock)
    if missing:
        raise EnvironmentFailure(
            f"{named(missing, num_processes)} did not come to {name!r} within {seconds:g} s of process 0"
        )
    return {int(process): brought for process, brought in store.list(folder).items()}


def _await_word(
    store: Store, key: str, seconds: float | None, waiting: Callable[[], None], clock: Callable[[], float]
) -> set[int]:
    """Returns whom process 0 missed: itself, if it does not say. It may come last, and then waits for the others."""
    end = math.inf if seconds is None else clock() + 2 * seconds
    while (left := end - clock()) > 0:
        if (said := store.wait(key, min(left, _SAY_SECONDS))) is not None:
            return set(json.loads(said))
        waiting()
    return {0}


def named(processes: Iterable[int], num_processes: int) -> str:
    """Returns `process 2 of 4` or `processes 2, 3 of 4`; no more than eight are listed."""
    listed = sorted(processes)
    words = ", ".join(map(str, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return f"process{'es' if len(listed) > 1 else ''} {words} of {num_processes}"


def _come(keys: Iterable[str]) -> set[int]:
    return {int(key) for key in keys}
