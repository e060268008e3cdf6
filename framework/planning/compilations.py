"""How many programs are compiled in a while: a job that pads to few lengths compiles none after its first batches."""

from typing import Any

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"  # of each program, found in the persistent cache or not


class Compilations:
    """Counts programs that this process compiles, in any thread, inside a `with` block.

    Attributes:
      count: so far.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        self.count += event == _EVENT
