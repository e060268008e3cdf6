"""Learning-rate schedules: functions from the step (0 for the first update) to the learning rate.

optax's own schedules have the same signature and can be bound in gin directly, for example
``Optimizer.learning_rate = @optax.linear_schedule()``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from meshway.framework.errors import UserError, did_you_mean

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

FACTORS = (
    "constant",
    "linear_warmup",
    "linear_decay",
    "rsqrt_decay",
    "rsqrt_normalized_decay",
    "decay_every",
    "cosine_decay",
)
# Factors that divide by warmup_steps, or whose value at step 0 is infinite without a warm-up.
_NEED_WARMUP = frozenset({"linear_warmup", "linear_decay", "rsqrt_decay", "rsqrt_normalized_decay"})


def constant(learning_rate: float) -> Schedule:
    """Returns the schedule that is `learning_rate` at every step."""
    return lambda step: jnp.full(jnp.shape(step), learning_rate, jnp.float32)


def warmup_cosine(learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1) -> Schedule:
    """Returns a linear warm-up from 0 to `learning_rate`, then half a cosine down to a fraction of it.

    Args:
      learning_rate: the peak, reached at step `warmup_steps`.
      warmup_steps: length of the warm-up, in updates.
      total_steps: the step (warm-up included) from which the rate stays at its final value.
      final_fraction: the final value, as a fraction of the peak.

    Raises:
      UserError: the warm-up is negative or as long as the whole.
    """
    if not 0 <= warmup_steps < total_steps:
        raise UserError(f"warmup_cosine: warmup_steps={warmup_steps} must be in [0, total_steps={total_steps})")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, total_steps, learning_rate * final_fraction
    )
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def t5_factors(
    factors: str = "constant * linear_warmup * rsqrt_decay",
    base_learning_rate: float = 0.5,
    warmup_steps: int = 1000,
    decay_factor: float = 0.5,
    steps_per_decay: int = 20000,
    steps_per_cycle: int = 100000,
    step_offset: int = 0,
    min_learning_rate: float = 1e-8,
) -> Schedule:
    """Returns T5X's schedule: a product of named factors, never below `min_learning_rate`.

    With s = max(0, step - step_offset), w = warmup_steps and mod 1 the fractional part:

    ======================  ==========================================================================
    constant                base_learning_rate
    linear_warmup           min(1, s / w)
    linear_decay            base_learning_rate * min(s / w, 1 + decay_factor * (w - s))
    rsqrt_decay             1 / sqrt(max(s, w))
    rsqrt_normalized_decay  sqrt(w) / sqrt(max(s, w))
    decay_every             decay_factor ** floor(s / steps_per_decay)
    cosine_decay            (1 + cos(pi * (max(0, (s - w) / steps_per_cycle) mod 1))) / 2
    ======================  ==========================================================================

    `linear_decay` includes the base rate and the warm-up; its `decay_factor` is the share of the base rate subtracted
    at each step after the warm-up (1 / number of decaying steps reaches zero).

    Args:
      factors: names from the table, joined by ``*``.
      base_learning_rate: see the table.
      warmup_steps: steps of warm-up; also where the rsqrt factors begin to fall.
      decay_factor: see `linear_decay` and `decay_every`.
      steps_per_decay: see `decay_every`.
      steps_per_cycle: see `cosine_decay`.
      step_offset: the step that counts as 0 (for a fine-tuning run that continues the step count).
      min_learning_rate: the floor of the product.

    Raises:
      UserError: an unknown factor, a `linear_decay` beside factors it contains, or a length below 1.

    Source: the factor names and formulae of T5X's ``utils.create_learning_rate_scheduler``.
    """
    names = [name.strip() for name in factors.split("*")]
    lengths = {
        "warmup_steps": (warmup_steps, _NEED_WARMUP),
        "steps_per_decay": (steps_per_decay, {"decay_every"}),
        "steps_per_cycle": (steps_per_cycle, {"cosine_decay"}),
    }
    _check_factors(factors, names, lengths)

    def factor(name: str, s: jax.Array) -> jax.Array | float:
        match name:
            case "constant":
                return base_learning_rate
            case "linear_warmup":
                return jnp.minimum(1.0, s / warmup_steps)
            case "linear_decay":
                falling = 1.0 + decay_factor * (warmup_steps - s)
                return base_learning_rate * jnp.minimum(s / warmup_steps, falling)
            case "rsqrt_decay":
                return jax.lax.rsqrt(jnp.maximum(s, float(warmup_steps)))
            case "rsqrt_normalized_decay":
                return jnp.sqrt(warmup_steps / jnp.maximum(s, float(warmup_steps)))
            case "decay_every":
                return decay_factor ** jnp.floor(s / steps_per_decay)
            case _:
                cycles = jnp.maximum(0.0, (s - warmup_steps) / steps_per_cycle)
                return 0.5 * (1.0 + jnp.cos(jnp.pi * (cycles % 1.0)))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # The subtraction is done in integers: float32 is exact only up to step 2**24.
        s = jnp.maximum(0, jnp.asarray(step) - step_offset).astype(jnp.float32)
        product = jnp.ones_like(s)
        for name in names:
            product = product * factor(name, s)
        return jnp.maximum(product, min_learning_rate)

    return schedule


def _check_factors(factors: str, names: list[str], lengths: dict) -> None:
    for name in names:
        if name not in FACTORS:
            hint = did_you_mean(name, FACTORS) or f"; the factors are {', '.join(FACTORS)}"
            raise UserError(f"t5_factors: unknown factor {name!r} in factors={factors!r}{hint}")
    repeated = {"constant", "linear_warmup"}.intersection(names)
    if "linear_decay" in names and repeated:
        raise UserError(
            f"t5_factors: linear_decay contains {' and '.join(sorted(repeated))} already; "
            f"leave them out of factors={factors!r}"
        )
    for argument, (length, users) in lengths.items():
        needed_by = [name for name in names if name in users]
        if needed_by and length < 1:
            raise UserError(f"t5_factors: {needed_by[0]} needs {argument} >= 1, it is {length}")
