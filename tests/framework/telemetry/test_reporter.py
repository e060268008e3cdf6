import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from meshway.framework.telemetry import reporter, timeline
from meshway.framework.telemetry.reporter import Progress
from meshway.framework.telemetry.timeline import Timeline
from meshway.framework.telemetry.writers import JsonlWriter


class Devices:
    """A clock, and devices that a test decides are busy or not."""

    def __init__(self) -> None:
        self.now, self.idle_at = 0.0, None

    def started(self, output: object) -> None:
        self.idle_at = None

    def idle_since(self) -> float | None:
        return self.idle_at

    def close(self) -> None: ...


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices()
    clock = SimpleNamespace(
        time=lambda: devices.now + 1e9, perf_counter=lambda: devices.now, monotonic=lambda: devices.now
    )
    for module in (reporter, timeline):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(reporter, "StepClock", lambda: devices)
    return devices


def test_rates_are_of_training_and_waiting_is_time_without_a_step_to_do(tmp_path: Path, devices: Devices) -> None:
    told = Timeline(tmp_path / "timeline.jsonl")
    screen = io.StringIO()
    report = reporter.Reporter(
        JsonlWriter(tmp_path / "metrics.jsonl"),
        Progress(9, stream=screen),
        told,
        flops_per_step=lambda step: 8.0,
        peak_flops=4.0,
        devices=[SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 12})],
    )
    devices.now = 10.0  # before the first step
    metrics = {"loss": (jnp.float32(6), jnp.float32(2)), "tokens": (jnp.float32(60), jnp.float32(1))}
    metrics["weight_rms/not_now"] = jnp.float32(0), jnp.float32(0)
    metrics["weight_rms/broken"] = jnp.float32(math.nan), jnp.float32(1)
    with report.training():
        with report.waiting():
            devices.now, devices.idle_at = devices.now + 3, 0.0  # nothing to do all the while
        report.add(1, metrics)
        devices.now += 4
        with report.waiting():
            devices.now += 2  # a step runs all the while
        report.add(2, metrics)
        with report.waiting():
            devices.now, devices.idle_at = devices.now + 10, devices.now + 9  # it was done after 9 of 10
        report.add(3, metrics)
        devices.now += 1
        with report.pause("evaluation", jnp.zeros(())):
            devices.now += 50
        report.evaluated(
            3, {"validation/loss": 7.0, "validation/t/f1": 1.0, "validation/t/decoder/router/entropy/layer_0": 2.0}
        )
        report.flush()
    report.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step_seconds"] == pytest.approx(20 / 3) and line["mfu"] == pytest.approx(8 / (20 / 3) / 4)
    assert line["data_wait_fraction"] == pytest.approx((3 + 1) / 20)
    assert line["weight_rms/broken"] is None and "weight_rms/not_now" not in line
    assert line["device_peak_bytes_in_use"] == 12 and "device_bytes_limit" not in line
    assert line["tokens_per_second"] == pytest.approx(60 / (20 / 3)) and line["loss"] == 3.0
    assert "router/entropy" not in screen.getvalue() and "t/f1" in screen.getvalue()
    lines = [json.loads(text) for text in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines] == [("evaluation", 3), ("report", 3)]
    assert lines[-1]["seconds"] == dict.fromkeys(timeline.PHASES, 0.0) | {
        "startup": 10.0,
        "training": 16.0,
        "data_wait": 4.0,
        "evaluation": 50.0,
    }
