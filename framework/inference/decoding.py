"""Search over one function `(params, tokens, positions, cache) -> (logits, cache)`."""

import jax
import jax.numpy as jnp

from meshway.framework.interfaces import Batch, Model, Params


def greedy(model: Model, params: Params, batch: Batch, max_length: int, eos_id: int) -> jax.Array:
    """Takes the likeliest token at each position until every row has ended.

    Args:
      model: decodes with a cache.
      params: its parameters.
      batch: inputs or prompts, as `model.prefill` reads them.
      max_length: the most tokens to produce.
      eos_id: the token that ends a row.

    Returns:
      int32 tokens [batch, max_length]: the prediction, its `eos_id`, then zeros.
    """
    first, start, cache = model.prefill(params, batch, max_length)
    rows = first.shape[0]
    carry = (
        jnp.zeros((), jnp.int32),
        first,
        cache,
        jnp.zeros((rows, max_length), jnp.int32),
        jnp.zeros(rows, bool),
    )

    def unfinished(carry: tuple) -> jax.Array:
        index, _, _, _, done = carry
        return (index < max_length) & ~jnp.all(done)

    def advance(carry: tuple) -> tuple:
        index, tokens, cache, output, done = carry
        logits, cache = model.decode(params, tokens, start + index, cache)
        chosen = jnp.where(done, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        output = jax.lax.dynamic_update_slice_in_dim(output, chosen[:, None], index, axis=1)
        return index + 1, chosen[:, None], cache, output, done | (chosen == eos_id)

    return jax.lax.while_loop(unfinished, advance, carry)[3]
