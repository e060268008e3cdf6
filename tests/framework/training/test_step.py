"""Laws of the train step."""

import collections
import dataclasses
import functools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiers
from tiny import FAMILIES, Descent, Quadratic, losses, program

from meshway.framework.errors import UserError
from meshway.framework.training.program import TrainProgram
from meshway.framework.training.step import TrainState, TrainStep, rng_impl_of

TWO_LAYERS = {"t5_1_1": ("NUM_ENCODER_LAYERS=2", "NUM_DECODER_LAYERS=2"), "lm": ("NUM_LAYERS=2",)}


@pytest.fixture(scope="module")
def plain():
    """Losses of five steps, unrolled, without remat or microbatches."""
    return functools.cache(lambda family: losses(program(family, *TWO_LAYERS[family], "SCAN=False"), 5)[0])


VARIANTS = [["NUM_MICROBATCHES=4"], ["SCAN=True"], ["SCAN=True", "REMAT='minimal'"], ["REMAT='full'"]]
RUN = [(family, variant) for family in FAMILIES for variant in VARIANTS]


# That options are taken is the next test's, that a stack is its layers whichever way it runs `test_stack.py`'s.
@pytest.mark.parametrize("family, variant", tiers(RUN, slow=[RUN[0], RUN[2], RUN[6], RUN[7]]))
def test_how_a_step_is_run_changes_nothing(family, variant, plain):
    other, _ = losses(program(family, *TWO_LAYERS[family], *variant), 5)
    np.testing.assert_allclose(other, plain(family), rtol=1e-5)


def primitives(made):
    """Returns how often each primitive stands in the loss's gradient, inner programs included."""
    found = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                count(inner)

    with made.partitioner.activate():
        gradient = jax.grad(lambda params, batch: made.model.loss(params, batch, None)[0])
        count(jax.make_jaxpr(gradient)(made.param_shapes, made.abstract_batch).jaxpr)
    return found


def test_options_of_a_step_are_taken():
    """Equal losses alone would also come of an option that nobody reads."""
    plain, scanned, minimal, full = (
        primitives(program("lm", *TWO_LAYERS["lm"], *variant))
        for variant in (
            ["SCAN=False"],
            ["SCAN=True"],
            ["SCAN=False", "REMAT='minimal'"],
            ["SCAN=False", "REMAT='full'"],
        )
    )
    assert scanned["scan"] == plain["scan"] + 2, "one forward and one backward"
    assert plain["remat2"] == 0 < minimal["remat2"]
    assert plain["dot_general"] < minimal["dot_general"] < full["dot_general"], "what is not kept is computed again"


@pytest.mark.slow
def test_gradients_are_the_same_whatever_is_kept_by_name_and_where():
    def of(remat):
        made = program("t5_1_1", *TWO_LAYERS["t5_1_1"], "SCAN=True", f"REMAT={remat}")
        gradient = jax.jit(jax.grad(lambda params, batch: made.model.loss(params, batch, None)[0]))
        return gradient(made.model.init(jax.random.key(0)), made.synthetic_batch())

    expected = of("'none'")
    for remat in ("{'query_proj': 'device', 'mlp_wo': 'device'}", "{'mlp_wi': 'offload', 'attention_out': 'device'}"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), of(remat), expected)


def test_microbatches_weigh_by_tokens():
    """Unequal weights in the microbatches: a mean of means would differ."""
    gradients = []
    for count in (1, 4):
        made = program("lm", f"NUM_MICROBATCHES={count}")
        batch = dict(made.synthetic_batch())
        batch["decoder_loss_weights"] = np.where(np.arange(16)[:, None] < 3, 1.0, 0.1).astype(np.float32) * np.ones(
            (16, 16), np.float32
        )
        state, metrics = made.compile_step()(made.init(), made.shard_batch(batch))
        gradients.append((float(metrics["grad_norm"][0]), state.params))
    np.testing.assert_allclose(gradients[0][0], gradients[1][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradients[0][1], gradients[1][1])


def test_microbatches_must_divide_the_batch():
    with pytest.raises(UserError, match="num_microbatches=3 does not divide BATCH_SIZE=16"):
        program("lm", "NUM_MICROBATCHES=3")


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step():
    made = program("lm", "DROPOUT_RATE=0.3")
    step, batch = made.compile_step(), made.shard_batch(made.synthetic_batch())

    def loss(state):
        new, metrics = step(state, batch)
        return float(metrics["loss"][0]), new

    first, after = loss(made.init())
    assert loss(made.init())[0] == first, "the same state and batch drop the same units"
    state = made.init()
    later = dataclasses.replace(state, step=state.step + 1)
    assert abs(loss(later)[0] - first) > 1e-4, "another step drops others"
    assert int(after.step) == 1
    seeded = program("lm", "DROPOUT_RATE=0.3", "SEED=1").model.loss(made.init().params, batch, jax.random.key(1))
    assert abs(float(seeded[0]) - first) > 1e-4, "so does another seed"


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_mesh():
    single, _ = losses(program("t5_1_1", "DROPOUT_RATE=0.3"), 2)
    cut, _ = losses(program("t5_1_1", "DROPOUT_RATE=0.3", layout="fsdp_model"), 2)
    np.testing.assert_allclose(cut, single, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    made = program("lm")
    state, step = made.init(), made.compile_step()
    before = jax.device_get(state)
    batch = dict(made.synthetic_batch())
    good = made.shard_batch(batch)
    batch["decoder_segment_ids"] = np.array(batch["decoder_segment_ids"])
    batch["decoder_segment_ids"][::4] = 0
    batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
    bad = made.shard_batch(batch)
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert int(state.skipped) == int(state.skipped_in_a_row) == count == int(state.step)
        assert float(metrics["skipped_in_a_row"][0]) == count
        assert float(metrics["decoder_density"][0] / metrics["decoder_density"][1]) == 0.75
    jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(state.params))
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, jax.device_get(state.opt_state))
    state, _ = step(state, good)
    assert (int(state.skipped), int(state.skipped_in_a_row), int(state.step)) == (2, 0, 3)
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(jax.device_get(state.params)), strict=True)
    )


class DecodeState(Quadratic):
    """A `Quadratic` that says what its dropout key draws, and the square of that."""

    def loss(self, params, batch, rng):
        loss, weight, metrics = super().loss(params, batch, rng)
        draw = jax.random.uniform(rng)
        return loss, weight, metrics | {"draw": (draw, jnp.ones(())), "square": (draw**2, jnp.ones(()))}


def test_every_microbatch_and_every_step_drops_other_units():
    """Four equal draws would have four times the sum of their squares as the square of their sum."""
    step = TrainStep(DecodeState(), Descent(), seed=0, num_microbatches=4)
    batch, zero = {"rows": jnp.ones((8, 2))}, jnp.zeros((), jnp.int32)
    draws = []
    for number in (0, 1):
        state = TrainState(zero + number, {"w": jnp.ones(2)}, (), zero, zero)
        _, metrics = step(state, batch)
        (draw, times), (square, _) = metrics["draw"], metrics["square"]
        assert times == 4
        assert 4 * square - draw**2 > 1e-3
        draws.append(float(draw))
    assert abs(draws[0] - draws[1]) > 1e-4


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_is_skipped_where_either_the_loss_or_the_gradient_is_not_finite(bad):
    class Broken(Quadratic):
        def loss(self, params, batch, rng):
            loss, weight, metrics = super().loss(params, batch, rng)
            # sqrt has no finite slope at 0; an infinity that no parameter reaches has a slope of 0.
            return loss + (jnp.inf if bad == "loss" else jnp.sqrt(params["w"][0])), weight, metrics

    zero, w = jnp.zeros((), jnp.int32), jnp.array([0.0, 1.0])
    state, metrics = TrainStep(Broken(), Descent(), seed=0)(
        TrainState(zero, {"w": w}, (), zero, zero), {"rows": jnp.ones((4, 2))}
    )
    assert bool(jnp.isfinite(metrics["loss"][0])) == (bad == "gradient")
    assert bool(jnp.isfinite(metrics["grad_norm"][0])) == (bad == "loss")
    np.testing.assert_array_equal(state.params["w"], w)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (1, 1, 1)


def test_a_step_can_take_two_gradients_of_one_batch():
    """Sharpness-aware minimisation (Foret et al. 2021, eq. 2): the gradient at w + rho g / |g|."""
    rho = 0.1

    def sharpness_aware(gradient_at, params):
        gradients, _ = gradient_at(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        return gradient_at(jax.tree.map(lambda p, g: p + rho * g / norm, params, gradients))

    rows = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    w = np.array([1.0, -2.0, 0.5], np.float32)
    zero = jnp.zeros((), jnp.int32)
    step = TrainStep(Quadratic(), Descent(), seed=0, gradient_rule=sharpness_aware)
    state, _ = jax.jit(step)(TrainState(zero, {"w": jnp.asarray(w)}, (), zero, zero), {"rows": rows})
    hessian = rows.T @ rows / 6
    g = hessian @ w
    expected = w - hessian @ (w + rho * g / np.linalg.norm(g))
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)


def test_a_missing_length_is_told():
    with pytest.raises(UserError, match="lacks 'targets', which EncoderDecoder needs"):
        program("t5_1_1", "TASK_FEATURE_LENGTHS={'inputs': 8}")


def test_flops_of_the_program_are_three_forward_passes_and_do_not_depend_on_scan():
    made: TrainProgram = program("lm", *TWO_LAYERS["lm"], "SCAN=False")
    assert made.flops == program("lm", *TWO_LAYERS["lm"], "SCAN=True").flops
    batch, length, d, ff, heads, size, vocab, layers = 16, 16, 64, 128, 4, 16, 256, 2
    tokens = batch * length
    projections = 4 * 2 * tokens * d * heads * size
    scores = 2 * 2 * batch * heads * length * length * size
    forward = layers * (projections + scores + 3 * 2 * tokens * d * ff) + 2 * tokens * d * vocab
    assert made.flops == 3 * forward


def generators(made):
    """Returns the types of random keys in a step's gradients."""
    types = [str(each.outvars[0].aval.dtype) for each in made.trace_gradients().eqns if each.outvars]
    return {each for each in types if each.startswith("key<")}


def test_dropout_is_drawn_by_the_generator_asked_for():
    made = [program("lm", "DROPOUT_RATE=0.3", f"USE_HARDWARE_RNG={impl}") for impl in ("False", "True", "'rbg'")]
    assert [generators(each) for each in made] == [{"key<fry>"}, {"key<urbg>"}, {"key<rbg>"}]


@pytest.mark.proofs
def test_the_devices_generator_draws_the_same_again():
    plain, other = (program("lm", "DROPOUT_RATE=0.3", f"USE_HARDWARE_RNG={impl}") for impl in ("False", "True"))
    found = losses(other, 2)[0]
    assert found == losses(other, 2)[0] and found != losses(plain, 2)[0]


def test_a_generator_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="use_hardware_rng='rgb' is neither True .* nor a generator of jax's"):
        rng_impl_of("rgb")
    assert [rng_impl_of(each) for each in (False, True, "rbg")] == [None, "unsafe_rbg", "rbg"]
