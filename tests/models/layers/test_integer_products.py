"""Products in integers: by hand, by expert, under layouts, and what a model learns by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiers
from tiny import gradients_and_losses, losses, program

from meshway.models.layers.integer_products import IntegerProduct, rounded, rounding_key

NEAREST = IntegerProduct(weights_gradient=True, stochastic=False)
INT8 = "PRODUCTS=@integer_products.IntegerProduct()"


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(x, axis):
    """Integers and scales of x, which is summed over `axis`."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / np.float32(127)
    return np.round(x / scale).astype(np.int64), scale


def test_a_product_and_its_gradients_are_those_of_integers():
    x, w, g = numbers(2, 3, 16), numbers(16, 5, seed=1), numbers(2, 3, 5, seed=2)
    y, transposed = jax.vjp(lambda x, w: NEAREST(x, w, 1), x, w)
    (qx, sx), (qw, sw) = by_hand(x, 2), by_hand(w, 0)
    np.testing.assert_allclose(y, (qx @ qw) * sx * sw, rtol=1e-6)
    of_x, of_w = transposed(jnp.asarray(g))
    qg, sg = by_hand(g * sw[0], 2)
    np.testing.assert_allclose(of_x, (qg @ qw.T) * sg, rtol=1e-5)
    qg, sg = by_hand((g * sx).reshape(6, 5), 0)
    np.testing.assert_allclose(of_w, (qx.reshape(6, 16).T @ qg) * sg, rtol=1e-5)
    # Left in floats, they are those of operands that were not rounded.
    floats = IntegerProduct(inputs_gradient=False)
    of_x, of_w = jax.vjp(lambda x, w: floats(x, w, 1), x, w)[1](jnp.asarray(g))
    np.testing.assert_allclose(of_x, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_w, np.einsum("bti,bto->io", x, g), rtol=1e-5, atol=1e-5)
    text = str(jax.make_jaxpr(jax.grad(lambda x, w: NEAREST(x, w, 1).sum(), (0, 1)))(x, w))
    assert text.count("preferred_element_type=int32") == 3


def test_rounding_by_chance_has_the_right_mean():
    x = numbers(4, 8)
    x[1] = 0.0
    keys = jax.random.split(jax.random.key(0), 4000)
    made = jax.vmap(lambda key: rounded(x, (1,), "int8", key))(keys)
    values = np.asarray(made.qvalue * made.scale)
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(values - x) <= scale * 1.0001) and np.abs(made.qvalue).max() == 127
    assert np.all(np.abs(values.mean(0) - x) <= 5 * scale / np.sqrt(12 * len(keys)) + 1e-6 * scale)
    assert np.all(values[:, 1] == 0)


def test_products_of_a_layer_are_rounded_by_keys_of_their_own():
    how, x, w = IntegerProduct(), numbers(4, 16), numbers(16, 8, seed=1)

    @jax.jit
    def gradients(key):
        def total(x):
            with rounding_key(key):
                return how(x[0], w, 1).sum() + how(x[1], w, 1).sum()

        return jax.grad(total)(jnp.stack([x, x]))

    found = gradients(jax.random.key(0))
    assert np.any(found[0] != found[1])
    np.testing.assert_array_equal(found, gradients(jax.random.key(0)))
    assert np.any(found != gradients(jax.random.key(1)))


@pytest.mark.slow
def test_each_expert_multiplies_by_its_own():
    rows, w, sizes = numbers(7, 6), numbers(2, 6, 5, seed=1), np.array([3, 2])
    wanted = np.concatenate([NEAREST(rows[:3], w[0], 1), NEAREST(rows[3:5], w[1], 1)])
    how = IntegerProduct(stochastic=False)
    np.testing.assert_allclose(how.of_sorted(rows, w, sizes)[:5], wanted, rtol=1e-5)
    slots = jnp.stack([rows[:3], rows[3:6]]).reshape(2, 1, 3, 6)
    np.testing.assert_allclose(how.of_experts(slots, w)[0, 0], wanted[:3], rtol=1e-5)
    of_slots, of_rows = (
        jax.grad(lambda w, of=of: jnp.square(of(w)).sum())(w)
        for of in (
            lambda w: how.of_experts(slots, w)[:, :, :2],
            lambda w: how.of_sorted(rows, w, sizes)[jnp.array([0, 1, 3, 4])],
        )
    )
    np.testing.assert_allclose(of_slots, of_rows, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="weights_gradient=True: experts whose tokens are sorted"):
        NEAREST.of_sorted(rows, w, sizes)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="integers must be 'int8' or 'int4', not 'int2'"):
        IntegerProduct("int2")
    with pytest.raises(ValueError, match="integers='int4': programs for cpu multiply no such integers; use 'int8'"):
        IntegerProduct("int4")(jnp.ones((2, 3)), jnp.ones((3, 2)), 1)
    x, w = jax.ShapeDtypeStruct((140_000, 2), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    with pytest.raises(ValueError, match="a sum of 140,000 products .* take more microbatches"):
        jax.eval_shape(jax.grad(lambda w, x: NEAREST(x, w, 1).sum()), w, x)


def made(family, *bindings, layout="single"):
    return program(family, INT8, *bindings, layout=layout)


NO_CHANCE = "integer_products.IntegerProduct.stochastic=False"
SLOW = ("REMAT='full'", "SCAN=True", "NUM_ENCODER_LAYERS=2", "NUM_MICROBATCHES=2")
# How far gradients may be off, as a share of each leaf's largest. Where the compiler shards products, scales and random
# numbers are those of one device, and few entries are rounded otherwise. Where layers write collectives down, and for
# experts, each device has scales of its own shard, and a router may choose otherwise; microbatches of a pipeline have
# random numbers of their own.
LAYOUTS = [
    ("lm", "fsdp_model", ("integer_products.IntegerProduct.weights_gradient=True",), 0.02),
    ("t5_1_1", "fsdp", SLOW, 0.02),
    ("mixtral", "expert_model", (NO_CHANCE,), 0.05),
    ("lm", "model_2d", (), 0.02),
    ("lm", "inference/2d", (NO_CHANCE,), 0.05),
    ("lm", "stage", (NO_CHANCE, "NUM_LAYERS=4"), 0.02),
    ("switch", "expert", (NO_CHANCE,), 0.15),
]


@pytest.mark.parametrize("family, layout, bindings, bound", tiers(LAYOUTS, slow=LAYOUTS[:3]))
def test_sharded_products_are_those_of_one_device(family, layout, bindings, bound):
    single = made(family, *bindings)
    fresh = jax.device_get(single.init())
    wanted, wanted_losses = gradients_and_losses(single, fresh, 2)
    found, found_losses = gradients_and_losses(made(family, *bindings, layout=layout), fresh, 2)
    np.testing.assert_allclose(found_losses, wanted_losses, rtol=5e-4)
    for name, gradient in wanted.items():
        assert np.abs(found[name] - gradient).max() <= bound * np.abs(gradient).max(), name


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_from_a_state_of_floats():
    """A state has the shapes and types that it has without integers, so that checkpoints do too."""
    whole, final = losses(made("lm"), 4)
    _, middle = losses(made("lm"), 2)
    middle = jax.device_get(middle)
    plain = program("lm").state_shapes
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(lambda x: (x.shape, x.dtype), middle)
    after = made("lm")
    rest, again = losses(after, 2, jax.device_put(middle, after.state_shardings), first=2)
    assert rest == whole[2:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(final), jax.device_get(again))


@pytest.mark.parametrize("options", tiers(("", "weights_gradient=True"), slow=("",)))
def test_a_model_learns_as_by_floats(options):
    """Sixteen rows by heart: the loss of 100 steps, from 6 to under 0.1 nats a token, is within 0.06 at all times."""

    def curve(*bindings):
        program_ = program("t5_1_1", *bindings)
        step, state, found = program_.compile_step(), program_.init(), []
        batch = program_.shard_batch(program_.synthetic_batch())
        for _ in range(100):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
        return np.array(found)

    floats, integers = curve(), curve(INT8, *(f"integer_products.IntegerProduct.{each}" for each in options.split()))
    assert floats[-1] < 0.1 and np.any(floats != integers)
    assert np.abs(floats - integers).max() <= 0.06
