import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from meshway.framework.planning.flops import count_flops, train_flops


def _spec(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "equation, lhs, rhs, expected",
    [
        ("mk,kn->mn", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5), 2 * 2 * 4 * 3 * 6 * 5),
        ("bshd,hdm->bsm", (2, 3, 4, 5), (4, 5, 6), 2 * 2 * 3 * 4 * 5 * 6),
    ],
)
def test_einsum(equation: str, lhs: tuple[int, ...], rhs: tuple[int, ...], expected: int) -> None:
    assert count_flops(functools.partial(jnp.einsum, equation), _spec(*lhs), _spec(*rhs)) == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups: int) -> None:
    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    flops = count_flops(convolve, _spec(2, 8, 9, 4), _spec(3, 3, 4 // groups, 6))
    assert flops == 2 * (2 * 8 * 9 * 6) * (3 * 3 * 4 // groups)


def test_ragged_dot_and_its_gradient() -> None:
    args = _spec(12, 5), _spec(3, 5, 7), _spec(3, dtype="int32")
    once = 2 * 12 * 5 * 7  # each row meets one group's matrix
    assert count_flops(jax.lax.ragged_dot, *args) == once

    def gradient(x: jax.Array, w: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        return jax.grad(lambda *a: jax.lax.ragged_dot(*a, sizes).sum(), argnums=(0, 1))(x, w)

    assert count_flops(gradient, *args) == 3 * once


def _layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


@jax.custom_vjp
def _custom(x: jax.Array, w: jax.Array) -> jax.Array:
    return _layer(x, w)


_custom.defvjp(lambda x, w: (_layer(x, w), (x, w)), lambda residuals, g: residuals)


@jax.custom_jvp
def _custom_jvp(x: jax.Array, w: jax.Array) -> jax.Array:
    return _layer(x, w)


_custom_jvp.defjvp(lambda primals, tangents: (_layer(*primals), tangents[0]))


@pytest.mark.parametrize(
    "layer",
    [_layer, jax.jit(_layer), jax.checkpoint(_layer), _custom, _custom_jvp, jax.jit(jax.jit(_custom))],
)
def test_every_wrapper_is_looked_into(layer: Callable[..., jax.Array]) -> None:
    assert count_flops(layer, _spec(4, 8), _spec(8, 8)) == 2 * 4 * 8 * 8


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unrolled_forward_and_backward(remat: bool) -> None:
    layer = jax.checkpoint(_layer) if remat else _layer

    def scanned(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, w: (layer(c, w), None), x, ws)[0].sum()

    def unrolled(x: jax.Array, ws: jax.Array) -> jax.Array:
        for i in range(5):
            x = layer(x, ws[i])
        return x.sum()

    args = _spec(4, 8), _spec(5, 8, 8)
    forward = 5 * 2 * 4 * 8 * 8
    assert count_flops(scanned, *args) == count_flops(unrolled, *args) == forward
    gradients = [count_flops(jax.grad(f, argnums=(0, 1)), *args) for f in (scanned, unrolled)]
    assert gradients == [(4 if remat else 3) * forward] * 2
    assert train_flops(scanned, *args) == 3 * forward  # recomputation is not model FLOPs


def test_cond_counts_its_dearest_branch_and_while_its_body_once() -> None:
    def branches(x: jax.Array) -> jax.Array:
        return jax.lax.switch(0, [lambda y: y, lambda y: y @ y @ y, lambda y: y @ y], x)

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x)

    assert count_flops(branches, _spec(8, 8)) == 2 * 2 * 8**3
    assert count_flops(loop, _spec(8, 8)) == 2 * 8**3


def test_shard_map_counts_all_shards() -> None:
    mesh = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = PartitionSpec("data", None), PartitionSpec(None, "model")
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data", "model"))
    assert count_flops(sharded, _spec(8, 16), _spec(16, 32)) == 2 * 8 * 16 * 32
    partly_manual = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(specs[0], PartitionSpec()), out_specs=specs[0], axis_names={"data"}
    )
    assert count_flops(partly_manual, _spec(8, 16), _spec(16, 32)) == 2 * 8 * 16 * 32


def test_pallas_kernel_counts_its_grid() -> None:
    def kernel(x_ref: jax.Array, y_ref: jax.Array, out_ref: jax.Array) -> None:
        out_ref[...] = x_ref[...] @ y_ref[...]

    multiply = pl.pallas_call(
        kernel,
        out_shape=_spec(8, 8),
        grid=(2, 4),
        in_specs=[pl.BlockSpec((4, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 2), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((4, 2), lambda i, j: (i, j)),
    )
    assert count_flops(multiply, _spec(8, 16), _spec(16, 8)) == 2 * 8 * 16 * 8


def test_encoder_decoder_by_closed_form() -> None:
    """d_model 256, 4+4 layers, 4 heads x 64, d_ff 512 gated, vocabulary 8,064, batch 16, lengths 256, 64."""
    batch, source, target, layers = 16, 256, 64, 4
    model, heads, head_dim, hidden, vocab = 256, 4, 64, 512, 8064

    def attend(x: jax.Array, memory: jax.Array, w: list[jax.Array]) -> jax.Array:
        q, k, v = (
            (a @ b).reshape(*a.shape[:2], heads, head_dim) for a, b in zip((x, memory, memory), w[:3], strict=True)
        )
        scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ w[3]

    def mlp(x: jax.Array, w: list[jax.Array]) -> jax.Array:
        return x + (jax.nn.gelu(x @ w[0]) * (x @ w[1])) @ w[2]

    def logits(p: dict, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        def encode(x: jax.Array, w: dict) -> tuple[jax.Array, None]:
            return mlp(attend(x, x, w["self"]), w["mlp"]), None

        memory = jax.lax.scan(encode, p["embed"][inputs], p["encoder"])[0]

        def decode(x: jax.Array, w: dict) -> tuple[jax.Array, None]:
            return mlp(attend(attend(x, x, w["self"]), memory, w["cross"]), w["mlp"]), None

        return jax.lax.scan(decode, p["embed"][targets], p["decoder"])[0] @ p["head"]

    square = _spec(layers, model, model)
    block = {
        "self": [square] * 4,
        "cross": [square] * 4,
        "mlp": [_spec(layers, model, hidden)] * 2 + [_spec(layers, hidden, model)],
    }
    params = {"embed": _spec(vocab, model), "head": _spec(model, vocab), "encoder": block, "decoder": block}
    flops = train_flops(logits, params, _spec(batch, source, dtype="int32"), _spec(batch, target, dtype="int32"))

    def attention(queries: int, keys: int) -> int:
        projections = 2 * model * model * (2 * queries + 2 * keys)
        return projections + 2 * 2 * queries * keys * heads * head_dim

    encoder = layers * (attention(source, source) + 3 * 2 * source * model * hidden)
    decoder = layers * (attention(target, target) + attention(target, source) + 3 * 2 * target * model * hidden)
    assert flops == 3 * batch * (encoder + decoder + 2 * target * model * vocab)
    np.testing.assert_allclose(flops, 126.2e9, rtol=1e-3)
