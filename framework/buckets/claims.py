"""Claims: objects in buckets that stand for locks.

The holder renews its claim, and others may replace it, by its generation, once it is not renewed any more.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from meshway.framework import terminal
from meshway.framework.buckets.objects import LOST, BucketPath, Replaced, generation_of, put, read
from meshway.framework.errors import EnvironmentFailure, UserError

RENEWED_SECONDS = 10.0  # between two renewals
EXPIRES_SECONDS = 60.0  # without a renewal, after which a claim may be taken over
_POLL_SECONDS = 1.0


class Claim:
    """An object that says who holds a lock, renewed by a thread until it is given up."""

    def __init__(self, path: BucketPath, holder: Mapping[str, Any], generation: int) -> None:
        self._path, self._holder, self._generation = path, dict(holder), generation
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"claim on {path}", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: BucketPath, holder: Mapping[str, Any]) -> "Claim | None":
        """Takes the claim on a path; None where another process holds it.

        One whose holder does not run any more is taken over: at once where it ran on this machine, else once it has
        not been renewed for `EXPIRES_SECONDS`; until that is known, this waits.

        Args:
          path: the object.
          holder: what it tells of this process.
        """
        mine = {**holder, **_identity(), "renewals": 0}
        while True:
            there = _read_claim(path)
            if there is not None:
                said, generation, age = there
                if said and _is_same_machine(said):
                    if _runs(said):
                        return None
                elif age < EXPIRES_SECONDS:
                    with terminal.stage(f"waiting whether {_name(said)} still holds {path}"):
                        ended = time.monotonic() + EXPIRES_SECONDS - age
                        if _is_renewed(path, generation, ended):
                            return None
                        if _read_claim(path) is None:
                            continue
            with contextlib.suppress(Replaced):
                return cls(path, mine, put(path, _encoded(mine), there[1] if there else 0))

    def close(self) -> None:
        """Gives the claim up."""
        self._ended.set()
        self._thread.join()
        if str(self._path) in LOST:
            LOST.discard(str(self._path))
            return
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self._path.remove_generation(self._generation)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED_SECONDS):
            self._holder["renewals"] += 1
            try:
                self._generation = put(self._path, _encoded(self._holder), self._generation)
            except Replaced:
                LOST.add(str(self._path))
                return
            except (EnvironmentFailure, UserError):
                continue  # the requests of the work itself tell it


def claimed_by(path: BucketPath) -> Mapping[str, Any] | None:
    """Returns what a claim tells of its holder; None for no claim, or one that has expired."""
    there = _read_claim(path)
    if there is None or there[2] >= EXPIRES_SECONDS or (_is_same_machine(there[0]) and not _runs(there[0])):
        return None
    return there[0]


def _read_claim(path: BucketPath) -> tuple[Mapping[str, Any], int, float] | None:
    """Returns (what a claim tells, its generation, the seconds since it was renewed by the store's clock), or None."""
    try:
        content, headers = read(path)
    except FileNotFoundError:
        return None
    said: Any = {}
    with contextlib.suppress(ValueError):
        said = json.loads(content)
    age = parsedate_to_datetime(headers["Date"]) - parsedate_to_datetime(headers["Last-Modified"])
    return said if isinstance(said, dict) else {}, generation_of(headers), age.total_seconds()


def _is_renewed(path: BucketPath, generation: int, until: float) -> bool:
    """Returns whether a claim is renewed before a time; False as well where it is given up."""
    while time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
        there = _read_claim(path)
        if there is None:
            return False
        if there[1] != generation:
            return True
    return False


def _encoded(claim: Mapping[str, Any]) -> bytes:
    return json.dumps(claim).encode()


def _name(said: Mapping[str, Any]) -> str:
    return f"process {said.get('pid', '?')} on {said.get('host', 'an unknown host')}"


def _identity() -> dict[str, Any]:
    """Returns what tells this process from all others of all machines; {} where the system does not say it."""
    with contextlib.suppress(OSError):
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
        return {"machine": machine, "ticks": _began(os.getpid())}
    return {}


def _is_same_machine(said: Mapping[str, Any]) -> bool:
    return bool(mine := _identity().get("machine")) and said.get("machine") == mine


def _runs(said: Mapping[str, Any]) -> bool:
    """Whether the process of this machine that a claim tells of still runs."""
    return isinstance(pid := said.get("pid"), int) and _began(pid) == said.get("ticks")


def _began(pid: int) -> int | None:
    """Returns when a process began, in ticks since the system did; None where there is none, or it only waits to be
    reaped."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])
