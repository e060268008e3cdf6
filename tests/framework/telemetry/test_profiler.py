import contextlib
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshway.framework.errors import UserError
from meshway.framework.telemetry.profiler import Profile
from meshway.framework.training.loop import Loop, Periods


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


def test_steps_of_the_loop_are_in_a_profile_by_number(tmp_path: Path) -> None:
    """As XProf and TensorBoard tell steps apart."""
    state = SimpleNamespace(step=jnp.zeros((), jnp.int32))
    metrics = {"skipped_in_a_row": (jnp.zeros(()), jnp.ones(()))}
    reporter: Any = SimpleNamespace(
        waiting=contextlib.nullcontext,
        training=contextlib.nullcontext,
        pause=lambda *_: contextlib.nullcontext(),
        **dict.fromkeys(["add", "report", "flush", "commit"], lambda *_: None),
    )
    profile = Profile(tmp_path, start_step=1, num_steps=2)
    Loop(
        step=lambda state, batch: (state, metrics),
        shard_batch=dict,
        stream=iter([({}, {})] * 4),
        periods=Periods(total=4, report=1, evaluate=None, checkpoint=4),
        reporter=reporter,
        evaluate=SimpleNamespace(due=lambda step: False),
        save=lambda *_: None,
        hooks=[profile],
    ).run(state, 0)
    (trace,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [each["args"]["step_num"] for each in events if "step_num" in each.get("args", {})]
    assert sorted(set(map(int, steps))) == [2, 3]


def test_steps_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1, got 0, 3"):
        Profile(tmp_path, start_step=0)
