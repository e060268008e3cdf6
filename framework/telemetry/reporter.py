"""Reports of a running training: metrics fetched late, without blocking, rates, and the progress display."""

import contextlib
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np

from meshway.framework.interfaces import Metrics, Writer
from meshway.framework.progress import Bar, Display, Screen
from meshway.framework.telemetry.profiler import memory_in_use
from meshway.framework.telemetry.timeline import Timeline

_STEPS_PER_SUM = 10


class MetricBuffer:
    """Keeps the metrics of each step on the device until a report asks for their means.

    The loop adds after each step, takes at a report's step, and reads the `Pending` after it has dispatched one more
    step, so that the device always has work:

        pending = None
        for step in ...:
            state, metrics = train_step(state, batch)  # returns before the device has run it
            if pending: writers.write(pending.last_step, pending.result())
            buffer.add(step, metrics)
            pending = buffer.take() if step % report_period == 0 else None

    The pairs of every ten steps are summed on the device by one small jitted call, and the last few are kept as they
    are: a period of any length compiles one program and leaves few arrays to fetch. Host time per step, measured for 8
    metrics and a period of 100 on 1 and on 8 simulated CPU devices: 0.09 and 0.28 ms; with an addition at each step
    0.10 and 0.70 ms; with nothing summed on the device 0.50 and 0.64 ms. All processes of a run must add and take at
    the same steps, since the sum is a program of all of them.
    """

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._sums: list[Metrics] = []
        self._recent: list[Metrics] = []

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps `metrics` of `step`, the same names each time: replicated scalars. Never blocks."""
        self._steps.append(step)
        self._recent.append(metrics)
        if len(self._recent) == _STEPS_PER_SUM:
            self._sums.append(_sum(self._recent))
            self._recent = []

    def take(self) -> "Pending":
        """Starts copying everything added since the last take to the host, and empties the buffer. Never blocks.

        Raises:
          ValueError: nothing was added since the last take.
        """
        if not self._steps:
            raise ValueError("MetricBuffer.take: no step was added since the last take")
        pending = Pending(self._steps, self._sums + self._recent)
        self._steps, self._sums, self._recent = [], [], []
        return pending

    def reduce(self) -> dict[str, float]:
        """Returns the means of everything added since the last take, after waiting for the last step."""
        return self.take().result()

    def __len__(self) -> int:
        return len(self._steps)


class Pending:
    """The means over some steps, which may still be being computed or copied.

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

    def unmeasured(self) -> set[str]:
        """Returns the metrics that none of the steps had, which have weight 0 in all; blocks as `result`."""
        return {name for name, pairs in self._pairs.items() if not any(float(np.asarray(pair[1])) for pair in pairs)}


@jax.jit
def _sum(metrics: list[Metrics]) -> Metrics:
    return jax.tree.map(lambda *values: sum(values[1:], values[0]), *metrics)


def _local_copy(array: jax.Array) -> jax.Array:
    """Starts copying a replicated scalar to the host; returns this process's copy of it on one device."""
    if not isinstance(array, jax.Array):
        raise TypeError(f"a metric is a (sum, weight) pair of arrays, got {type(array).__name__}")
    local = array.addressable_data(0)
    local.copy_to_host_async()
    return local


def _mean(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> float:
    total = math.fsum(float(np.asarray(total)) for total, _ in pairs)
    weight = math.fsum(float(np.asarray(weight)) for _, weight in pairs)
    return total / weight if weight else math.nan


class Progress(Display):
    """Shows how far a run is, how it does and when it ends.

    A log has a line for each report. All goes to standard output, notes included, unless `screen` says otherwise. It
    is what a `Writer` is, so that it can stand in a list of writers.
    """

    stays = True

    def __init__(
        self, total_steps: int, start_step: int = 0, *, peak_name: str = "mfu", **screen: Unpack[Screen]
    ) -> None:
        """Starts the display.

        Args:
          total_steps: the step at which the run ends.
          start_step: the step it starts from, above 0 after a restart.
          peak_name: what the scalar `mfu` is a share of: "mfu", or "of matmul peak" where it was measured.
          screen: where to write.
        """
        self._total_steps, self._step, self._reported_step = total_steps, start_step, start_step
        self._peak_name = peak_name
        self._clock = time.monotonic()
        self._step_seconds: float | None = None
        self._scalars: Mapping[str, float] = {}
        super().__init__(sys.stdout, **screen)
        self.start()

    def advance(self, step: int) -> None:
        """Moves the bar of a terminal to `step`; costs next to nothing, so call it at every step."""
        self._step = step

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows a report: loss, learning_rate, tokens_per_second, mfu, data_wait_fraction, as far as given.

        Time left is counted by `step_seconds`, or by the clock between reports where that is missing.
        """
        now = time.monotonic()
        elapsed = (now - self._clock) / max(step - self._reported_step, 1)
        self._step_seconds = scalars.get("step_seconds", elapsed)
        self._reported_step, self._clock, self._scalars = step, now, scalars
        self._step = max(self._step, step)
        self.print_line()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """The same as `update`, under the name that a `Writer` has."""
        self.update(step, scalars)

    def bar(self) -> Bar:
        # A report may come after later steps have been dispatched; a log names the step it is of.
        step = self._reported_step if self.is_log else self._step
        rest = max(self._total_steps - self._step, 0)
        left = None if self._step_seconds is None else rest * self._step_seconds
        return Bar(f"step {step}/{self._total_steps}", step, max(self._total_steps, 1), left, self._numbers())

    def _numbers(self) -> list[str]:
        """Returns the scalars worth a glance as short texts, in a fixed order."""
        scalars = self._scalars
        shown = []
        if "loss" in scalars:
            shown.append(f"loss {scalars['loss']:.4g}")
        if "learning_rate" in scalars:
            shown.append(f"lr {scalars['learning_rate']:.1e}")
        if "tokens_per_second" in scalars:
            shown.append(f"{scalars['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in scalars:
            share = f"{100 * scalars['mfu']:.1f}%"
            shown.append(f"mfu {share}" if self._peak_name == "mfu" else f"{share} {self._peak_name}")
        if "data_wait_fraction" in scalars:
            shown.append(f"data wait {100 * scalars['data_wait_fraction']:.1f}%")
        return shown


class StepClock:
    """Tracks, in its own thread, when the steps of this process's devices finish.

    Waiting for data costs nothing while a step still runs: a loop whose batches take 1.1 times a step waits nearly all
    the time, and its devices are idle for a tenth of it. Telling the two apart takes the time at which a step finished.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[jax.Array | None] = queue.SimpleQueue()
        self._started, self._finished, self._time = 0, 0, time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="step clock", daemon=True)
        self._thread.start()

    def started(self, output: jax.Array) -> None:
        """Call when a step has been dispatched, with one of its outputs on one device, which is never donated."""
        self._started += 1
        self._queue.put(output)

    def idle_since(self) -> float | None:
        """Returns when the last step finished, by `time.perf_counter`; None while a step is unfinished."""
        return self._time if self._finished == self._started else None

    def close(self) -> None:
        """Lets the thread end once the steps given to it are done; does not wait for that."""
        self._queue.put(None)

    def _run(self) -> None:
        while (output := self._queue.get()) is not None:
            with contextlib.suppress(Exception):  # of a failed step: reading its metrics raises it
                output.block_until_ready()
            self._time = time.perf_counter()
            self._finished += 1


class Reporter:
    """Collects metrics and times; writes one report per period, one step late so that the device never waits."""

    def __init__(
        self,
        writer: Writer,
        progress: Progress,
        timeline: Timeline,
        flops_per_step: Callable[[int], float],
        peak_flops: float,
        devices: Sequence[Any] = (),
    ):
        """`flops_per_step`, by a step's number, over `peak_flops`, the matmul peak of all devices together in FLOP/s,
        gives `mfu`; `devices`, those of this process, are asked for their memory. A report leaves out metrics that none
        of its steps measured, as `training.step.WeightStatistics` does at some steps only."""
        self._writer, self._progress, self._timeline = writer, progress, timeline
        self._flops, self._peak, self._devices = flops_per_step, peak_flops, devices
        self._buffer = MetricBuffer()
        self._pending: tuple[int, Pending | None, dict[str, float]] | None = None
        self._reported: tuple[int, Mapping[str, float | None]] | None = None
        self._before = timeline.seconds()  # of each phase, when the last report was written
        self._clock = StepClock()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes a step's metrics, after writing a report that is due. Never waits for this step."""
        self.flush()
        self._clock.started(next(iter(metrics.values()))[0].addressable_data(0))
        self._buffer.add(step, metrics)
        self._progress.advance(step)
        self._timeline.reached(step)

    def report(self, step: int, extra: Mapping[str, float] = {}) -> None:
        """Makes a report of the steps since the last one; it is written once the next step has been dispatched."""
        self.flush()
        pending = self._buffer.take() if len(self._buffer) else None
        self._pending = (step, pending, dict(extra))

    def evaluated(self, step: int, scalars: Mapping[str, float]) -> None:
        """Reports an evaluation together with the steps before it: each step has one line."""
        self.report(step, scalars)
        shown = {
            name: value
            for name, value in scalars.items()
            if name.count("/") == 1 or ("loss" not in name and "/router/" not in name)
        }
        text = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in sorted(shown.items()))
        self._progress.note(f"step {step}  validation: {text}")

    def flush(self) -> None:
        """Writes the report that is due, if one is, after waiting for its last step."""
        if self._pending is None:
            return
        (step, pending, scalars), self._pending = self._pending, None
        if pending is not None:
            unmeasured = pending.unmeasured()
            means = {name: value for name, value in pending.result().items() if name not in unmeasured}
            # Read once the last of the steps has run: steps in flight belong to the next report.
            before, self._before = self._before, self._timeline.seconds()
            waited = self._before["data_wait"] - before["data_wait"]
            elapsed = self._before["training"] - before["training"] + waited
            means.pop("skipped_in_a_row", None)
            tokens = means.pop("tokens", None)
            seconds = elapsed / pending.num_steps
            scalars |= means | {
                "step_seconds": seconds,
                "data_wait_fraction": waited / elapsed if elapsed else 0.0,
            }
            if tokens is not None:
                scalars["tokens_per_second"] = tokens / seconds
            scalars["mfu"] = self._flops(step) / seconds / self._peak
            scalars |= memory_in_use(self._devices)
            self._progress.update(step, scalars)
            self._timeline.mark("report", step)
            self._reported = step, scalars | dict.fromkeys(unmeasured)
        self._writer.write(step, scalars)

    def commit(self) -> None:
        """Writes the report that is due, and returns once all reports are where a crash of this process leaves them."""
        self.flush()
        self._timeline.flush()
        if hasattr(self._writer, "flush"):
            self._writer.flush()

    def take_reported(self) -> tuple[int, Mapping[str, float | None]] | None:
        """Returns (step, scalars) of the last report of steps that was written, None for what none of them measured;
        None if this was asked since then."""
        taken, self._reported = self._reported, None
        return taken

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside as training, except what `waiting` and `pause` count otherwise."""
        return self._timeline.phase("training")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts as waiting for data the time inside in which the devices are idle."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            idle_since = self._clock.idle_since()
            if idle_since is not None:
                self._timeline.move(time.perf_counter() - max(begin, idle_since), "data_wait")

    @contextlib.contextmanager
    def pause(self, phase: str, ready: jax.Array) -> Iterator[None]:
        """Waits for `ready`, an output of the last step, then counts the time inside for `phase` ("evaluation",
        "checkpoint")."""
        ready.block_until_ready()
        with self._timeline.phase(phase):
            yield
        self._timeline.mark(phase)

    def close(self) -> None:
        """Writes a report that is due and closes the writers and the progress display."""
        self._clock.close()
        try:
            self.flush()
        finally:
            self._writer.close()
            self._progress.close()
