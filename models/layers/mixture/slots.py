"""Slots: which token takes which place with which expert, the one assignment that every bounded dispatch shares.

A capacity group is a fixed set of tokens (rows of the batch, or parts of one), never what happens to lie on a device;
each expert has `capacity` slots for each group.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from meshway.models.layers.mixture.routers import Choices, ExpertScores, TokenChoices


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of groups of n tokens each, and the same seen from the tokens.

    Indices count through all groups: tokens as [groups, n], slots as [experts, groups, capacity]. (Mapping a function
    of one group over groups instead fails inside a `shard_map` that is itself mapped, as a pipeline does.)

    Attributes:
      token: int32 [experts, groups, capacity], the token in each slot; groups * n where it is empty.
      gate: float32 [experts, groups, capacity], what its expert's output weighs; 0 where it is empty.
      choice: int32 [experts, groups, capacity], token * k + rank of the choice that took the slot; groups * n * k where
        it is empty.
      slot: int32 [groups, n, k], the slot of each choice; experts * groups * capacity where it was dropped. None where
        tokens do not choose, as then any number of slots may hold a token.
    """

    token: jax.Array
    gate: jax.Array
    choice: jax.Array
    slot: jax.Array | None


jax.tree_util.register_dataclass(Slots, ["token", "gate", "choice", "slot"], [])


def capacity_of(tokens: int, choices_per_token: int, num_experts: int, factor: float) -> int:
    """Returns an expert's slots for a group: its even share of the choices times `factor`, rounded up (Switch, eq. 3).

    It is at least 1, and at most `tokens`, since no expert takes a token twice.
    """
    even = tokens * choices_per_token * factor / num_experts
    return min(tokens, max(1, math.ceil(even - 1e-9)))


def assign(choices: Choices, real: jax.Array, num_experts: int, capacity: int) -> Slots:
    """Fills the slots of each group.

    All first choices go before all second ones (GShard's order); among equals those of higher priority go first (Batch
    Priority Routing), then those earlier in the group. Padding takes no slot.

    Args:
      choices: experts and gates [groups, n, k] with priority [groups, n] or None, or scores [groups, n, experts].
      real: float32 [groups, n], 0 on padding.
      num_experts: how many there are.
      capacity: slots of each in a group, at most n.
    """
    if isinstance(choices, ExpertScores):
        return _best_tokens(choices.scores, real, capacity)
    return _queue(choices, real, num_experts, capacity)


def kept(slots: Slots, tokens: int) -> jax.Array:
    """Returns how many slots each token holds, float32 [groups, tokens of each]."""
    if slots.slot is not None:
        return jnp.sum(slots.slot < slots.token.size, axis=-1, dtype=jnp.float32)
    groups = slots.token.shape[1]
    counts = jnp.zeros((groups * tokens,), jnp.float32).at[slots.token.reshape(-1)].add(1.0, mode="drop")
    return counts.reshape(groups, tokens)


def of_experts(slots: Slots, first: jax.Array | int, count: int) -> Slots:
    """Returns the slots of experts `first` .. `first + count` alone."""

    def own(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, count)

    each = slots.token[0].size
    slot = slots.slot
    if slot is not None:
        within = slot - first * each
        slot = jnp.where((within >= 0) & (within < count * each), within, count * each)
    return Slots(own(slots.token), own(slots.gate), own(slots.choice), slot)


def _queue(choices: TokenChoices, real: jax.Array, num_experts: int, capacity: int) -> Slots:
    """Sorts a group's choices by (expert, rank, priority, token); each expert's first `capacity` get a slot."""
    groups, n, k = choices.experts.shape
    key = choices.experts * k + jnp.arange(k, dtype=jnp.int32)
    key = jnp.where(real[..., None] > 0, key, num_experts * k).reshape(groups, n * k)
    ids = jnp.broadcast_to(jnp.arange(n * k, dtype=jnp.int32), key.shape)
    if choices.priority is None:
        key, order = jax.lax.sort((key, ids), num_keys=1, is_stable=True)
    else:
        urgency = jnp.broadcast_to(-choices.priority[..., None], (groups, n, k)).reshape(key.shape)
        key, _, order = jax.lax.sort((key, urgency, ids), num_keys=2, is_stable=True)
    # Where each expert's queue begins, and the next one's.
    limits = jnp.arange(num_experts + 1, dtype=jnp.int32) * k
    first = jnp.sum(key[:, :, None] < limits, axis=1, dtype=jnp.int32)
    places = first[:, :-1, None] + jnp.arange(capacity, dtype=jnp.int32)
    taken = places < first[:, 1:, None]
    places = jnp.minimum(places, n * k - 1).reshape(groups, -1)
    choice = jnp.take_along_axis(order, places, axis=1).reshape(taken.shape)
    gate = jnp.take_along_axis(choices.gates.reshape(groups, n * k), choice.reshape(groups, -1), axis=1)
    gate = jnp.where(taken, gate.reshape(taken.shape), 0.0)
    group = jnp.arange(groups, dtype=jnp.int32)
    choice = jnp.where(taken, choice + group[:, None, None] * (n * k), groups * n * k)
    token, gate, choice = (jnp.swapaxes(x, 0, 1) for x in (choice // k, gate, choice))
    # The same from the tokens' side: the place of a choice in its expert's queue.
    expert = key // k
    place = ids - jnp.take_along_axis(first, expert, axis=1)
    slot = jnp.where(
        (place < capacity) & (expert < num_experts),
        (expert * groups + group[:, None]) * capacity + place,
        num_experts * groups * capacity,
    )
    slot = jnp.zeros_like(slot).at[group[:, None], order].set(slot, unique_indices=True)
    return Slots(token, gate, choice, slot.reshape(groups, n, k))


def _best_tokens(scores: jax.Array, real: jax.Array, capacity: int) -> Slots:
    """Each expert takes its best tokens (expert choice)."""
    groups, n, _ = scores.shape
    best, token = jax.lax.top_k(jnp.swapaxes(jnp.where(real[..., None] > 0, scores, -1.0), 1, 2), capacity)
    token = token.astype(jnp.int32) + jnp.arange(groups, dtype=jnp.int32)[:, None, None] * n
    token = jnp.swapaxes(jnp.where(best >= 0, token, groups * n), 0, 1)
    return Slots(token, jnp.swapaxes(jnp.maximum(best, 0.0), 0, 1), token, None)
