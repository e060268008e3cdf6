"""What is done to logits before a token is drawn: penalties, and filters that leave some tokens out.

Settings are numbers, or arrays [rows] with one number a row. A filter turns what it leaves out to -inf.
"""

import jax
import jax.numpy as jnp

from meshway.framework.axes import placement

Setting = float | jax.Array


def penalize(
    logits: jax.Array,
    generated: jax.Array,
    prompted: jax.Array,
    repetition: Setting = 1.0,
    presence: Setting = 0.0,
    frequency: Setting = 0.0,
) -> jax.Array:
    """Lowers the logits of tokens that were there before.

    Args:
      logits: float32 [rows, vocab].
      generated: int32 [rows, vocab], how often each token was generated so far.
      prompted: bool [rows, vocab], whether the prompt holds it.
      repetition: divides positive logits, and multiplies negative ones, of what was generated or prompted (Keskar et
        al. 2019, section 4.1); 1 is none.
      presence, frequency: subtracted once, and once for every time, from what was generated; 0 is none.
    """
    repetition = _column(repetition)
    known = prompted | (generated > 0)
    logits = jnp.where(known, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - _column(frequency) * generated - _column(presence) * (generated > 0)


def largest(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the k largest of each row of x [batch, n], the largest first, and their places, [batch, k] both.

    As `lax.top_k`, for which XLA would gather all rows on every device: here each finds those of its own.
    """

    def find(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, places = jax.lax.top_k(x, k)
        return values, places

    where = placement(("batch", None), x.shape)
    if where is not None and where.mesh.size > 1:
        specs = (where.spec, where.spec)
        find = jax.shard_map(find, mesh=where.mesh, in_specs=where.spec, out_specs=specs, check_vma=False)
    return find(x)


def top_k(logits: jax.Array, k: int) -> jax.Array:
    """Leaves the k largest logits of each row, and what equals the last of them; k = 0 leaves all."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    least = largest(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def top_p(logits: jax.Array, p: Setting) -> jax.Array:
    """Leaves the fewest tokens whose probabilities together reach p, and what is as likely as the last of them (nucleus
    sampling, Holtzman et al. 2020, eq. 2)."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    least = jnp.min(jnp.where(before < _column(p), ordered, jnp.inf), axis=-1, keepdims=True)
    # The likeliest stays whatever p is.
    return jnp.where(logits >= jnp.minimum(least, ordered[..., :1]), logits, -jnp.inf)


def min_p(logits: jax.Array, p: Setting) -> jax.Array:
    """Leaves tokens that are at least p times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(_column(p))
    return jnp.where(logits >= least, logits, -jnp.inf)


def _column(setting: Setting) -> jax.Array:
    return jnp.asarray(setting, jnp.float32).reshape(-1, 1)
