"""The key-value store by which the processes of a run communicate (that of jax's coordination service, in process 0),
barriers that every process must reach, and how long processes wait for each other."""

import collections
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
from jax._src import distributed as jax_distributed  # the store has no public name

from meshway.framework.errors import EnvironmentFailure, UserError
from meshway.framework.terminal import listed

_PREFIX = "meshway/"


class Store(Protocol):
    """Short texts by key, shared by all processes. Any call may raise, or hang, when process 0 is gone."""

    def set(self, key: str, value: str) -> None:
        """Writes a value, replacing the one before."""
        ...

    def claim(self, key: str, value: str) -> bool:
        """Writes a value if the key has none; returns whether it did."""
        ...

    def get(self, key: str) -> str | None:
        """Returns the value, None if there is none."""
        ...

    def list(self, folder: str) -> dict[str, str]:
        """Returns the values under `folder`/, by the rest of their keys."""
        ...

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns the value as soon as there is one; None if there is none in time."""
        ...


def place() -> tuple[int, int]:
    """Returns (process id, number of processes) once joined; `jax.process_index` would wait for all processes'
    devices."""
    return jax_distributed.global_state.process_id, jax_distributed.global_state.num_processes


class CoordinationStore:
    """The store of this run, once `jax.distributed.initialize` has joined it."""

    def __init__(self) -> None:
        self._client: Any = jax_distributed.global_state.client

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(_PREFIX + key, value, allow_overwrite=True)

    def claim(self, key: str, value: str) -> bool:
        try:
            self._client.key_value_set(_PREFIX + key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
            return False
        return True

    def get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(_PREFIX + key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def list(self, folder: str) -> dict[str, str]:
        prefix = f"{_PREFIX}{folder}/"
        return {key.removeprefix(prefix): value for key, value in self._client.key_value_dir_get(prefix)}

    def wait(self, key: str, seconds: float) -> str | None:
        try:
            return self._client.blocking_key_value_get(_PREFIX + key, int(seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None


@dataclasses.dataclass(frozen=True)
class Deadlines:
    """How long processes wait, all in seconds.

    Attributes:
      start: until every process has connected to process 0 (MESHWAY_START_SECONDS).
      heartbeat: without a heartbeat until a process counts as missing and the others stop (MESHWAY_HEARTBEAT_SECONDS).
      agreement: until every process has sent its recipe for comparison (MESHWAY_AGREEMENT_SECONDS).
      hang: for one step, without evaluations and checkpoints, until the run is stopped (MESHWAY_HANG_SECONDS).
    """

    start: float = 300.0
    heartbeat: float = 30.0
    agreement: float = 600.0
    hang: float = 1800.0

    @property
    def survivors(self) -> float:
        """The time in which all other processes end once one is killed, stopped or cut off from the network."""
        return 1.5 * self.heartbeat + 5.0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Deadlines":
        """Returns the defaults, replaced by the variables of the environment.

        Raises:
          UserError: a variable is not a number above 0.
        """
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


_WAIT_SECONDS = 30.0  # between calls of `waiting`
_uses: collections.Counter[str] = collections.Counter()  # a name may be used again: each use has its own keys


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
    """Waits until all processes have reached `name`; returns the value of each, by process.

    Process 0 counts and tells the others. All of them must reach barriers of one name in the same order.

    Args:
      store: shared by the processes.
      process_id, num_processes: this process's number, and the number of processes.
      name: what is waited for, for messages.
      seconds: how long; None: until `watch.Watch` ends the process because another one is missing.
      value: this process's value.
      waiting: called now and then meanwhile, except in process 0.
      clock, sleep: for tests.

    Raises:
      EnvironmentFailure: some did not reach it in time; names them.
    """
    _uses[name] += 1
    folder = f"barrier/{name}/{_uses[name]}"
    done = f"barrier-done/{name}/{_uses[name]}"
    store.set(f"{folder}/{process_id}", value)
    end = None if seconds is None else clock() + seconds
    if process_id == 0:
        pause = 0.02
        while (missing := set(range(num_processes)) - _arrived(store.list(folder))) and (end is None or clock() < end):
            sleep(pause)
            pause = min(2 * pause, 1.0)
        store.set(done, json.dumps(sorted(missing)))
    else:
        missing = _await_result(store, done, seconds, waiting, clock)
    if missing:
        raise EnvironmentFailure(
            f"{named(missing, num_processes)} did not reach {name!r} within {seconds:g} s of process 0"
        )
    return {int(process): value for process, value in store.list(folder).items()}


def _await_result(
    store: Store, key: str, seconds: float | None, waiting: Callable[[], None], clock: Callable[[], float]
) -> set[int]:
    """Returns the processes that process 0 did not see, {0} if it sends no result.

    Process 0 may arrive last and then wait for the others: hence twice the time.
    """
    end = math.inf if seconds is None else clock() + 2 * seconds
    while (left := end - clock()) > 0:
        if (result := store.wait(key, min(left, _WAIT_SECONDS))) is not None:
            return set(json.loads(result))
        waiting()
    return {0}


def named(processes: Iterable[int], num_processes: int) -> str:
    """Returns `process 2 of 4` or `processes 2, 3 of 4`; lists at most eight."""
    numbers = sorted(processes)
    return f"process{'es' if len(numbers) > 1 else ''} {listed(numbers)} of {num_processes}"


def _arrived(keys: Iterable[str]) -> set[int]:
    return {int(key) for key in keys}
