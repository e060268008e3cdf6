from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from meshway.framework.errors import UserError
from meshway.framework.telemetry.profiler import Profile


def test_the_steps_asked_for_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    step = 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append((str(folder), step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    profile = Profile(tmp_path, start_step=3, num_steps=2)
    for step in range(1, 8):
        profile.after_step(step)
    profile.close()
    assert calls == [(str(tmp_path / "profile"), 3), ("stop", 5)]


def test_a_run_that_ends_early_leaves_a_trace(tmp_path: Path) -> None:
    profile = Profile(tmp_path, start_step=1, num_steps=100)
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    x = jnp.ones(8)
    for step in range(1, 4):
        x = double(x)
        profile.after_step(step)
    profile.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_steps_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1, got 0, 3"):
        Profile(tmp_path, start_step=0)
