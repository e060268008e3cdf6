"""Choices sorted by expert, and what experts make of them, against one choice after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from meshway.models.layers.mixture.experts import ExpertWeights, sort_by_expert, through_experts
from meshway.models.layers.mixture.routers import TokenChoices

TOKENS, K, EXPERTS, D, F = 7, 2, 3, 4, 5
RANDOM = np.random.default_rng(0)
EXPERT = RANDOM.integers(0, EXPERTS + 2, TOKENS * K).astype(np.int32)  # two of those chosen are not here
EXPERT[EXPERT == 1] = 0  # and one of those here is not chosen


def test_choices_are_sorted_stably_and_find_back():
    by_expert = sort_by_expert(jnp.asarray(EXPERT), EXPERTS)
    np.testing.assert_array_equal(by_expert.order, np.argsort(EXPERT, kind="stable"))
    np.testing.assert_array_equal(by_expert.expert, np.sort(EXPERT))
    np.testing.assert_array_equal(by_expert.sizes, np.bincount(EXPERT)[:EXPERTS])
    tokens = np.arange(TOKENS, dtype=np.float32)[:, None]
    rows = by_expert.rows(jnp.asarray(tokens))
    np.testing.assert_array_equal(rows[:, 0], np.argsort(EXPERT, kind="stable") // K)
    np.testing.assert_array_equal(by_expert.choices(rows), np.repeat(tokens, K, axis=0))


def test_outputs_and_gradients_are_those_of_one_choice_after_the_other():
    tokens, wi, wo, gates, masks = (
        jnp.asarray(RANDOM.normal(size=shape), jnp.float32)
        for shape in ((TOKENS, D), (EXPERTS, D, F), (EXPERTS, F, D), (TOKENS, K), (TOKENS * K, F))
    )

    def grouped(tokens, wi, wo, gates):
        by_expert = sort_by_expert(jnp.asarray(EXPERT), EXPERTS)
        weights = ExpertWeights((wi,), wo, ("gelu",))
        outputs = through_experts(tokens, by_expert, weights, masks[by_expert.order])
        return TokenChoices(jnp.asarray(EXPERT).reshape(TOKENS, K), gates).combine(outputs)

    def defined(tokens, wi, wo, gates):
        y = jnp.zeros_like(tokens)
        for choice, expert in enumerate(EXPERT):
            token, rank = divmod(choice, K)
            if expert < EXPERTS:
                hidden = jax.nn.gelu(tokens[token] @ wi[expert]) * masks[choice]
                y = y.at[token].add(gates[token, rank] * (hidden @ wo[expert]))
        return y

    def run(function):
        loss = jax.jit(jax.value_and_grad(lambda *given: jnp.sum(jnp.sin(function(*given))), (0, 1, 2, 3)))
        return jax.jit(function)(tokens, wi, wo, gates), loss(tokens, wi, wo, gates)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), run(grouped), run(defined))
