"""How long processes wait for each other: one place, one environment variable each."""

import dataclasses
import math
import os
from collections.abc import Mapping

from meshway.framework.errors import UserError


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
