"""What each stage of a pipeline has to hold, and what it holds beside that because all stages run one program.

In one program (GSPMD: Xu et al. 2021, arXiv:2105.04663, section 3.3) every device has arrays of the same shapes. What
belongs to the first stage (the tables that tokens are looked up in) or to the last (the logits, the last norm) is then
shared by all, or held by all; and a stage keeps activations of the time steps at which it is idle too.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from meshway.framework.partitioning.sharded_model import Row
from meshway.framework.planning.communication import Setting
from meshway.framework.planning.memory import Memory


@dataclasses.dataclass(frozen=True)
class Stage:
    """Bytes on a device of one stage.

    Attributes:
      number: from 0 on.
      layers: state and gradients of its layers.
      ends: those of what only the first or only the last stage uses, if it is that one; else 0.
      shared: what it holds of both ends in this program, whichever stage it is, and of the batch.
      activations: at the peak.
      idle: those of them that are of time steps at which it has nothing to do, about.
    """

    number: int
    layers: float
    ends: float
    shared: float
    activations: float
    idle: float

    @property
    def here(self) -> float:
        """All that it holds in this program; the same for every stage."""
        return self.layers + self.shared + self.activations

    @property
    def alone(self) -> float:
        """What it would hold in a program of its own, under the same schedule; activations of the ends as they are."""
        return self.layers + self.ends + self.activations - self.idle

    @property
    def waste(self) -> float:
        """What it holds and would not need."""
        return max(0.0, self.here - self.alone)


def stages_of(setting: Setting, rows: Iterable[Row], memory: Memory) -> tuple[Stage, ...]:
    """Returns the stages of a step, in order; none where the layout has none.

    Args:
      setting: of the step.
      rows: the tensors of its state (`program.explain`).
      memory: of a device.
    """
    count = setting.size(setting.stages)
    if count == 1:
        return ()
    looked_up = {lookup.weight.path for lookup in setting.uses.lookups}
    multiplied = {product.weight.path for product in setting.uses.products}
    shared = float(memory.batch)
    layers = first = last = 0.0
    for row in rows:
        kind, _, path = row.name.partition("/")
        if kind == "batch":
            continue
        held = row.bytes_per_device * (2 if kind == "params" else 1)  # and as much of its gradient
        if "layers" in row.axes:
            layers += held
            continue
        shared += held
        own = held * (count if _sharded_by(row, setting.mesh) & setting.stages else 1)
        name = next((each.path for each in setting.parameters if path.endswith(each.path)), path)
        first += own if name in looked_up else 0.0
        last += own if name in multiplied or name not in looked_up else 0.0
    times = max((times for axes, _, times in setting.uses.carried if set(axes) <= setting.stages), default=count)
    idle = memory.activations * (count - 1) / max(times, count)
    ends = {0: first, count - 1: last}
    return tuple(
        Stage(number, layers, ends.get(number, 0.0), shared, memory.activations, idle) for number in range(count)
    )


def _sharded_by(row: Row, mesh: Mapping[str, int]) -> set[str]:
    return set(mesh) & set(re.findall(r"\w+", row.spec))
