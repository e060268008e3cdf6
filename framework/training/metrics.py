"""Metrics on their way from the train step to people: (sum, weight) pairs, fetched late, without waiting."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from meshway.framework.interfaces import Metrics

_STEPS_A_SUM = 10


class MetricBuffer:
    """Keeps the metrics of each step on the device until a report asks for their means.

    The loop adds after each step, takes at a report's step, and asks the `Pending` for its values after it
    has dispatched one step more, so that the device always has work:

        pending = None
        for step in ...:
            state, metrics = train_step(state, batch)  # returns before the device has run it
            if pending: writers.write(pending.last_step, pending.result())
            buffer.add(step, metrics)
            pending = buffer.take() if step % report_period == 0 else None

    Every ten steps' pairs are summed on the device by one small jitted call, and the last few stay as they
    are: a period of any length compiles one program and leaves few arrays to fetch. Measured for 8 metrics
    and a period of 100 on 1 and on 8 simulated CPU devices, host time a step: 0.09 and 0.28 ms; with an
    addition at each step 0.10 and 0.70 ms; with nothing summed on the device 0.50 and 0.64 ms. Each process
    of a run must add and take at the same steps, since the sum is a program of all of them.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._sums: list[Metrics] = []
        self._recent: list[Metrics] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps `metrics` of `step`, the same names each time: replicated scalars. Never blocks."""
        self._steps.append(step)
        self._recent.append(metrics)
        if len(self._recent) == _STEPS_A_SUM:
            self._sums.append(_sum(self._recent))
            self._recent = []

    def take(self) -> "Pending":
        """Starts copying everything added since the last take to the host, and forgets it here. Never blocks.

        Raises:
          ValueError: nothing was added since the last take.
        """
        if not self._steps:
            raise ValueError("MetricBuffer.take: no step was added since the last take")
        pending = Pending(self._steps, self._sums + self._recent)
        self._steps, self._sums, self._recent = [], [], []
        return pending

    def reduce(self) -> dict[str, float]:
        """Returns the means of everything added since the last take, waiting for the last step if need be."""
        return self.take().result()

    def __len__(self) -> int:
        return len(self._steps)


class Pending:
    """The means over some steps, perhaps still being computed or copied.

    Attributes:
      first_step, last_step: the steps they are over, both included.
      num_steps: how many steps were added.
    """

    def __init__(self, steps: Sequence[int], metrics: Sequence[Metrics]) -> None:
        self.first_step, self.last_step, self.num_steps = steps[0], steps[-1], len(steps)
        self._pairs: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
        for step_metrics in metrics:
            for name, (total, weight) in step_metrics.items():
                pair = _local_copy(total), _local_copy(weight)
                self._pairs.setdefault(name, []).append(pair)

    def ready(self) -> bool:
        """Returns whether `result` would return without waiting."""
        last: list[Any] = [array for pairs in self._pairs.values() for array in pairs[-1]]
        return all(array.is_ready() for array in last)

    def result(self) -> dict[str, float]:
        """Returns name -> mean: the sum of the steps' sums over the sum of their weights, NaN for weight 0.

        Blocks only until the last of the steps has run.
        """
        return {name: _mean(pairs) for name, pairs in self._pairs.items()}


@jax.jit
def _sum(metrics: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *metrics)


def _local_copy(array: jax.Array) -> jax.Array:
    """Returns this process's copy of a replicated scalar, on one device, its transfer to the host begun."""
    if not isinstance(array, jax.Array):
        raise TypeError(f"a metric is a (sum, weight) pair of arrays, got {type(array).__name__}")
    local = array.addressable_data(0)
    local.copy_to_host_async()
    return local


def _mean(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> float:
    total = math.fsum(float(np.asarray(total)) for total, _ in pairs)
    weight = math.fsum(float(np.asarray(weight)) for _, weight in pairs)
    return total / weight if weight else math.nan
