"""Dispatch with bounded capacity: which token takes which slot of which expert, and the way there and back.

A capacity group is a fixed set of tokens (rows of the batch, or parts of one), independent of the mesh; each expert has
`capacity` slots for each group.

Two implementations of one result. `einsum` is the definition: one-hot products under jit's own partitioning, with time
and memory proportional to tokens x slots. `all_to_all` moves rows by index inside a fully manual `shard_map`: one
all-to-all over the mesh axes of "expert" there, and one back.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from meshway.models.layers.mixture.expert_mesh import ExpertMesh
from meshway.models.layers.mixture.experts import ExpertWeights, gather_rows
from meshway.models.layers.mixture.routers import Choices, ExpertScores, TokenChoices


@dataclasses.dataclass(frozen=True)
class Slots:
    """The token of each slot and the slots of each token, for groups of n tokens each.

    Indices count through all groups: tokens as [groups, n], slots as [experts, groups, capacity]. (Mapping a function
    of one group over groups instead fails inside a `shard_map` that is itself mapped, as a pipeline does.)

    Attributes:
      token: int32 [experts, groups, capacity], the token in each slot; groups * n where it is empty.
      gate: float32 [experts, groups, capacity], the weight of its expert's output; 0 where it is empty.
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
    Priority Routing, Riquelme et al. 2021, section 4), then those earlier in the group. Padding takes no slot.

    Args:
      choices: experts and gates [groups, n, k] with priority [groups, n] or None, or scores [groups, n, experts].
      real: float32 [groups, n], 0 on padding.
      num_experts: how many there are.
      capacity: slots of each in a group, at most n.
    """
    if isinstance(choices, ExpertScores):
        return _best_tokens(choices.scores, real, capacity)
    return _queue(choices, real, num_experts, capacity)


def choices_kept(slots: Slots, tokens: int) -> jax.Array:
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


@dataclasses.dataclass(frozen=True)
class Groups:
    """Tokens that share slots: [batch, length, ...] is split into [groups, tokens, ...], in order."""

    tokens: int
    capacity: int  # slots of each expert

    def split(self, x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [groups, tokens, ...]."""
        return x.reshape(-1, self.tokens, *x.shape[2:])


class Routed(NamedTuple):
    """Tokens and their experts.

    Attributes:
      x: [batch, length, d_model].
      choices: those of the router.
      real: float32 [batch, length], 0 on padding.
    """

    x: jax.Array
    choices: Any  # Choices, whose classes are told apart by those who read them
    real: jax.Array


Dispatched = tuple[jax.Array, jax.Array]


def einsum(
    routed: Routed, weights: ExpertWeights, masks: jax.Array | None, groups: Groups, mesh: ExpertMesh | None
) -> Dispatched:
    """Passes tokens through their experts, by one-hot products.

    Args:
      routed: the tokens.
      weights: the experts'.
      masks: dropout's, scaled, [row groups, groups a row, d_ff]; or None.
      groups: which tokens share slots, and how many slots.
      mesh: how the layout shards the layer; None on one device.

    Returns:
      (the gated sum of experts' outputs, like x; how many experts took each token, float32 [batch, length]).
    """
    x = routed.x
    slots = _assign(routed, weights.output.shape[0], groups)
    tokens, size = groups.split(x), groups.tokens
    # Of each slot, which token of its own group it holds.
    within = slots.token[..., None] - size * jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None, None]
    seats = (within == jnp.arange(size, dtype=jnp.int32)).astype(x.dtype)
    rows = _by_expert(jnp.einsum("egcn,gnd->egcd", seats, tokens), mesh)
    mask = None if masks is None else masks.reshape(-1, masks.shape[-1])
    rows = _by_expert(_through_experts(rows, weights, mask), mesh)
    y = jnp.einsum("egc,egcn,egcd->gnd", slots.gate, seats, rows, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(x.shape), choices_kept(slots, size).reshape(x.shape[:2])


def all_to_all(
    routed: Routed, weights: ExpertWeights, masks: jax.Array | None, groups: Groups, mesh: ExpertMesh | None
) -> Dispatched:
    """Passes tokens through their experts, moving rows; arguments and results are those of `einsum`."""
    return on_devices(functools.partial(_move, groups), routed, weights, masks, mesh)


class DispatchKernel(Protocol):
    """The dispatch of one device, on its own tokens and experts; `mask` [units, d_ff] of the units it will work on."""

    def __call__(
        self, routed: Routed, weights: ExpertWeights, mask: jax.Array | None, mesh: ExpertMesh | None
    ) -> Dispatched: ...


def on_devices(
    kernel: DispatchKernel, routed: Routed, weights: ExpertWeights, masks: jax.Array | None, mesh: ExpertMesh | None
) -> Dispatched:
    """Runs a kernel on every device of the mesh, or on the one device; arguments and results are those of `einsum`."""
    if mesh is None:
        return kernel(routed, weights, None if masks is None else masks.reshape(-1, masks.shape[-1]), None)

    def run(routed: Routed, arrays: Any, masks: jax.Array | None) -> Any:
        mask = None if masks is None else mesh.received(masks, whole_rows)
        return kernel(routed, dataclasses.replace(weights, inputs=arrays[0], output=arrays[1]), mask, mesh)

    whole_rows = masks is None or masks.shape[1] == 1
    laid, mask_spec = (None, None) if masks is None else mesh.spread(masks)
    wi, wo = (
        PartitionSpec(mesh.expert or None, *axes) for axes in ((None, mesh.mlp or None), (mesh.mlp or None, None))
    )
    return jax.shard_map(
        run,
        mesh=mesh.mesh,
        in_specs=(mesh.tokens, (wi, wo), mask_spec),
        out_specs=(mesh.result, mesh.tokens),
        # Tracking each value's varying mesh axes fails in a scan that is mapped over stages (jax 0.10 to 0.12).
        # Gradients stay right: jax divides those of outputs, and sums those of inputs, over unnamed axes.
        check_vma=False,
    )(routed, (weights.inputs, weights.output), laid)


def _move(
    groups: Groups, routed: Routed, weights: ExpertWeights, mask: jax.Array | None, mesh: ExpertMesh | None
) -> Dispatched:
    """Rows to slots, slots to the devices of their experts, through these, and the same way back."""
    num_experts = weights.output.shape[0] * (1 if mesh is None else mesh.size(mesh.expert))
    x, choices, real = routed
    slots = _assign(routed, num_experts, groups)
    kept = choices_kept(slots, groups.tokens).reshape(x.shape[:2])
    if mesh is not None and mesh.expert and not mesh.exchange:
        slots = of_experts(slots, *mesh.own_experts(num_experts))
    rows = _to_slots(x.reshape(-1, x.shape[-1]), slots)
    if mesh is not None and mesh.exchange:
        rows = jax.lax.all_to_all(rows, mesh.exchange, 0, 1, tiled=True)
    rows = _through_experts(rows, weights, mask)
    if mesh is not None and mesh.exchange:
        rows = jax.lax.all_to_all(rows, mesh.exchange, 1, 0, tiled=True)
    y = _from_slots(rows, slots, choices, real.size).astype(x.dtype).reshape(x.shape)
    return (y if mesh is None else mesh.reduce(y)), kept


def _assign(routed: Routed, num_experts: int, groups: Groups) -> Slots:
    choices, real = jax.tree.map(groups.split, (routed.choices, routed.real))
    return assign(choices, real, num_experts, groups.capacity)


def _through_experts(rows: jax.Array, weights: ExpertWeights, mask: jax.Array | None) -> jax.Array:
    """rows [experts, groups, capacity, d_model] -> the same shape, each by its own expert; `mask` [groups, d_ff]."""

    def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
        if weights.products is not None:
            return weights.products.of_experts(rows, weight)
        return jnp.einsum("egcd,edf->egcf", rows, weight)

    hidden = weights.hidden(rows, product)
    if mask is not None:
        hidden = hidden * mask[:, None, :].astype(hidden.dtype)
    return product(hidden, weights.output)


def _to_slots(tokens: jax.Array, slots: Slots) -> jax.Array:
    """tokens [all of them, d_model] -> [experts, groups, capacity, d_model], zeros in empty slots."""
    index = slots.token.reshape(-1)
    if slots.slot is None:
        rows = jnp.take(tokens, index, axis=0, mode="fill", fill_value=0)
    else:
        rows = gather_rows(tokens, index, slots.slot.reshape(-1, slots.slot.shape[-1]))
    return rows.reshape(*slots.token.shape, -1)


def _from_slots(rows: jax.Array, slots: Slots, choices: Choices, tokens: int) -> jax.Array:
    """rows [experts, groups, capacity, d_model] -> float32 [tokens, d_model], each token's rows by its gates."""
    flat = rows.reshape(slots.token.size, -1)
    if isinstance(choices, TokenChoices):
        assert slots.slot is not None
        return choices.combine(gather_rows(flat, slots.slot.reshape(-1), slots.choice.reshape(-1, 1)))
    weighed = slots.gate.reshape(-1, 1) * flat.astype(jnp.float32)
    return jnp.zeros((tokens, flat.shape[-1]), jnp.float32).at[slots.token.reshape(-1)].add(weighed, mode="drop")


def _by_expert(rows: jax.Array, mesh: ExpertMesh | None) -> jax.Array:
    """Shards [experts, groups, ...] as the experts are, and groups over the other axes of the batch."""
    if mesh is None:
        return rows
    rest = tuple(axis for axis in mesh.batch if axis not in mesh.expert)
    spec = PartitionSpec(mesh.expert or None, rest if rows.shape[1] % mesh.size(rest) == 0 else None)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh.mesh, spec))
