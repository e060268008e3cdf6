"""Variants of one layer as pure functions: what `meshway bench attention` and `bench moe` compare."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshway.models.layers.kernels.reference import AttentionKernel
from meshway.models.layers.masks import Mask, local_window, make_attention_mask, row_metadata, row_positions
from meshway.models.layers.positions import with_alibi
from meshway.models.layers.side_outputs import capture
from meshway.models.module import Network

NAMES = ("batch", "length", "heads", "head_dim"), ("batch", "kv_length", "kv_heads", "head_dim")


class KernelForms:
    """Self-attention without projections, by each of `kernels`."""

    def __init__(
        self,
        kernels: Mapping[str, AttentionKernel],
        num_heads: int = 8,
        head_dim: int = 64,
        num_kv_heads: int | None = None,
        causal: bool = True,
        segments: int = 1,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
    ):
        """`kernels` are named, and the others are compared with the first; `segments` examples of equal length share a
        row; the other arguments are those of `attention.Attention`.

        Raises:
          ValueError: there are no kernels, or too few segments.
        """
        if not kernels:
            raise ValueError("KernelForms.kernels: nothing to compare")
        if segments < 1:
            raise ValueError(f"KernelForms.segments must be at least 1, not {segments}")
        self.names, self._kernels = tuple(kernels), kernels
        self._heads, self._head_dim = (num_heads, num_heads if num_kv_heads is None else num_kv_heads), head_dim
        self._causal, self._segments, self._window = causal, segments, window
        self._soft_cap, self._sinks, self._alibi = soft_cap, sinks, alibi

    def operands(
        self, batch_size: int, length: int
    ) -> list[tuple[tuple[str, str, str, str], tuple[int, int, int, int]]]:
        """Returns the logical axes and the shape of query, key and value."""
        shapes = [(batch_size, length, heads, self._head_dim) for heads in self._heads]
        return [(NAMES[0], shapes[0]), (NAMES[1], shapes[1]), (NAMES[1], shapes[1])]

    def loss(self, name: str, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Returns a scalar that depends on every output of a kernel."""
        positions = row_positions(query.shape[1])
        out = self._kernels[name](
            query * jnp.asarray(self._head_dim**-0.5, query.dtype),
            key,
            value,
            bias=with_alibi(None, self._heads[0], positions, positions) if self._alibi else None,
            mask=self._mask(query.shape[1]),
            soft_cap=self._soft_cap,
            sinks=jnp.zeros(self._heads[0]) if self._sinks else None,
        )
        return jnp.mean(jnp.square(out.astype(jnp.float32)))

    def flops(self, batch_size: int, length: int, backward: bool) -> float:
        """Returns the FLOPs of the pairs of a query and a key that the mask shows: two products forward and four more
        backward (what a kernel recomputes, or computes of hidden pairs, does not count)."""
        query = np.arange(length)
        first = query - query % -(-length // self._segments)
        last = np.minimum(first + -(-length // self._segments), length) - 1
        reach = length if self._window is None else self._window - 1
        last = query if self._causal else np.minimum(last, query + reach)
        pairs = int(np.sum(last - np.maximum(first, query - reach) + 1))
        return (6.0 if backward else 2.0) * 2 * batch_size * self._heads[0] * self._head_dim * pairs

    def _mask(self, length: int) -> Mask | None:
        segments = None
        if self._segments > 1:
            segments = 1 + row_positions(length) // -(-length // self._segments)
        metadata = row_metadata(length, segments)
        mask = make_attention_mask(metadata, metadata, self._causal) if self._causal or self._segments > 1 else None
        return mask if self._window is None else local_window(mask, self._window, metadata, metadata)


class DispatchForms:
    """A `moe.MoeMlp` factory under each value of its `dispatch`, all with the same parameters."""

    def __init__(
        self, layer: Callable[..., Any], d_model: int, names: Sequence[str] = ("all_to_all", "einsum", "dropless")
    ):
        """`names` are the values of `dispatch`; the others are compared with the first."""
        if not names:
            raise ValueError("DispatchForms.names: nothing to compare")
        self.names, self.d_model = tuple(names), d_model
        self._networks = {name: Network(functools.partial(layer, d_model=d_model, dispatch=name)) for name in names}

    def init(self, rng: jax.Array) -> dict[str, Any]:
        """Returns fresh parameters, the same for all values of `dispatch`."""
        return self._networks[self.names[0]].init(rng)

    def axes(self) -> dict[str, Any]:
        """Returns the logical axes of each parameter."""
        return self._networks[self.names[0]].axes()

    def loss(
        self, name: str, params: dict[str, Any], x: jax.Array, rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (a scalar that depends on every output, the layer's metrics) of x [batch, length, d_model]."""
        with capture() as reports:
            y = self._networks[name].bind(params)(x, rng=rng)
        return jnp.mean(jnp.square(y.astype(jnp.float32))) + sum(reports.losses.values()), reports.metrics
