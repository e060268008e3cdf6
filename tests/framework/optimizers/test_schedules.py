"""Schedules equal their formulae, written out in numpy, and refuse what cannot be meant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshway.framework.errors import UserError
from meshway.framework.optimizers import schedules

STEPS = np.array([0, 1, 7, 10, 11, 39, 40, 41, 119, 120, 250])
WARMUP, DECAY, EVERY, CYCLE, BASE = 10, 0.01, 40, 100, 0.5


def _reference(name: str, step: float) -> float:
    return {
        "constant": BASE,
        "linear_warmup": min(1.0, step / WARMUP),
        "linear_decay": BASE * min(step / WARMUP, 1 + DECAY * (WARMUP - step)),
        "rsqrt_decay": 1 / np.sqrt(max(step, WARMUP)),
        "rsqrt_normalized_decay": np.sqrt(WARMUP) / np.sqrt(max(step, WARMUP)),
        "decay_every": DECAY ** (step // EVERY),
        "cosine_decay": 0.5 * (1 + np.cos(np.pi * (max(0, (step - WARMUP) / CYCLE) % 1))),
    }[name]


def _schedule(factors: str, **kwargs) -> schedules.Schedule:
    lengths = {"warmup_steps": WARMUP, "steps_per_decay": EVERY, "steps_per_cycle": CYCLE}
    return schedules.t5_factors(factors, **({"base_learning_rate": BASE, "decay_factor": DECAY} | lengths | kwargs))


@pytest.mark.parametrize(
    "factors", [*schedules.FACTORS, "constant * linear_warmup * rsqrt_decay", "constant*cosine_decay"]
)
def test_factors_multiply_as_their_formulae_say(factors: str) -> None:
    expected = [np.prod([_reference(name.strip(), step) for name in factors.split("*")]) for step in STEPS]
    schedule = jax.jit(jax.vmap(_schedule(factors)))
    np.testing.assert_allclose(schedule(jnp.asarray(STEPS)), np.maximum(expected, 1e-8), rtol=2e-6, atol=1e-9)


def test_offset_shifts_and_floor_holds() -> None:
    plain, shifted = (
        _schedule("constant * linear_warmup"),
        _schedule("constant * linear_warmup", step_offset=5),
    )
    assert shifted(8) == plain(3)
    assert shifted(2) == plain(0) == np.float32(1e-8)
    assert _schedule("linear_decay", min_learning_rate=1e-3)(10_000) == np.float32(1e-3)


def test_a_large_step_keeps_its_offset_exact() -> None:
    offset = 2**24
    assert _schedule("linear_warmup", step_offset=offset)(offset + 3) == np.float32(0.3)


def test_t5_default_is_the_papers_inverse_square_root() -> None:
    schedule = schedules.t5_factors("constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10_000)
    np.testing.assert_allclose([schedule(0), schedule(10_000), schedule(40_000)], [0.01, 0.01, 0.005], rtol=1e-6)


def test_constant_and_warmup_cosine() -> None:
    assert schedules.constant(3e-4)(17) == np.float32(3e-4)
    schedule = jax.jit(schedules.warmup_cosine(1e-3, warmup_steps=10, total_steps=110, final_fraction=0.1))
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 500)]
    np.testing.assert_allclose(values, [0, 5e-4, 1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-5)


def test_an_unknown_factor_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'rsqrt_decay'"):
        schedules.t5_factors("constant * rsqrt_decai")
    with pytest.raises(UserError, match="the factors are constant"):
        schedules.t5_factors("")


@pytest.mark.parametrize(
    ("factors", "kwargs", "message"),
    [
        ("constant * rsqrt_decay", {"warmup_steps": 0}, "rsqrt_decay needs warmup_steps"),
        ("decay_every", {"steps_per_decay": 0}, "decay_every needs steps_per_decay"),
        ("cosine_decay", {"steps_per_cycle": -1}, "cosine_decay needs steps_per_cycle"),
        ("constant * linear_decay", {}, "linear_decay contains constant"),
    ],
)
def test_meaningless_settings_are_refused(factors: str, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _schedule(factors, **kwargs)


def test_lengths_of_unused_factors_do_not_matter() -> None:
    assert _schedule("constant", warmup_steps=0, steps_per_cycle=0)(0) == np.float32(BASE)


def test_warmup_cosine_refuses_a_warmup_as_long_as_the_run() -> None:
    with pytest.raises(UserError, match="warmup_steps=100"):
        schedules.warmup_cosine(1e-3, warmup_steps=100, total_steps=100)
