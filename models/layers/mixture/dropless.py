"""Dispatch without capacity, choices sorted by expert: `dropless` gathers tokens, `ragged` sends each to its experts.

`dropless`: where the mesh shards both experts and tokens, tokens are gathered over the mesh axes of "expert", each
device computes the choices of its own experts, and outputs are reduce-scattered. Arrays have rows for the worst case,
in which all tokens choose the experts of one device.

`ragged`: choices are sorted by expert, so that those for one device are adjacent: one ragged all-to-all there, and one
back. A device sends each token at most k times, where gathering sends it to all others. Arrays have rows for the same
worst case.
"""

import functools
import math

import jax
import jax.numpy as jnp

from meshway.models.layers.mixture.dispatch import Dispatched, Groups, Routed, on_devices
from meshway.models.layers.mixture.expert_mesh import Axes, ExpertMesh
from meshway.models.layers.mixture.experts import ExpertWeights, sort_by_expert, through_experts
from meshway.models.layers.mixture.routers import Choices, TokenChoices


def dropless(
    routed: Routed, weights: ExpertWeights, masks: jax.Array | None, groups: Groups, mesh: ExpertMesh | None
) -> Dispatched:
    """Passes every token through all the experts it chose; arguments and results are those of `dispatch.einsum`, except
    that masks are of rows and capacity is unbounded.

    Raises:
      ValueError: experts choose the tokens.
    """
    del groups
    check(routed.choices, "dropless")
    return on_devices(on_own_experts, routed, weights, masks, mesh)


def check(choices: Choices, dispatch: str) -> None:
    """Raises ValueError where experts choose the tokens."""
    if not isinstance(choices, TokenChoices):
        raise ValueError(
            "MoeMlp: with ExpertChoice each expert takes as many tokens as it has slots, so there is nothing for "
            f"dispatch = {dispatch!r} to do; use 'all_to_all'"
        )


def on_own_experts(
    routed: Routed, weights: ExpertWeights, mask: jax.Array | None, mesh: ExpertMesh | None
) -> Dispatched:
    """All tokens of the exchange through a device's own experts."""
    kept = routed.choices.experts.shape[-1] * routed.real
    first, _ = (0, 0) if mesh is None else mesh.own_experts(weights.output.shape[0] * mesh.size(mesh.expert))
    flat = jax.tree.map(lambda t: t.reshape(-1, *t.shape[2:]), routed)
    if mesh is not None and mesh.exchange:
        flat = jax.tree.map(lambda t: jax.lax.all_gather(t, mesh.exchange, tiled=True), flat)
    y = _own(flat, weights, mask, first).astype(routed.x.dtype)
    if mesh is not None and mesh.exchange:
        y = jax.lax.psum_scatter(y, mesh.exchange, tiled=True)
    y = y.reshape(routed.x.shape)
    return (y if mesh is None else mesh.reduce(y)), kept


def _own(routed: Routed, weights: ExpertWeights, mask: jax.Array | None, first: jax.Array | int) -> jax.Array:
    """Tokens [n, d_model] -> float32 [n, d_model], what the experts from `first` on add to them.

    Choices of others' experts and of padding go to the end of the rows, past the last group.
    """
    tokens, choices, real = routed
    (n, k), count = choices.experts.shape, weights.output.shape[0]
    expert = choices.experts - first
    own = (expert >= 0) & (expert < count) & (real[:, None] > 0)
    by_expert = sort_by_expert(jnp.where(own, expert, count).reshape(-1), count)
    if mask is not None:
        mask = mask[by_expert.order // k // math.ceil(n / mask.shape[0])]
    return choices.combine(through_experts(tokens, by_expert, weights, mask))


def ragged(
    routed: Routed, weights: ExpertWeights, masks: jax.Array | None, groups: Groups, mesh: ExpertMesh | None
) -> Dispatched:
    """Passes every token through all the experts it chose; arguments, results and errors are those of `dropless`."""
    del groups
    check(routed.choices, "ragged")
    return on_devices(_travel, routed, weights, masks, mesh)


def _travel(routed: Routed, weights: ExpertWeights, mask: jax.Array | None, mesh: ExpertMesh | None) -> Dispatched:
    """A device's tokens to their experts and back."""
    if mesh is None or not mesh.exchange:
        return on_own_experts(routed, weights, mask, mesh)
    x, choices, real = routed
    count, k = weights.output.shape[0], choices.experts.shape[-1]
    devices = mesh.size(mesh.exchange)
    tokens = x.reshape(-1, x.shape[-1])
    n = tokens.shape[0]
    expert = jnp.where(real.reshape(-1, 1) > 0, choices.experts.reshape(n, k), devices * count)
    by_expert = sort_by_expert(expert.reshape(-1), devices * count)
    # What each device has for each expert.
    table = jax.lax.all_gather(by_expert.sizes, mesh.exchange)
    sent = table.reshape(devices, devices, count).sum(-1)
    arrived = exchange(by_expert.rows(tokens), sent, devices * n * k, mesh.exchange)
    masked = None
    if mask is not None:
        units = mask.shape[0] // devices
        unit = (by_expert.order // k // math.ceil(n / units)).astype(jnp.int32)[:, None]
        masked = (mask, units, _move(unit, sent, arrived.shape[0], mesh.exchange)[:, 0])
    out = _through_own(arrived, table, weights, masked, mesh)
    rows = exchange(out.astype(x.dtype), sent.T, n * k, mesh.exchange)
    y = choices.combine(by_expert.choices(rows)).astype(x.dtype)
    return mesh.reduce(y.reshape(x.shape)), k * real


def _through_own(
    rows: jax.Array,
    table: jax.Array,
    weights: ExpertWeights,
    masked: tuple[jax.Array, int, jax.Array] | None,
    mesh: ExpertMesh,
) -> jax.Array:
    """Passes what arrived, [room, d_model] by source and then by expert, through a device's own experts.

    Args:
      rows: those past what was sent are zeros.
      table: int32 [devices, experts], what each device has for each expert.
      weights: of the own experts.
      masked: dropout's masks [units, d_ff] of all devices, how many units each has, and each row's unit [room].
      mesh: how the layout cuts.
    """
    devices = table.shape[0]
    first, count = mesh.own_experts(table.shape[1])
    own = jax.lax.dynamic_slice_in_dim(table, first, count, axis=1)
    ends = jnp.cumsum(own.reshape(-1))
    segment = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    expert = jnp.where(segment < devices * count, segment % count, count).astype(jnp.int32)
    by_expert = sort_by_expert(expert, count)
    mask = None
    if masked is not None:
        masks, units, unit = masked
        mask = masks[(segment // count * units + unit)[by_expert.order]]
    return through_experts(rows, by_expert, weights, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: jax.Array, sent: jax.Array, room: int, axes: Axes) -> jax.Array:
    """Sends consecutive rows to each device. Inside a manual kernel only.

    Args:
      rows: [rows, features]: first those for device 0, then those for device 1, and so on.
      sent: int32 [devices, devices], the same everywhere: how many rows the first sends to the second.
      room: most rows that a device may get.
      axes: the mesh axes of the devices.

    Returns:
      [room, features]: what device 0 sent here, then what device 1 did, and so on; then zeros.
    """
    return _move(rows, sent, room, axes)


def _forward(rows: jax.Array, sent: jax.Array, room: int, axes: Axes) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _move(rows, sent, room, axes), (sent, rows.shape[0])


def _backward(room: int, axes: Axes, kept: tuple[jax.Array, int], gradient: jax.Array) -> tuple[jax.Array, None]:
    sent, count = kept
    return _move(gradient, sent.T, count, axes), None


exchange.defvjp(_forward, _backward)


def _move(rows: jax.Array, sent: jax.Array, room: int, axes: Axes) -> jax.Array:
    me = jax.lax.axis_index(axes)
    starts = jnp.cumsum(sent, axis=1) - sent  # where a sender's rows for each device begin
    places = jnp.cumsum(sent, axis=0) - sent  # and where they begin in what that device gets

    def travelling(rows: jax.Array) -> jax.Array:
        empty = jnp.zeros((room, rows.shape[1]), rows.dtype)
        offsets = (starts[me], sent[me], places[me], sent[:, me])
        return jax.lax.ragged_all_to_all(rows, empty, *offsets, axis_name=axes)

    def gathered(rows: jax.Array) -> jax.Array:
        """The same where the backend lacks the instruction, for tests on CPU: everything to everyone."""
        everything = jax.lax.all_gather(rows, axes)
        ends = jnp.cumsum(sent[:, me])
        row = jnp.arange(room)
        source = jnp.searchsorted(ends, row, side="right")
        known = jnp.minimum(source, ends.shape[0] - 1)
        index = starts[known, me] + row - places[known, me]
        return jnp.where((row < ends[-1])[:, None], everything.at[known, index].get(mode="clip"), 0)

    return jax.lax.platform_dependent(rows, cpu=gathered, default=travelling)
