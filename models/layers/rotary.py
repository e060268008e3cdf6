"""Rotary position embeddings, and ways to scale them to lengths beyond those of training.

A scaling has no parameters: evaluation and inference may use another one than training.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Scaling(Protocol):
    """How frequencies are changed for rows longer than those of training."""

    def __call__(self, base: float, dim: int) -> tuple[np.ndarray, float]:
        """Returns (radians per position of each pair of features, float64 [dim / 2]; a factor on rotated features)."""
        ...


def frequencies(base: float, dim: int) -> np.ndarray:
    """Returns base^(-2 i / dim) for i < dim / 2, radians per position (Su et al. 2021, eq. 15)."""
    return float(base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Position interpolation: positions are divided by `factor` (Chen et al. 2023, eq. 3)."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    def __call__(self, base: float, dim: int) -> tuple[np.ndarray, float]:
        return frequencies(base, dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class NTK:
    """A larger base, so that the slowest pair rotates `factor` times slower and the fastest as before (Peng et al.
    2023, definition 1: base * factor^(dim / (dim - 2)))."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive(self, "factor")

    def __call__(self, base: float, dim: int) -> tuple[np.ndarray, float]:
        if dim < 4:
            raise ValueError(f"rotary.NTK needs at least 4 rotated features, not {dim}")
        return frequencies(base * self.factor ** (dim / (dim - 2)), dim), 1.0


@dataclasses.dataclass(frozen=True)
class YaRN:
    """Pairs that rotate often in the trained length keep their frequency, those that rotate less than once are
    interpolated, those between are mixed; scores grow with `factor` (Peng et al. 2023, definitions 2 and 3).

    As in the authors' code, and the models trained with it, the mix is linear in the index of the pair; in the paper
    it is linear in the number of rotations.

    Attributes:
      factor: how much longer rows get.
      original_length: tokens of a row in training.
      beta_fast, beta_slow: rotations in `original_length` above which a pair is kept, below which it is interpolated.
      attention_factor: multiplies queries and keys; None for 0.1 ln(factor) + 1, the paper's fit.
      truncate: whether the two ends of the mix are rounded outwards to whole pairs.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "original_length", "beta_fast", "beta_slow")

    def __call__(self, base: float, dim: int) -> tuple[np.ndarray, float]:
        kept = frequencies(base, dim)
        low, high = self._pair(self.beta_fast, base, dim), self._pair(self.beta_slow, base, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
        attention = 0.1 * math.log(max(self.factor, 1.0)) + 1.0
        if self.attention_factor is not None:
            attention = self.attention_factor
        return kept * (1.0 - ramp) + kept / self.factor * ramp, attention

    def _pair(self, turns: float, base: float, dim: int) -> float:
        """Returns the fractional index of the pair that rotates `turns` times in the original length."""
        return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling (Grattafiori et al. 2024, its released code): wavelengths above original_length /
    low_frequency_factor are interpolated by `factor`, those below original_length / high_frequency_factor kept, those
    between mixed, linearly in the number of turns in `original_length` tokens."""

    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_positive(self, "factor", "low_frequency_factor", "original_length")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"rotary.Llama3: high_frequency_factor={self.high_frequency_factor} must be above "
                f"low_frequency_factor={self.low_frequency_factor}"
            )

    def __call__(self, base: float, dim: int) -> tuple[np.ndarray, float]:
        kept = frequencies(base, dim)
        turns = self.original_length * kept / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        share = np.clip((turns - self.low_frequency_factor) / span, 0.0, 1.0)
        return share * kept + (1.0 - share) * kept / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021, eq. 34), halves rotated as in Llama: no parameters.

    Attributes:
      base: of the frequencies, theta in the paper.
      fraction: the share of each head's features that is rotated, the first ones.
      scaling: how frequencies are changed, None for not at all.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotates x [batch, length, heads, head_dim] by positions [rows, length]; angles are float32.

        Raises:
          ValueError: the number of rotated features is odd.
        """
        turns, factor = self._turns(x.shape[-1])
        return _rotated(x, positions, turns, factor)

    def _turns(self, head_dim: int) -> tuple[np.ndarray, float]:
        """Returns (radians per position of each pair, a factor on rotated features)."""
        dim = int(head_dim * self.fraction)
        if dim % 2 or not 0 < dim <= head_dim:
            raise ValueError(
                f"rotary positions rotate pairs of features: fraction={self.fraction} of head_dim={head_dim} is {dim}, "
                "which must be even and above 0"
            )
        return (frequencies(self.base, dim), 1.0) if self.scaling is None else self.scaling(self.base, dim)


@dataclasses.dataclass(frozen=True)
class ReRoPE(Rotary):
    """Rotary positions with distances clipped at `window`: keys further before the query are scored at that distance
    (ReRoPE, Su 2023), or with `slope` above 0 at window + slope (distance - window) (Leaky ReRoPE).

    It needs no training: a window within the trained length keeps all distances within it too. It computes two dense
    sets of scores: memory grows with the square of the length.
    """

    window: int = 512
    slope: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"rotary.ReRoPE.window must be at least 1, not {self.window}")
        if not 0 <= self.slope < 1:
            raise ValueError(f"rotary.ReRoPE.slope must be at least 0 and below 1, not {self.slope}")

    def scores(self, query: jax.Array, key: jax.Array, positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        """Returns the difference of scores with clipped distances from those of rotated queries and keys.

        Args:
          query: [batch, length, heads, head_dim], rotated.
          key: [batch, kv_length, kv_heads, head_dim], rotated.
          positions, kv_positions: int32 [rows, length] and [rows, kv_length], positions in the row.

        Returns:
          float32 [batch, heads, length, kv_length], 0 within the window.
        """
        turns, _ = self._turns(query.shape[-1])
        shift = self.window * (1.0 - self.slope)
        far_query = _rotated(query, shift + (self.slope - 1.0) * positions, turns, 1.0)
        far_key = _rotated(key, (self.slope - 1.0) * kv_positions, turns, 1.0)
        distance = positions[:, :, None] - kv_positions[:, None, :]
        far = _products(far_query, far_key) - _products(query, key)
        return jnp.where((distance > self.window)[:, None], far, 0.0)


def _rotated(x: jax.Array, positions: jax.Array, turns: np.ndarray, factor: float) -> jax.Array:
    """Rotates the first 2 len(turns) features of x [batch, length, heads, head_dim]; the others stay as they are."""
    pairs = len(turns)
    angles = positions[:, :, None, None].astype(jnp.float32) * turns.astype(np.float32)
    first, second, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1.0:
        cos, sin = factor * cos, factor * sin
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([rotated, rest], axis=-1) if rest.shape[-1] else rotated


def _products(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns scores, float32 [batch, heads, length, kv_length], of queries with keys, which may have fewer heads."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    return jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)


def _check_positive(scaling: object, *names: str) -> None:
    for name in names:
        if getattr(scaling, name) <= 0:
            raise ValueError(f"rotary.{type(scaling).__name__}.{name} must be positive, not {getattr(scaling, name)}")
