"""How one process tells the others that the run ends, and why."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Collection

from meshway.framework.distributed.store import Store

_TELLING_SECONDS = 3.0  # a store that is gone may hang a call


@dataclasses.dataclass(frozen=True)
class Alarm:
    """Why the run ends, as the first that noticed put it; `code` is that process's exit code, 0 of a run that
    ends well."""

    process_id: int
    code: int
    message: str


class Alarms:
    """The one alarm of a run, and who has heard it."""

    def __init__(self, store: Store, process_id: int, num_processes: int) -> None:
        self._store, self._process_id, self._num_processes = store, process_id, num_processes

    def sound(self, code: int, message: str, absent: Collection[int] = ()) -> None:
        """Tells all processes; the first alarm of a run is the one they hear.

        Process 0 holds the store, so it stays until all but the `absent` have heard, or a few seconds.
        """
        alarm = Alarm(self._process_id, code, message)
        _briefly(lambda: self._store.claim("alarm", json.dumps(dataclasses.asdict(alarm))))
        self.acknowledge(absent)

    def silence(self) -> None:
        """Ends everybody's waiting for an alarm: the run has ended well."""
        self._store.claim("alarm", json.dumps(dataclasses.asdict(Alarm(self._process_id, 0, ""))))

    def hear(self, seconds: float) -> Alarm | None:
        """Waits for the alarm, so many seconds at most."""
        said = self._store.wait("alarm", seconds)
        return None if said is None else Alarm(**json.loads(said))

    def acknowledge(self, absent: Collection[int] = ()) -> None:
        """Lets process 0 know that this one has heard; process 0 itself waits for the others."""
        _briefly(lambda: self._store.set(f"heard/{self._process_id}", ""))
        if self._process_id == 0:
            _briefly(lambda: self._linger(absent))

    def _linger(self, absent: Collection[int]) -> None:
        end = time.monotonic() + _TELLING_SECONDS
        while time.monotonic() < end:
            gone = self._store.list("heard").keys() | {str(each) for each in absent}
            if len(gone) >= self._num_processes:
                return
            time.sleep(0.05)


def _briefly(work: Callable[[], object]) -> None:
    """Runs what may fail or hang once process 0 is gone; then there is nobody to tell."""

    def attempt() -> None:
        try:
            work()
        except Exception:
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(_TELLING_SECONDS)
