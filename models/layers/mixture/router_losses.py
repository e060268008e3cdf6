"""Auxiliary losses of routers, without their coefficients, and statistics: whether experts are used evenly.

All are taken over every real token of the (micro)batch, whatever devices hold them. The losses of balance are products
or variances of such means: for a batch split into microbatches they are the mean over the parts, not that of the whole.
"""

import jax
import jax.numpy as jnp

from meshway.models.layers.side_outputs import add_metric


def load(probabilities: jax.Array, loads: jax.Array, real: jax.Array) -> jax.Array:
    """Returns E * sum over experts of f_i P_i: 1 where routing is even, E where one expert takes all.

    Switch Transformer (Fedus et al. 2022), eq. 4-6: P_i is the expert's mean probability; for k > 1, f_i is its share
    of all choices.

    Args:
      probabilities: float32 [batch, length, experts].
      loads: float32 [experts], f_i (`shares`); no gradient passes.
      real: float32 [batch, length], 0 on padding.
    """
    return loads.shape[0] * jnp.sum(jax.lax.stop_gradient(loads) * _mean(probabilities, real))


def importance(probabilities: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the squared coefficient of variation of the experts' summed probabilities (V-MoE, Riquelme et al. 2021,
    appendix A.2; Shazeer et al. 2017, eq. 7).

    Args:
      probabilities: float32 [batch, length, experts], without noise.
      real: float32 [batch, length], 0 on padding.
    """
    return _squared_variation(_mean(probabilities, real))


def noisy_load(logits: jax.Array, threshold: jax.Array, deviation: float, real: jax.Array) -> jax.Array:
    """Returns the squared coefficient of variation of the experts' expected number of tokens under fresh noise.

    V-MoE (Riquelme et al. 2021, appendix A.2): expert i is among a token's k best with probability
    1 - Phi((threshold - logit_i) / deviation), `threshold` being the k-th largest noisy logit.

    Args:
      logits: float32 [batch, length, experts], without noise.
      threshold: float32 [batch, length, 1].
      deviation: of the normal noise.
      real: float32 [batch, length], 0 on padding.
    """
    chosen = jax.scipy.stats.norm.cdf((logits - threshold) / deviation)
    return _squared_variation(_mean(chosen, real))


def z(logits: jax.Array, real: jax.Array) -> jax.Array:
    """Returns the mean over tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return _mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), real)


def bias_balance(bias: jax.Array, loads: jax.Array) -> jax.Array:
    """Returns 0, whose gradient to `bias` [experts] is each expert's share of the choices less the mean share.

    The gradient is linear in the counts of tokens, so sums over microbatches stay right, and it reaches the bias
    through the loss, so what the loss ignores (a pipeline's bubbles) is ignored here.
    """
    excess = jax.lax.stop_gradient(loads - jnp.mean(loads))
    return jnp.sum(excess * (bias - jax.lax.stop_gradient(bias)))


def shares(experts: jax.Array, num_experts: int, real: jax.Array) -> jax.Array:
    """Returns each expert's share of the choices of real tokens, float32 [experts], which sums to 1.

    Args:
      experts: int32 [batch, length, k].
      num_experts: how many there are.
      real: float32 [batch, length], 0 on padding.
    """
    chosen = jnp.sum(experts[..., None] == jnp.arange(num_experts), axis=-2, dtype=jnp.float32)
    return _mean(chosen, real) / experts.shape[-1]


def report_loads(loads: jax.Array) -> None:
    """Reports the largest and the smallest expert's share of the choices, 1 being an even share."""
    add_metric("router/load_max", loads.shape[0] * jnp.max(loads))
    add_metric("router/load_min", loads.shape[0] * jnp.min(loads))


def report_entropy(probabilities: jax.Array, real: jax.Array) -> None:
    """Reports the mean over tokens of the entropy of probabilities [batch, length, experts], in nats."""
    add_metric("router/entropy", _mean(jnp.sum(jax.scipy.special.entr(probabilities), axis=-1), real))


def _mean(values: jax.Array, real: jax.Array) -> jax.Array:
    """The mean over real tokens of values [batch, length, ...]."""
    weights = real.reshape(real.shape + (1,) * (values.ndim - 2))
    return jnp.sum(values * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1.0)


def _squared_variation(values: jax.Array) -> jax.Array:
    return jnp.var(values) / jnp.maximum(jnp.square(jnp.mean(values)), 1e-20)
