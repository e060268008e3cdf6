"""What token objectives ask of a batch."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """Shape, dtype and logical axes of one feature (meets `framework.interfaces.ArraySpec` by shape)."""

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] = ("batch", "length")


def token_spec(batch_size: int, length: int, side: str, names: Iterable[str]) -> dict[str, TokenSpec]:
    """Returns features `side`_`name` [batch, length]: weights float32, all else int32."""
    return {
        f"{side}_{name}": TokenSpec((batch_size, length), np.dtype("float32" if name == "loss_weights" else "int32"))
        for name in names
    }
