"""Bounded dispatch: tokens travel to slots with their experts and back.

Two forms of one result. `einsum` is the definition: one-hot products under jit's own partitioning, with time and memory
in proportion to tokens x slots. `all_to_all` moves rows by index inside a fully manual `shard_map`: one all-to-all over
the mesh axes of "expert" there, and one back.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from meshway.models.layers.mixture import slots as slots_lib
from meshway.models.layers.mixture.expert_mesh import ExpertMesh
from meshway.models.layers.mixture.experts import ExpertWeights
from meshway.models.layers.mixture.gather import gather_rows
from meshway.models.layers.mixture.routers import Choices, TokenChoices
from meshway.models.layers.mixture.slots import Slots


@dataclasses.dataclass(frozen=True)
class Groups:
    """Tokens that share room: [batch, length, ...] is cut into [groups, tokens, ...], in order."""

    tokens: int
    capacity: int  # slots of each expert

    def cut(self, x: jax.Array) -> jax.Array:
        """[batch, length, ...] -> [groups, tokens, ...]."""
        return x.reshape(-1, self.tokens, *x.shape[2:])


def einsum(
    x: jax.Array,
    choices: Choices,
    real: jax.Array,
    weights: ExpertWeights,
    masks: jax.Array | None,
    groups: Groups,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Passes tokens through their experts, by one-hot products.

    Args:
      x: [batch, length, d_model].
      choices: what the router said.
      real: float32 [batch, length], 0 on padding.
      weights: the experts'.
      masks: dropout's, scaled, [row groups, groups a row, d_ff]; or None.
      groups: who shares room.
      cut: how the layout cuts it.

    Returns:
      (the gated sum of experts' outputs, like x; how many experts took each token, float32 [batch, length]).
    """
    slots = _assign(choices, real, weights.output.shape[0], groups)
    tokens, size = groups.cut(x), groups.tokens
    # Of each slot, which token of its own group it holds.
    within = slots.token[..., None] - size * jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None, None]
    seats = (within == jnp.arange(size, dtype=jnp.int32)).astype(x.dtype)
    rows = _by_expert(jnp.einsum("egcn,gnd->egcd", seats, tokens), cut)
    mask = None if masks is None else masks.reshape(-1, masks.shape[-1])
    rows = _by_expert(_through_experts(rows, weights, mask), cut)
    y = jnp.einsum("egc,egcn,egcd->gnd", slots.gate, seats, rows, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(x.shape), slots_lib.kept(slots, size).reshape(x.shape[:2])


def all_to_all(
    x: jax.Array,
    choices: Choices,
    real: jax.Array,
    weights: ExpertWeights,
    masks: jax.Array | None,
    groups: Groups,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Passes tokens through their experts, moving rows; arguments and results are those of `einsum`."""
    return on_devices(functools.partial(_move, groups), x, choices, real, weights, masks, cut)


class Kernel(Protocol):
    """What each device does: its own tokens and experts; `mask` [units, d_ff] of the units it will work on."""

    def __call__(
        self,
        x: jax.Array,
        choices: Any,
        real: jax.Array,
        weights: ExpertWeights,
        mask: jax.Array | None,
        cut: ExpertMesh | None,
    ) -> tuple[jax.Array, jax.Array]: ...


def on_devices(
    kernel: Kernel,
    x: jax.Array,
    choices: Choices,
    real: jax.Array,
    weights: ExpertWeights,
    masks: jax.Array | None,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel on every device of the mesh, or on the one device; arguments and results are those of `einsum`."""
    if cut is None:
        return kernel(x, choices, real, weights, None if masks is None else masks.reshape(-1, masks.shape[-1]), None)

    def run(x: jax.Array, choices: Choices, real: jax.Array, arrays: Any, masks: jax.Array | None) -> Any:
        mask = None if masks is None else cut.received(masks, whole_rows)
        return kernel(x, choices, real, ExpertWeights(arrays[0], arrays[1], weights.activations), mask, cut)

    whole_rows = masks is None or masks.shape[1] == 1
    laid, mask_spec = (None, None) if masks is None else cut.spread(masks)
    wi, wo = (PartitionSpec(cut.expert or None, *axes) for axes in ((None, cut.mlp or None), (cut.mlp or None, None)))
    return jax.shard_map(
        run,
        mesh=cut.mesh,
        in_specs=(cut.tokens, cut.tokens, cut.tokens, (wi, wo), mask_spec),
        out_specs=(cut.result, cut.tokens),
        # Else each value's varying mesh axes are tracked, which fails in a scan that is mapped over stages (jax 0.10
        # to 0.12). Gradients stay right: jax divides those of outputs, and adds up those of inputs, over unnamed axes.
        check_vma=False,
    )(x, choices, real, (weights.inputs, weights.output), laid)


def _move(
    groups: Groups,
    x: jax.Array,
    choices: Choices,
    real: jax.Array,
    weights: ExpertWeights,
    mask: jax.Array | None,
    cut: ExpertMesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Rows to slots, slots to the devices of their experts, through these, and the same way back."""
    num_experts = weights.output.shape[0] * (1 if cut is None else cut.size(cut.expert))
    slots = _assign(choices, real, num_experts, groups)
    kept = slots_lib.kept(slots, groups.tokens).reshape(x.shape[:2])
    if cut is not None and cut.expert and not cut.exchange:
        slots = slots_lib.of_experts(slots, *cut.own_experts(num_experts))
    rows = _to_slots(x.reshape(-1, x.shape[-1]), slots)
    if cut is not None and cut.exchange:
        rows = jax.lax.all_to_all(rows, cut.exchange, 0, 1, tiled=True)
    rows = _through_experts(rows, weights, mask)
    if cut is not None and cut.exchange:
        rows = jax.lax.all_to_all(rows, cut.exchange, 1, 0, tiled=True)
    y = _from_slots(rows, slots, choices, real.size).astype(x.dtype).reshape(x.shape)
    return (y if cut is None else cut.reduce(y)), kept


def _assign(choices: Choices, real: jax.Array, num_experts: int, groups: Groups) -> Slots:
    choices, real = jax.tree.map(groups.cut, (choices, real))
    return slots_lib.assign(choices, real, num_experts, groups.capacity)


def _through_experts(rows: jax.Array, weights: ExpertWeights, mask: jax.Array | None) -> jax.Array:
    """rows [experts, groups, capacity, d_model] -> the same shape, each by its own expert; `mask` [groups, d_ff]."""

    def product(rows: jax.Array, weight: jax.Array) -> jax.Array:
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


def _by_expert(rows: jax.Array, cut: ExpertMesh | None) -> jax.Array:
    """Constrains [experts, groups, ...] to lie with the experts, the groups over what is left of the batch's axes."""
    if cut is None:
        return rows
    rest = tuple(axis for axis in cut.batch if axis not in cut.expert)
    spec = PartitionSpec(cut.expert or None, rest if rows.shape[1] % cut.size(rest) == 0 else None)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(cut.mesh, spec))
