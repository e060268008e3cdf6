"""Routers and their losses against numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshway.models.layers.mixture import router_losses, routers
from meshway.models.layers.side_outputs import capture
from meshway.models.module import Network

D, E = 6, 4
X = np.random.default_rng(0).normal(size=(3, 5, D)).astype(np.float32)
REAL = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], np.float32)
KEY = jax.random.key(1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def route(router, x=X, rng=None, kernel=None, bias=None, **options):
    """Returns (choices, losses, metrics, the kernel) of a router on x."""
    network = Network(functools.partial(router, D, E, **options))
    params = network.init(jax.random.key(0))
    params |= {} if kernel is None else {"kernel": kernel}
    params |= {} if bias is None else {"bias": bias}

    @jax.jit
    def run(params, x, rng):
        with capture() as reports:
            choices = network.bind(params)(x, real=jnp.asarray(REAL), rng=rng)
        return choices, reports.losses, reports.metrics

    return *run(params, jnp.asarray(x), rng), np.asarray(params["kernel"])


def logits_of(kernel, x=X):
    return x.astype(np.float64) @ kernel


def mean(values):
    return (values * REAL[..., None]).sum((0, 1)) / REAL.sum()


def test_switch_takes_the_best_at_its_probability():
    choices, losses, metrics, kernel = route(routers.TopK, k=1, normalize=False, z_loss=0.1, rng=KEY)
    p = softmax(logits_of(kernel))
    np.testing.assert_array_equal(choices.experts[..., 0], p.argmax(-1))
    np.testing.assert_allclose(choices.gates[..., 0], p.max(-1), rtol=1e-5)
    share = mean(np.eye(E)[p.argmax(-1)])
    np.testing.assert_allclose(losses["router_load_loss"], 0.01 * E * (share * mean(p)).sum(), rtol=1e-5)
    z = np.log(np.exp(logits_of(kernel)).sum(-1)) ** 2
    np.testing.assert_allclose(losses["router_z_loss"], 0.1 * (z * REAL).sum() / REAL.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["router/load_max"], E * share.max(), rtol=1e-5)
    np.testing.assert_allclose(metrics["router/load_min"], E * share.min(), rtol=1e-5)
    np.testing.assert_allclose(metrics["router/entropy"], mean(-(p * np.log(p))).sum(), rtol=1e-5)


def test_the_load_loss_is_one_when_even_and_the_number_of_experts_at_collapse():
    even = jnp.full((3, 5, E), 1 / E)
    all_to_one = jax.nn.one_hot(jnp.zeros((3, 5), int), E)
    real = jnp.asarray(REAL)
    np.testing.assert_allclose(router_losses.load(even, jnp.full(E, 1 / E), real), 1.0, rtol=1e-6)
    np.testing.assert_allclose(router_losses.load(all_to_one, jax.nn.one_hot(0, E), real), E, rtol=1e-6)
    np.testing.assert_allclose(router_losses.importance(even, real), 0.0, atol=1e-6)
    np.testing.assert_allclose(router_losses.importance(all_to_one, real), E - 1, rtol=1e-6)


def test_normalised_gates_are_a_softmax_over_the_chosen():
    choices, losses, _, kernel = route(routers.TopK, k=2, importance_loss=0.5, rng=KEY)
    logits = logits_of(kernel)
    best = np.argsort(-logits, axis=-1)[..., :2]
    np.testing.assert_array_equal(choices.experts, best)
    chosen = softmax(np.take_along_axis(logits, best, -1))
    np.testing.assert_allclose(choices.gates, chosen, rtol=1e-5)
    renormalised = np.take_along_axis(softmax(logits), best, -1)
    np.testing.assert_allclose(choices.gates, renormalised / renormalised.sum(-1, keepdims=True), rtol=1e-5)
    summed = mean(softmax(logits)) * REAL.sum()
    np.testing.assert_allclose(losses["router_importance_loss"], 0.5 * (summed.std() / summed.mean()) ** 2, rtol=1e-4)
    share = mean(np.eye(E)[best].sum(-2)) / 2
    np.testing.assert_allclose(losses["router_load_loss"], 0.01 * E * (share * mean(softmax(logits))).sum(), rtol=1e-5)


def test_noisy_top_k_and_its_load():
    choices, losses, _, kernel = route(routers.NoisyTopK, k=2, rng=KEY)
    logits = logits_of(kernel)
    noisy = logits + np.asarray(jax.random.normal(KEY, logits.shape)) / E
    best = np.argsort(-noisy, axis=-1)[..., :2]
    np.testing.assert_array_equal(choices.experts, best)
    np.testing.assert_allclose(choices.gates, np.take_along_axis(softmax(noisy), best, -1), rtol=1e-5)
    np.testing.assert_allclose(choices.priority, softmax(noisy).max(-1), rtol=1e-5)
    threshold = np.take_along_axis(noisy, best[..., 1:], -1)
    chance = 0.5 * (1 + np.vectorize(math.erf)((logits - threshold) * E / math.sqrt(2)))
    expected = mean(chance)
    np.testing.assert_allclose(losses["router_load_loss"], 0.005 * (expected.std() / expected.mean()) ** 2, rtol=1e-4)
    still, losses, _, _ = route(routers.NoisyTopK, k=2)
    np.testing.assert_array_equal(still.experts, np.argsort(-logits, axis=-1)[..., :2])
    assert not losses


def test_a_bias_chooses_but_does_not_weigh_and_learns_from_counts_alone():
    bias = np.array([0.0, 3.0, -3.0, 0.1], np.float32)
    choices, losses, metrics, kernel = route(routers.SigmoidTopK, k=2, bias=bias, gate_scale=2.5, rng=KEY)
    scores = 1 / (1 + np.exp(-logits_of(kernel)))
    best = np.argsort(-(scores + bias), axis=-1)[..., :2]
    np.testing.assert_array_equal(choices.experts, best)
    assert (best[..., 0] == 1).all() and (best != 2).all()
    chosen = np.take_along_axis(scores, best, -1)
    np.testing.assert_allclose(choices.gates, 2.5 * chosen / chosen.sum(-1, keepdims=True), rtol=1e-5)
    assert losses["router_bias_loss"] == 0

    @jax.jit
    @jax.grad
    def gradient_of(bias, x, real):
        network = Network(functools.partial(routers.SigmoidTopK, D, E, k=2))
        with capture() as reports:
            choices = network.bind({"kernel": jnp.asarray(kernel), "bias": bias})(x, real=real, rng=KEY)
        return reports.losses["router_bias_loss"] + jnp.sum(choices.gates)  # the gates give the bias nothing

    gradient = gradient_of(bias, X, REAL)
    share = mean(np.eye(E)[best].sum(-2)) / 2
    np.testing.assert_allclose(gradient, share - 1 / E, rtol=1e-5, atol=1e-7)
    # Linear in counts: the parts of a batch, weighed by their tokens, give the whole's.
    parts = [gradient_of(bias, X[i : i + 1], REAL[i : i + 1]) * REAL[i].sum() for i in range(3)]
    np.testing.assert_allclose(sum(parts) / REAL.sum(), gradient, rtol=1e-5, atol=1e-7)


def test_k_may_differ_at_inference_and_jitter_is_for_training():
    quiet, _, _, kernel = route(routers.TopK, k=2, eval_k=1, jitter=0.4)
    assert quiet.experts.shape[-1] == 1
    np.testing.assert_array_equal(quiet.experts[..., 0], logits_of(kernel).argmax(-1))
    loud, _, _, _ = route(routers.TopK, k=2, eval_k=1, jitter=0.4, rng=KEY)
    factor = np.asarray(jax.random.uniform(KEY, X.shape, minval=0.6, maxval=1.4))
    np.testing.assert_array_equal(loud.experts, np.argsort(-logits_of(kernel, X * factor), axis=-1)[..., :2])


def test_routing_is_float32_whatever_the_activations_are():
    x = jnp.asarray(X, jnp.bfloat16)
    low, _, _, kernel = route(routers.TopK, x=x)
    high, _, _, _ = route(routers.TopK, x=x.astype(jnp.float32))
    assert low.gates.dtype == jnp.float32
    np.testing.assert_array_equal(low.gates, high.gates)


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        (routers.TopK, {"k": 5}, "k=5: a token can take 1 to num_experts=4"),
        (routers.NoisyTopK, {"eval_k": 0}, "eval_k=0"),
        (routers.TopK, {"k": 1}, "TopK.normalize = False"),
        (routers.SigmoidTopK, {"priority": "scores"}, "priority must be one of"),
        (routers.NoisyTopK, {"noise": 0.0}, "needs noise above 0"),
    ],
)
def test_options_that_cannot_be(router, options, message):
    with pytest.raises(ValueError, match=message):
        route(router, **options)
