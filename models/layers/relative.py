"""Relative positions as Transformer-XL has them: scores that depend on the query and on how far away a key stands."""

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.framework.axes import constrain
from meshway.models.layers.linear import fan_in_init
from meshway.models.module import param

SCORES = ("batch", "heads", "length", None)  # the keys lie whole, as layouts may cut both lengths by the same mesh axes


class RelativeScores(nnx.Module):
    """What Transformer-XL adds to the scores q k (Dai et al. 2019, section 3.3), as Gopher and Chinchilla do.

    The terms (b), (c) and (d) of its equation for a key j places before the query: q W r_j + u k + v W r_j, with r_j
    the fixed sines and cosines of j. Parameters: kernel W [embed, heads, head_dim], content_bias u and position_bias v
    [heads, head_dim], both added to queries after they are scaled.
    """

    def __init__(self, d_model: int, num_heads: int, head_dim: int, *, rngs: nnx.Rngs, base: float = 10_000.0):
        """`base` is the longest wavelength of the sines over 2 pi.

        Raises:
          ValueError: d_model is odd.
        """
        if d_model % 2:
            raise ValueError(f"RelativeScores: sines and cosines come in pairs; d_model={d_model} is odd")
        kernel = fan_in_init("normal")(1)(rngs.params(), (d_model, num_heads, head_dim), jnp.float32)
        self.kernel = param(kernel, ("embed", "heads", "head_dim"))
        self.content_bias = param(jnp.zeros((num_heads, head_dim)), ("heads", "head_dim"))
        self.position_bias = param(jnp.zeros((num_heads, head_dim)), ("heads", "head_dim"))
        self.base = base

    def scores(self, query: jax.Array, key: jax.Array, places: jax.Array, kv_places: jax.Array) -> jax.Array:
        """Returns what is to be added to the scores of queries and keys, float32 [batch, heads, length, kv_length].

        Args:
          query: [batch, length, heads, head_dim], scaled.
          key: [batch, kv_length, kv_heads, head_dim].
          places: int32 [rows, length], where queries stand in the row; rows is 1 where that is 0, 1 .. length - 1.
          kv_places: int32 [1, kv_length], 0, 1 .. kv_length - 1.
        """
        length, kv_length, dtype = query.shape[1], key.shape[1], query.dtype
        query = query + self.position_bias[...].astype(dtype)
        distances = kv_length - 1 - jnp.arange(2 * kv_length - 1)  # of the latest query to the first key, and on
        sines = self._sines(distances).astype(dtype)
        # The order of the two products is left to einsum: one query a row is cheaper turned into d_model features.
        by_distance = jnp.einsum(
            "blhd,ehd,re->bhlr",
            query,
            self.kernel[...].astype(dtype),
            sines,
            preferred_element_type=jnp.float32,
        )
        if places.shape[0] == 1 and length == kv_length:
            by_place = _shifted(by_distance)
        else:
            column = kv_places[:, None, :] - places[:, :, None] + kv_length - 1
            by_place = jnp.take_along_axis(by_distance, column[:, None], axis=-1)
        groups = query.shape[2] // key.shape[2]
        content = self.content_bias[...].astype(dtype).reshape(key.shape[2], groups, -1)
        by_key = jnp.einsum("hgd,bkhd->bhgk", content, key, preferred_element_type=jnp.float32)
        by_key = by_key.reshape(by_key.shape[0], query.shape[2], 1, kv_length)
        return constrain(by_place + by_key, SCORES)

    def _sines(self, distances: jax.Array) -> jax.Array:
        """Returns float32 [distances, d_model]: sines, then cosines."""
        d_model = self.kernel.shape[0]
        frequencies = self.base ** (-jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model)
        angles = distances[:, None].astype(jnp.float32) * frequencies
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _shifted(by_distance: jax.Array) -> jax.Array:
    """[..., length, 2 length - 1], whose column c is of the key length - 1 - c places before the query, -> by key.

    Rows of one column more, read back as rows of 2 length - 1, begin one column earlier each: a look-up for every pair
    is far dearer in its gradient.
    """
    *lead, length, width = by_distance.shape
    wider = jnp.pad(by_distance, [(0, 0)] * (len(lead) + 1) + [(0, 1)])
    flat = wider.reshape(*lead, length * (width + 1))[..., length - 1 : length - 1 + length * width]
    return flat.reshape(*lead, length, width)[..., :length]
