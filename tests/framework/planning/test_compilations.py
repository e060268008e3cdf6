"""Programs are counted while they are compiled, and only then."""

import jax
import jax.numpy as jnp

from meshway.framework.telemetry.profiler import Compilations


def test_each_new_program_counts_once():
    double, x, longer = jax.jit(lambda x: 2 * x + 0.125), jnp.ones(3), jnp.ones(4)
    with Compilations() as found:
        double(x)
        assert found.count == 1
        double(x)
        assert found.count == 1
        double(longer)
    assert found.count == 2
    jax.jit(lambda x: x - 0.375)(x)
    assert found.count == 2
