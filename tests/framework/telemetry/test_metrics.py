import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshway.framework.telemetry.reporter import MetricBuffer


def _metrics(rng: np.random.Generator) -> dict[str, tuple[jax.Array, jax.Array]]:
    sums, weights = rng.uniform(1, 100, 2).astype(np.float32), rng.integers(1, 100, 2).astype(np.float32)
    return {name: (jnp.asarray(s), jnp.asarray(w)) for name, s, w in zip("ab", sums, weights, strict=True)}


@pytest.mark.parametrize("period", [1, 9, 10, 27])
def test_means_are_those_of_numpy_for_any_period(period: int) -> None:
    rng = np.random.default_rng(period)
    steps = [_metrics(rng) for _ in range(period)]
    buffer = MetricBuffer()
    for step, metrics in enumerate(steps, 1):
        buffer.add(step, metrics)
    assert len(buffer) == period
    pending = buffer.take()
    assert len(buffer) == 0
    assert (pending.first_step, pending.last_step, pending.num_steps) == (1, period, period)
    for name, mean in pending.result().items():
        pairs = np.array([[float(x) for x in step[name]] for step in steps])
        np.testing.assert_allclose(mean, pairs[:, 0].sum() / pairs[:, 1].sum(), rtol=1e-6)


def test_each_report_is_over_its_own_steps() -> None:
    buffer = MetricBuffer()
    one = jnp.float32(1)
    reports = []
    for step in range(1, 7):
        buffer.add(step, {"loss": (jnp.float32(step), one)})
        if step % 3 == 0:
            reports.append(buffer.take())
    assert [pending.result() for pending in reports] == [{"loss": 2.0}, {"loss": 5.0}]
    with pytest.raises(ValueError, match="no step was added"):
        buffer.reduce()


def test_no_weight_and_nan_are_nan() -> None:
    buffer = MetricBuffer()
    zero, nan = jnp.float32(0), jnp.float32(math.nan)
    buffer.add(1, {"skipped": (zero, zero), "bad": (nan, zero + 1), "good": (zero + 3, zero + 2)})
    means = buffer.reduce()
    assert math.isnan(means["skipped"]) and math.isnan(means["bad"]) and means["good"] == 1.5


def test_a_metric_is_a_pair_of_arrays() -> None:
    buffer = MetricBuffer()
    buffer.add(1, {"loss": (1.0, 2.0)})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="pair of arrays, got float"):
        buffer.take()


def test_taking_does_not_wait_for_the_device() -> None:
    @jax.jit
    def slow(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 20, lambda _, y: jnp.tanh(y @ y), x).sum()

    x = jnp.full((512, 512), 0.01, jnp.float32)
    slow(x).block_until_ready()
    buffer = MetricBuffer()
    buffer.add(1, {"loss": (slow(x), jnp.float32(1))})
    pending = buffer.take()
    was_ready = pending.ready()
    assert pending.result()["loss"] == float(slow(x))
    assert not was_ready and pending.ready()


def test_replicated_arrays_of_a_mesh() -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    replicated = NamedSharding(mesh, PartitionSpec())
    buffer = MetricBuffer()
    for step in range(1, 13):
        pair = jax.device_put((jnp.float32(step), jnp.float32(2)), replicated)
        buffer.add(step, {"loss": pair})
    assert buffer.reduce() == {"loss": sum(range(1, 13)) / 24}
