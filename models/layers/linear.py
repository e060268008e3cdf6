"""Linear maps between named axes."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from meshway.models.module import param

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
FEATURE_LETTERS = "defg"  # letters of contracted dimensions; "hijk" of produced ones
OUTPUT_LETTERS = "hijk"


def fan_in_init(distribution: str = "truncated_normal", scale: float = 1.0) -> Callable[[int], Initializer]:
    """Variance scaling by the number of contracted features: `fan_in_init()(num_contracted_dims)`."""

    def of(num_inputs: int) -> Initializer:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            rows = math.prod(shape[:num_inputs])
            matrix = jax.nn.initializers.variance_scaling(scale, "fan_in", distribution)
            return matrix(key, (rows, math.prod(shape[num_inputs:])), dtype).reshape(shape)

        return init

    return of


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] (+ bias).

    The product is taken in the dtype of x: parameters stay float32 and are cast where they are used.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        rngs: nnx.Rngs,
        init: Callable[[int], Initializer] = fan_in_init(),
        use_bias: bool = False,
    ):
        """`inputs` and `outputs` map axis names to sizes, in order."""
        shape = (*inputs.values(), *outputs.values())
        axes = (*inputs, *outputs)
        self.kernel = param(init(len(inputs))(rngs.params(), shape, jnp.float32), axes)
        self.bias = param(jnp.zeros(tuple(outputs.values())), tuple(outputs)) if use_bias else None
        contracted, produced = FEATURE_LETTERS[: len(inputs)], OUTPUT_LETTERS[: len(outputs)]
        self.equation = f"...{contracted},{contracted}{produced}->...{produced}"

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.einsum(self.equation, x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
