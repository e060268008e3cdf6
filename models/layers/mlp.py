"""Linear maps between named axes, and feed-forward layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from meshway.framework.axes import TOKENS, Names, constrain, constrain_operand
from meshway.models.layers.integer_products import IntegerProduct
from meshway.models.layers.norm import dropout
from meshway.models.layers.sharded_products import PartialSums, multiply, multiply_all
from meshway.models.module import param, value_of

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,  # the tanh form, as in T5 1.1
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def fan_in_init(
    distribution: Literal["truncated_normal", "normal"] = "truncated_normal", scale: float = 1.0
) -> Callable[[int], Initializer]:
    """Variance scaling by the number of contracted features: `fan_in_init()(num_contracted_dims)`."""

    def of(num_inputs: int) -> Initializer:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            rows = math.prod(shape[:num_inputs])
            matrix = jax.nn.initializers.variance_scaling(scale, "fan_in", distribution)
            return matrix(key, (rows, math.prod(shape[num_inputs:])), dtype).reshape(shape)

        return init

    return of


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, num_inputs: int) -> jax.Array:
    """Contracts the last `num_inputs` dims of x with the first ones of `kernel`.

    The gradient of the kernel is x^T g with x on the left. jax would put g there, and XLA:CPU transposes the left
    factor: x is smaller, and one transposed x is shared by all kernels applied to it (query, key, value; the MLP's
      two).
    """
    batch = x.ndim - num_inputs
    dims = (tuple(range(batch, x.ndim)), tuple(range(num_inputs)))
    return jax.lax.dot_general(x, kernel, (dims, ((), ())))


def _project_forward(x: jax.Array, kernel: jax.Array, num_inputs: int) -> tuple[jax.Array, tuple]:
    return project(x, kernel, num_inputs), (x, kernel)


def _project_backward(num_inputs: int, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    batch = x.ndim - num_inputs
    produced = (tuple(range(batch, g.ndim)), tuple(range(num_inputs, kernel.ndim)))
    rows = (tuple(range(batch)),) * 2
    return jax.lax.dot_general(g, kernel, (produced, ((), ()))), jax.lax.dot_general(x, g, (rows, ((), ())))


project.defvjp(_project_forward, _project_backward)


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] (+ bias).

    It is computed in the dtype of x: parameters stay float32 and are cast where they are used.
    """

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        rngs: nnx.Rngs,
        init: Callable[[int], Initializer] = fan_in_init(),
        use_bias: bool = False,
        products: IntegerProduct | None = None,
    ):
        """`inputs` and `outputs` map axis names to sizes, in order; `products` None computes them by `project`."""
        shape = (*inputs.values(), *outputs.values())
        axes = (*inputs, *outputs)
        self.kernel = param(init(len(inputs))(rngs.params(), shape, jnp.float32), axes, summed=tuple(inputs))
        self.bias = param(jnp.zeros(tuple(outputs.values())), tuple(outputs)) if use_bias else None
        self.num_inputs, self.axes, self.product = len(inputs), axes, products or project

    def __call__(self, x: jax.Array, tokens: Names | None = None) -> jax.Array:
        """x [..., inputs] -> [..., outputs]; `tokens` are the logical axes of the dimensions that stay, None where the
        compiler is to decide what devices send."""
        y = self.terms(x, tokens)
        assert not isinstance(y, PartialSums)
        return y

    def terms(
        self, x: jax.Array, tokens: Names | None, output_tokens: Names | None = None, sum_later: bool = False
    ) -> jax.Array | PartialSums:
        """As a call, or with `sum_later` its terms on each device, where there are such and no bias.

        Args:
          output_tokens: the logical axes of the dimensions that stay, as the product has them, if they are others.
        """
        if tokens is None:
            y: Any = self.product(x, value_of(self.kernel, x.dtype), self.num_inputs)
        else:
            y = multiply(x, *self.factor(x.dtype, tokens, output_tokens), sum_later and self.bias is None)
        return y if isinstance(y, PartialSums) else self.biased(y)

    def factor(
        self, dtype: jnp.dtype, tokens: Names, output_tokens: Names | None = None
    ) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array], tuple[Names, Names, Names]]:
        """Returns the kernel in `dtype`, how it is multiplied, and the logical axes: `multiply`'s arguments."""
        inputs, outputs = self.axes[: self.num_inputs], self.axes[self.num_inputs :]
        names = (*tokens, *inputs), self.axes, (*(output_tokens or tokens), *outputs)
        return value_of(self.kernel, dtype), functools.partial(self.product, num_inputs=self.num_inputs), names

    def biased(self, y: jax.Array) -> jax.Array:
        """Adds the bias, where there is one."""
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def project_all(x: jax.Array, tokens: Names, *maps: tuple[Linear, Names | None]) -> list[jax.Array]:
    """Returns x [..., inputs] through each of several (linear map, its `output_tokens`), see `Linear.terms`: where x is
    gathered beside its products, it is gathered once."""
    products = multiply_all(x, [linear.factor(x.dtype, tokens, output) for linear, output in maps])
    return [linear.biased(y) for (linear, _), y in zip(maps, products, strict=True)]


class Mlp(nnx.Module):
    """wo(product over i of a_i(wi_i(x))) for activations a_i: one is a plain MLP, two are gated (Shazeer 2020, eq.
    5-6)."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        rngs: nnx.Rngs,
        activations: Sequence[str] = ("gelu", "linear"),
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        products: IntegerProduct | None = None,
    ):
        """`activations` name functions of ACTIVATIONS; `use_bias` adds a bias to each product; `products` computes them
        in integers.

        Raises:
          ValueError: an unknown activation.
        """
        unknown = [name for name in activations if name not in ACTIVATIONS]
        if unknown or not activations:
            raise ValueError(f"Mlp.activations: unknown {unknown}; known are {sorted(ACTIVATIONS)}")
        linear = functools.partial(Linear, rngs=rngs, use_bias=use_bias, products=products)
        for i in range(len(activations)):
            setattr(self, f"wi_{i}", linear({"embed": d_model}, {"mlp": d_ff}))
        self.wo = linear({"mlp": d_ff}, {"embed": d_model})
        self.activations, self.dropout_rate = tuple(activations), dropout_rate

    def __call__(self, x: jax.Array, *, rng: jax.Array | None = None) -> jax.Array:
        """x [batch, length, d_model] -> the same shape."""
        y = self.terms(x, rng=rng)
        assert not isinstance(y, PartialSums)
        return y

    @property
    def inputs(self) -> list[tuple[Linear, None]]:
        """The maps of x, as `project_all` takes them."""
        return [(getattr(self, f"wi_{i}"), None) for i in range(len(self.activations))]

    def terms(
        self,
        x: jax.Array,
        *,
        rng: jax.Array | None = None,
        sum_later: bool = False,
        projected: Sequence[jax.Array] | None = None,
    ) -> jax.Array | PartialSums:
        """As a call, or with `sum_later` the terms on each device, where there are such (`Linear.terms`).

        Args:
          projected: x through `inputs`, where a block has done that.
        """
        if projected is None:
            x = constrain_operand(x, ("batch", "length", "embed"), free_for="mlp")
            projected = project_all(x, TOKENS, *self.inputs)
        hidden = jnp.ones((), x.dtype)
        for name, y in zip(self.activations, projected, strict=True):
            hidden = hidden * ACTIVATIONS[name](checkpoint_name(y, "mlp_wi"))
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        out = self.wo.terms(dropout(hidden, self.dropout_rate, rng), TOKENS, sum_later=sum_later)
        if isinstance(out, PartialSums):
            return out
        return checkpoint_name(constrain(out, ("batch", "length", "embed")), "mlp_wo")
