"""What a run says while it runs: metrics fetched late, rates, and where both go."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from meshway.framework.interfaces import Metrics, Writer
from meshway.framework.training.device_memory import memory_in_use
from meshway.framework.training.metrics import MetricBuffer, Pending
from meshway.framework.training.progress import Progress
from meshway.framework.training.step_clock import StepClock
from meshway.framework.training.timeline import Timeline


class Reporter:
    """Collects metrics and times; writes one report a period, one step late so that the device never waits."""

    def __init__(
        self,
        writer: Writer,
        progress: Progress,
        timeline: Timeline,
        flops_per_step: float,
        peak_flops: float,
        devices: Sequence[Any] = (),
    ):
        """`peak_flops` is the matmul peak of all devices together, in FLOP/s: `mfu` is the share of it in use. What
        memory is in use is asked of `devices`, this process's."""
        self._writer, self._progress, self._timeline = writer, progress, timeline
        self._flops, self._peak, self._devices = flops_per_step, peak_flops, devices
        self._buffer = MetricBuffer()
        self._pending: tuple[int, Pending | None, dict[str, float]] | None = None
        self._before = timeline.seconds()  # of each phase, when the last report was written
        self._clock = StepClock()

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes a step's metrics, and writes the report before it if one is due. Never waits for this step."""
        self.flush()
        self._clock.started(next(iter(metrics.values()))[0].addressable_data(0))
        self._buffer.add(step, metrics)
        self._progress.advance(step)
        self._timeline.reached(step)

    def report(self, step: int, extra: Mapping[str, float] = {}) -> None:
        """Makes a report of the steps since the last one; it is written once the next step is under way."""
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
        """Writes the report that is due, waiting for its last step if need be."""
        if self._pending is None:
            return
        (step, pending, scalars), self._pending = self._pending, None
        if pending is not None:
            means = pending.result()
            # Read once the last of the steps has run: what is in flight belongs to the next report.
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
            scalars["mfu"] = self._flops / seconds / self._peak
            scalars |= memory_in_use(self._devices)
            self._progress.update(step, scalars)
            self._timeline.mark("report", step)
        self._writer.write(step, scalars)

    def training(self) -> contextlib.AbstractContextManager[None]:
        """Counts the time inside as training, but for what the two below take out of it."""
        return self._timeline.phase("training")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside in which the devices have no step to do as waiting for data."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            idle_since = self._clock.idle_since()
            if idle_since is not None:
                self._timeline.move(time.perf_counter() - max(begin, idle_since), "data_wait")

    @contextlib.contextmanager
    def pause(self, phase: str, ready: jax.Array) -> Iterator[None]:
        """Counts the time inside for `phase` ("evaluation", "checkpoint"), once `ready`, of the last step, is there."""
        ready.block_until_ready()
        with self._timeline.phase(phase):
            yield
        self._timeline.mark(phase)

    def close(self) -> None:
        """Writes what is due and closes the writers and the progress display."""
        self._clock.close()
        try:
            self.flush()
        finally:
            self._writer.close()
            self._progress.close()
