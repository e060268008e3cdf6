"""Slot assignment against a loop that says what it should do, and what Batch Priority Routing promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshway.models.layers.mixture import dispatch
from meshway.models.layers.mixture.routers import ExpertScores, TokenChoices

TOKENS, EXPERTS, K, CAPACITY = 7, 3, 2, 3


@functools.partial(jax.jit, static_argnums=(3, 4))
def assign(choices, real, gates, num_experts, capacity):
    """One group's slots, without the axis of groups."""
    if isinstance(choices, TokenChoices):
        choices = TokenChoices(choices.experts, gates, choices.priority)
    choices, real = jax.tree.map(lambda x: jnp.asarray(x)[None], (choices, real))
    found = dispatch.assign(choices, real, num_experts, capacity)
    own = {name: getattr(found, name)[:, 0] for name in ("token", "gate", "choice")}
    slot = None if found.slot is None else found.slot[0]
    return dispatch.Slots(slot=slot, **own), dispatch.choices_kept(found, real.shape[1])[0]


def queue(experts, priority, real):
    """The slots by a loop: {expert: [(token, rank), ...]} in order."""
    order = sorted(range(len(experts)), key=lambda token: -priority[token])  # stable
    taken = {expert: [] for expert in range(EXPERTS)}
    for rank in range(experts.shape[1]):
        for token in order:
            expert = experts[token, rank]
            if real[token] and len(taken[expert]) < CAPACITY:
                taken[expert].append((token, rank))
    return taken


@st.composite
def groups(draw):
    experts = [draw(st.permutations(range(EXPERTS)))[:K] for _ in range(TOKENS)]
    # Priorities from a few values: ties, which go by the order of tokens, are common.
    priority = draw(st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75]), min_size=TOKENS, max_size=TOKENS))
    real = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0]), min_size=TOKENS, max_size=TOKENS))
    return np.array(experts, np.int32), np.array(priority, np.float32), np.array(real, np.float32)


def gates_of(experts):
    return np.arange(experts.size, dtype=np.float32).reshape(experts.shape) + 1


@settings(deadline=None, max_examples=60, derandomize=True)
@given(groups(), st.booleans())
def test_assign_equals_the_loop(group, by_priority):
    experts, priority, real = group
    gates = gates_of(experts)
    choices = TokenChoices(experts, gates, priority if by_priority else None)
    found, kept = assign(choices, real, gates, EXPERTS, CAPACITY)
    taken = queue(experts, priority if by_priority else np.zeros(TOKENS), real)
    slot = np.full((TOKENS, K), EXPERTS * CAPACITY)
    for expert, row in taken.items():
        for place in range(CAPACITY):
            token, rank = row[place] if place < len(row) else (TOKENS, 0)
            assert found.token[expert, place] == token
            assert found.choice[expert, place] == token * K + rank
            assert found.gate[expert, place] == (gates[token, rank] if token < TOKENS else 0)
            if token < TOKENS:
                slot[token, rank] = expert * CAPACITY + place
    np.testing.assert_array_equal(found.slot, slot)
    np.testing.assert_array_equal(kept, (slot < EXPERTS * CAPACITY).sum(axis=1))
    dropped = int((real[:, None] * np.ones(K)).sum() - kept.sum())
    counts = np.bincount(experts[real > 0].reshape(-1), minlength=EXPERTS)
    assert dropped == np.maximum(counts - CAPACITY, 0).sum()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(groups())
def test_batch_priority_routing_keeps_those_of_highest_priority(group):
    experts, priority, real = group
    found, _ = assign(TokenChoices(experts, gates_of(experts), priority), real, gates_of(experts), EXPERTS, CAPACITY)
    held = np.asarray(found.slot) < EXPERTS * CAPACITY
    for token, rank in np.ndindex(TOKENS, K):
        if held[token, rank] or not real[token]:
            continue
        rivals = (experts == experts[token, rank]) & held
        assert rivals.sum() == CAPACITY, "a choice was dropped though there was room"
        assert not rivals[:, rank + 1 :].any(), "a later choice took the room of an earlier one"
        assert (priority[rivals[:, rank]] >= priority[token]).all(), "one of lower priority took its room"


def test_experts_that_choose_are_perfectly_balanced():
    scores = np.random.default_rng(0).random((TOKENS, EXPERTS)).astype(np.float32)
    real = np.array([1, 1, 1, 1, 1, 0, 1], np.float32)
    found, kept = assign(ExpertScores(scores), real, None, EXPERTS, CAPACITY)
    assert (np.asarray(found.token) < TOKENS).all()  # every slot of every expert
    for expert in range(EXPERTS):
        best = sorted(np.flatnonzero(real), key=lambda token: -scores[token, expert])[:CAPACITY]
        np.testing.assert_array_equal(found.token[expert], best)
        np.testing.assert_array_equal(found.gate[expert], scores[best, expert])
    np.testing.assert_array_equal(kept, np.bincount(np.asarray(found.token).reshape(-1), minlength=TOKENS))
    few, _ = assign(ExpertScores(scores), np.eye(TOKENS)[0].astype(np.float32), None, EXPERTS, CAPACITY)
    np.testing.assert_array_equal(few.token, [[0, TOKENS, TOKENS]] * EXPERTS)
    np.testing.assert_array_equal(few.gate[:, 1:], 0)


GROUPS = 2


@pytest.fixture(scope="module")
def two_groups():
    """(choices of two groups, their slots)."""
    rng = np.random.default_rng(1)
    experts = np.argsort(rng.random((GROUPS, TOKENS, EXPERTS)), axis=-1)[..., :K].astype(np.int32)
    choices = TokenChoices(experts, gates_of(experts), rng.random((GROUPS, TOKENS)).astype(np.float32))
    real = np.ones((GROUPS, TOKENS), np.float32)
    return choices, jax.jit(dispatch.assign, static_argnums=(2, 3))(choices, real, EXPERTS, CAPACITY)


def test_each_group_has_slots_of_its_own(two_groups):
    choices, whole = two_groups
    for group in range(GROUPS):
        priority, gates = choices.priority[group], choices.gates[group]
        own = TokenChoices(choices.experts[group], gates, priority)
        alone, kept = assign(own, np.ones(TOKENS, np.float32), gates, EXPERTS, CAPACITY)
        empty = alone.token == TOKENS
        np.testing.assert_array_equal(
            whole.token[:, group], np.where(empty, GROUPS * TOKENS, alone.token + group * TOKENS)
        )
        np.testing.assert_array_equal(whole.gate[:, group], alone.gate)
        np.testing.assert_array_equal(dispatch.choices_kept(whole, TOKENS)[group], kept)


@pytest.mark.parametrize(("first", "count"), [(0, EXPERTS), (1, 2)])
def test_both_sides_of_a_slot_agree_on_all_experts_and_on_some(two_groups, first, count):
    choices, whole = two_groups
    part = dispatch.of_experts(whole, jnp.int32(first), count)
    np.testing.assert_array_equal(part.token, whole.token[first : first + count])
    held = np.flatnonzero(part.slot.reshape(-1) < part.token.size)
    np.testing.assert_array_equal(np.asarray(part.choice).reshape(-1)[part.slot.reshape(-1)[held]], held)
    np.testing.assert_array_equal(np.asarray(part.token).reshape(-1)[part.slot.reshape(-1)[held]], held // K)
    seated = np.asarray(part.choice).reshape(-1)
    np.testing.assert_array_equal(np.sort(seated[seated < choices.experts.size]), held)


@pytest.mark.parametrize(
    ("tokens", "k", "num_experts", "factor", "slots_each"),
    [(512, 1, 8, 1.25, 80), (10, 1, 4, 1.0, 3), (3, 2, 2, 9.0, 3), (1, 2, 64, 1.0, 1), (10, 1, 10, 1.1, 2)],
)
def test_capacity(tokens, k, num_experts, factor, slots_each):
    assert dispatch.capacity_of(tokens, k, num_experts, factor) == slots_each
