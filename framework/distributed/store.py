"""What the processes of a run tell each other by: the key-value store of jax's coordination service, in process 0."""

from typing import Any, Protocol

import jax
from jax._src import distributed as jax_distributed  # the store has no public name

_PREFIX = "meshway/"


class Store(Protocol):
    """Short texts by key, the same for every process. Each call may raise, or hang, when process 0 is gone."""

    def set(self, key: str, value: str) -> None:
        """Writes, over what was there."""
        ...

    def claim(self, key: str, value: str) -> bool:
        """Writes if nobody has; returns whether this call did."""
        ...

    def get(self, key: str) -> str | None:
        """Returns the value, None where there is none."""
        ...

    def list(self, folder: str) -> dict[str, str]:
        """Returns what lies under `folder`/, by the rest of its key."""
        ...

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns the value as soon as there is one; None after so many seconds."""
        ...


def place() -> tuple[int, int]:
    """Returns (process id, number of processes) once joined; `jax.process_index` would wait for all to have devices."""
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
