"""Products of activations and weights in integers, for training and for what is trained by them.

Operands are rounded to integers for each product (Jacob et al. 2018, section 2; AQT): x is q_x s_x and w is q_w s_w,
with a scale s_x for each token and s_w for each output, the largest absolute entry over the largest integer, and x w =
(q_x q_w) s_x s_w, whose sums of integers are exact in int32. Gradients pass through rounding as if it were not there
(Bengio et al. 2013). Parameters and optimizers stay as they are.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import qwix

LARGEST_SUM = (2**31 - 1) // 127**2  # products of two int8, in int32
_ROUNDING = 0x51  # what tells the key of rounding from those of dropout


class _Keys(NamedTuple):
    key: jax.Array
    numbers: Iterator[int]


_keys: ContextVar[_Keys | None] = ContextVar("meshway_rounding", default=None)


@contextlib.contextmanager
def rounding_key(rng: jax.Array | None) -> Iterator[None]:
    """Gives the products inside the `with` block randomness to round by; each takes its own. Open it around one call,
    within one trace. None: they round to the nearest."""
    keys = None if rng is None else _Keys(jax.random.fold_in(rng, _ROUNDING), itertools.count())
    token = _keys.set(keys)
    try:
        yield
    finally:
        _keys.reset(token)


@dataclasses.dataclass(frozen=True)
class IntegerProduct:
    """Products in integers (multiplied by qwix): `Attention.products`, `Mlp.products` and `MoeMlp.products`.

    Attributes:
      integers: what operands are rounded to; a TPU multiplies int4 too.
      inputs_gradient: whether the gradient of activations, a product of that of the outputs and the weights, is
        computed in integers too.
      weights_gradient: the same of the weights' gradient, a sum over tokens. Other gradients are computed in the dtype
        of activations, of operands that were not rounded.
      stochastic: gradients are rounded up with a probability equal to their fraction, so that their mean is right (AQT
        does so); False rounds to the nearest.

    Raises:
      ValueError: unknown integers.
    """

    integers: Literal["int8", "int4"] = "int8"
    inputs_gradient: bool = True
    weights_gradient: bool = False
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.integers not in ("int8", "int4"):
            raise ValueError(f"IntegerProduct.integers must be 'int8' or 'int4', not {self.integers!r}")

    def __call__(self, x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
        """Contracts the last `num_inputs` dims of x [tokens ..., inputs ...] with the first ones of a kernel [inputs
        ..., outputs ...], as `mlp.project`; in the dtype of x.

        Raises:
          ValueError: the backend lacks the dtype, or int32 does not hold the sums.
        """
        _check_dtype(self.integers)
        return _product(x, kernel, self._noise(), self, num_inputs)

    def of_experts(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """x [experts, ..., inputs], kernel [experts, inputs, outputs] -> [experts, ..., outputs], each by its own."""
        noise = self._noise()
        _check_dtype(self.integers)
        each = functools.partial(_product, how=self, num_inputs=1)
        if noise is None:
            return jax.vmap(lambda x, kernel: each(x, kernel, None))(x, kernel)
        keys = jax.random.split(noise, x.shape[0])
        return jax.vmap(each)(x, kernel, keys)

    def of_sorted(self, rows: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
        """rows [rows, inputs] sorted by expert, kernel [experts, inputs, outputs], sizes int32 [experts] -> [rows,
        outputs], as `jax.lax.ragged_dot`.

        Raises:
          ValueError: `weights_gradient`, which qwix has no product for.
        """
        if self.weights_gradient:
            raise ValueError(
                "IntegerProduct.weights_gradient=True: experts whose tokens are sorted have no such product in "
                "integers; set it to False, or moe.MoeMlp.dispatch = 'all_to_all'"
            )
        _check_dtype(self.integers)
        return _sorted_product(rows, kernel, sizes, self._noise(), self)

    def _noise(self) -> jax.Array | None:
        keys = _keys.get()
        if keys is None or not self.stochastic:
            return None
        return jax.random.fold_in(keys.key, next(keys.numbers))


def rounded(x: jax.Array, summed: tuple[int, ...], dtype: str, key: jax.Array | None = None) -> qwix.QArray:
    """Returns x as integers, with a float32 scale for each entry of the axes but `summed`.

    Args:
      x: any array.
      summed: the axes over which products with it sum.
      dtype: of the integers, which are symmetric.
      key: each entry is rounded up with a probability equal to its fraction, so that the mean over keys is x; None
        rounds to the nearest.
    """
    x, largest_integer = x.astype(jnp.float32), jnp.iinfo(dtype).max
    largest = jnp.max(jnp.abs(x), axis=summed, keepdims=True)
    scale = jnp.where(largest > 0, largest / largest_integer, 1.0)
    steps = jnp.round(x / scale) if key is None else jnp.floor(x / scale + jax.random.uniform(key, x.shape))
    # A quotient may end above the largest integer by a last bit.
    integers = jnp.clip(steps, -largest_integer, largest_integer).astype(dtype)
    return qwix.QArray(integers, scale, None, jnp.dtype(dtype))


def _dot(x: qwix.QArray, y: qwix.QArray, x_summed: tuple[int, ...], y_summed: tuple[int, ...]) -> jax.Array:
    terms = 1
    for axis in x_summed:
        terms *= x.qvalue.shape[axis]
    if terms > LARGEST_SUM:
        raise ValueError(
            f"IntegerProduct: a sum of {terms:,} products of integers may exceed int32, which holds {LARGEST_SUM:,}; "
            "take more microbatches, or set IntegerProduct.weights_gradient = False"
        )
    product: jax.Array = qwix.dot_general(x, y, ((x_summed, y_summed), ((), ())))
    return product


def _axes(x: jax.Array, kernel: jax.Array, num_inputs: int) -> tuple[tuple[int, ...], ...]:
    """Returns the axes of x that are tokens and inputs, and those of a kernel that are inputs and outputs."""
    tokens = x.ndim - num_inputs
    return tuple(range(tokens)), tuple(range(tokens, x.ndim)), *_kernel_axes(kernel, num_inputs)


def _kernel_axes(kernel: jax.Array, num_inputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(range(num_inputs)), tuple(range(num_inputs, kernel.ndim))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(x: jax.Array, kernel: jax.Array, key: jax.Array | None, how: IntegerProduct, num_inputs: int) -> jax.Array:
    return _forward(x, kernel, key, how, num_inputs)[0]


def _forward(
    x: jax.Array, kernel: jax.Array, key: jax.Array | None, how: IntegerProduct, num_inputs: int
) -> tuple[jax.Array, Any]:
    _, x_inputs, inputs, _ = _axes(x, kernel, num_inputs)
    integers = rounded(x, x_inputs, how.integers)
    y = _dot(integers, rounded(kernel, inputs, how.integers), x_inputs, inputs)
    return y.astype(x.dtype), (integers if how.weights_gradient else x, kernel, key)


def _backward(how: IntegerProduct, num_inputs: int, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, key = saved
    keys = [None, None] if key is None else list(jax.random.split(key))
    inputs, outputs = _kernel_axes(kernel, num_inputs)
    tokens = tuple(range(g.ndim - len(outputs)))
    produced = tuple(range(len(tokens), g.ndim))
    if how.inputs_gradient:
        weights = rounded(kernel, inputs, how.integers)
        # The weights' scales are of outputs, over which is summed: they go to the gradient before it is rounded.
        scaled = g * weights.scale.reshape(kernel.shape[num_inputs:])
        integers = dataclasses.replace(weights, scale=jnp.ones((1,) * kernel.ndim))
        of_x = _dot(rounded(scaled, produced, how.integers, keys[0]), integers, produced, outputs)
    else:
        of_x = jax.lax.dot_general(g, kernel, ((produced, outputs), ((), ())))
    if how.weights_gradient:
        scaled = g * x.scale.reshape(*g.shape[: len(tokens)], *(1,) * len(outputs))
        integers = dataclasses.replace(x, scale=jnp.ones((1,) * x.qvalue.ndim))
        of_kernel = _dot(integers, rounded(scaled, tokens, how.integers, keys[1]), tokens, tokens)
    else:
        of_kernel = jax.lax.dot_general(x, g, ((tokens, tokens), ((), ())))
    return of_x.astype(g.dtype), of_kernel.astype(kernel.dtype), None


_product.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sorted_product(
    rows: jax.Array, kernel: jax.Array, sizes: jax.Array, key: jax.Array | None, how: IntegerProduct
) -> jax.Array:
    return _sorted_forward(rows, kernel, sizes, key, how)[0]


def _sorted_forward(
    rows: jax.Array, kernel: jax.Array, sizes: jax.Array, key: jax.Array | None, how: IntegerProduct
) -> tuple[jax.Array, Any]:
    weights = rounded(kernel, (1,), how.integers)
    y = _ragged(rounded(rows, (1,), how.integers), weights.qvalue, sizes) * _of_rows(weights.scale, rows, sizes)
    return y.astype(rows.dtype), (rows, kernel, sizes, key)


def _sorted_backward(how: IntegerProduct, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    rows, kernel, sizes, key = saved
    _, transposed = jax.vjp(lambda rows, kernel: jax.lax.ragged_dot(rows, kernel, sizes), rows, kernel)
    of_rows, of_kernel = transposed(g)
    if how.inputs_gradient:
        weights = rounded(kernel, (1,), how.integers)
        scaled = rounded(g * _of_rows(weights.scale, rows, sizes), (1,), how.integers, key)
        of_rows = _ragged(scaled, jnp.swapaxes(weights.qvalue, 1, 2), sizes)
    return of_rows.astype(g.dtype), of_kernel, None, None


_sorted_product.defvjp(_sorted_forward, _sorted_backward)


def _ragged(rows: qwix.QArray, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    sums = jax.lax.ragged_dot(rows.qvalue, kernel, sizes, preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * rows.scale


def _of_rows(scale: jax.Array, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    """scale [experts, 1, outputs] -> [rows, outputs], each row's expert's; those past the last expert's get any."""
    return jnp.repeat(scale[:, 0], sizes, axis=0, total_repeat_length=rows.shape[0])


def _check_dtype(dtype: str) -> None:
    platform = getattr(jax.sharding.get_abstract_mesh().abstract_device, "platform", None) or jax.default_backend()
    if platform == "cpu" and dtype != "int8":
        raise ValueError(f"IntegerProduct.integers={dtype!r}: programs for cpu multiply no such integers; use 'int8'")
