"""The key-value store by which the processes of a run communicate: that of jax's coordination service, in process 0."""

from typing import Any, Protocol

import jax
from jax._src import distributed as jax_distributed  # the store has no public name

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
