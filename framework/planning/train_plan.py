"""The plan of a training step on a topology: memory, FLOPs, what is sent, time. Traced, or compiled as well."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshway.framework.planning import memory as memory_lib
from meshway.framework.planning import waste
from meshway.framework.planning.aot import CompiledProgram
from meshway.framework.planning.audit import exchanges
from meshway.framework.planning.communication import ACTIVATIONS, GRADIENTS, INPUTS, WEIGHTS, Setting, minimum
from meshway.framework.planning.comparison import setting_of
from meshway.framework.planning.flops import count_flops, jaxpr_flops
from meshway.framework.planning.memory import Memory
from meshway.framework.planning.products import Uses, Weight, find_uses
from meshway.framework.planning.stages import Stage, stages_of
from meshway.framework.planning.step_cost import StepCost, Traffic, Wires
from meshway.framework.planning.topology import Topology

RESERVED = 0.25 * 2**30  # bytes of a chip that XLA:TPU keeps for itself: of 16 GiB it gives a program 15.75


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of a step, of all devices together.

    Attributes:
      model: three times the products of a forward pass, attention's scores in full.
      parameters: six for each parameter that a token is multiplied with, and token: without scores.
      hardware: the products of the step as it is traced, recomputed ones and idle stages included.
      tokens: of a batch, those of all features with a loss or without.
    """

    model: float
    parameters: float
    hardware: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What a step costs.

    Attributes:
      mesh: sizes of its axes.
      memory: on a device, traced.
      capacity: bytes of a device.
      cost, traffic: by closed forms.
      compiled: what XLA makes of it; None if it was not asked.
      compiled_cost, compiled_traffic: the same with the collectives of the compiled step; None and empty where there
        is none, or it cannot be read.
      num_params: in all.
      stages: what each of a pipeline's holds; none where there is no pipeline.
    """

    where: Topology
    mesh: dict[str, int]
    num_params: int
    batch_size: int
    num_microbatches: int
    flops: Flops
    memory: Memory
    cost: StepCost
    traffic: tuple[Traffic, ...]
    waste: tuple[waste.Waste, ...]
    stages: tuple[Stage, ...] = ()
    compiled: CompiledProgram | None = None
    compiled_cost: StepCost | None = None
    compiled_traffic: tuple[Traffic, ...] = ()

    @property
    def capacity(self) -> float:
        """Bytes of a device that a program may have."""
        return self.where.chip.memory_bytes - RESERVED

    @property
    def bytes(self) -> float:
        """On a device at the peak, as compiled where it is."""
        return self.compiled.total if self.compiled else self.memory.total

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds them."""
        return self.bytes <= self.capacity

    @property
    def best_cost(self) -> StepCost:
        """As compiled where it is."""
        return self.compiled_cost or self.cost

    @property
    def peak(self) -> float:
        """FLOP/s of all devices together, in bfloat16."""
        return self.where.num_devices * self.where.chip.bfloat16

    def mfu(self, seconds: float) -> float:
        """Returns the share of the devices' peak that the model's FLOPs take in a step of so many seconds."""
        return self.flops.model / (self.peak * seconds)


def traced_plan(program: Any, where: Topology, model_flops: float) -> TrainPlan:
    """Returns the plan of a program's step from its traces; nothing is compiled.

    Args:
      program: a `training.program.TrainProgram` on devices of the topology, described ones or libtpu's.
      model_flops: of a step, forward and backward, on no mesh.

    Raises:
      UserError: the model does not fit the layout.
    """
    closed = program.trace_gradients()
    computed = jaxpr_flops(closed)
    setting = setting_of(program)
    # On no mesh kernels hide no products of experts, and no stage is idle.
    has_experts = any("expert" in weight.names for weight in setting.parameters)
    whole = setting
    if has_experts or setting.stages:
        whole = dataclasses.replace(setting, uses=whole_uses(program, setting.parameters))
    asked = program.trace_loss()
    mesh = dict(setting.mesh)
    tokens = _tokens(program.abstract_batch)
    # By the kernels of the mesh, whose buffers may be larger than what is computed: of use as a ratio alone.
    forward = _forward_flops(program)
    recomputed = min(1.0, max(0.0, computed / forward - 3)) if forward else 0.0
    hardware = computed if setting.stages else model_flops * (1 + recomputed / 3)
    flops = Flops(model_flops, _parameter_flops(whole), hardware, tokens)
    idle = math.prod(mesh[axis] for axis in _idle(asked, mesh, setting))
    memory = memory_lib.step_memory(program, closed)
    state = memory.parameters + memory.optimizer + memory.gradients
    micro = program.num_microbatches
    traffic = traffic_of(setting, micro, recomputed)
    products = whole if has_experts else setting
    cost = step_cost(products, traffic, program.partitioner.mesh, where, hardware * idle, state, micro, recomputed)
    rows = program.explain()
    found = waste.state_waste(rows, mesh, 0.1) + waste.activation_waste(asked, 0.5)
    return TrainPlan(
        where=where,
        mesh=mesh,
        num_params=program.num_params,
        batch_size=program.batch_size,
        num_microbatches=program.num_microbatches,
        flops=flops,
        memory=memory,
        cost=cost,
        traffic=traffic,
        waste=tuple(found),
        stages=stages_of(setting, rows, memory),
    )


def with_compiled(plan: TrainPlan, program: Any, compiled: CompiledProgram) -> TrainPlan:
    """Returns a plan with what XLA made of the step: its collectives, if they can be read, instead of the closed
    forms'."""
    if compiled.unread:
        return dataclasses.replace(plan, compiled=compiled)
    found = exchanges(compiled.collectives)
    traffic = tuple(Traffic(each.axes, each.kind, each.sent, each.count) for each in found)
    ici, dcn, latency = Wires(program.partitioner.mesh, plan.where).seconds(traffic)
    # Which of the compiled collectives are waited for is not read: as many seconds as by the closed forms.
    cost = dataclasses.replace(plan.cost, ici=ici, dcn=dcn, latency=latency, waited=min(plan.cost.waited, ici + dcn))
    return dataclasses.replace(plan, compiled=compiled, compiled_cost=cost, compiled_traffic=traffic)


def whole_uses(program: Any, weights: Sequence[Weight]) -> Uses:
    """Returns how the loss uses the parameters where no mesh shards it: kernels hide none of the products of experts.

    Args:
      weights: the program's parameters, in order, sharded as they are.
    """
    key = jax.random.key(0)
    closed = jax.make_jaxpr(lambda params, batch, key: program.model.loss(params, batch, key)[0])(
        program.param_shapes, program.abstract_batch, key
    )
    return find_uses(closed, weights)


def _forward_flops(program: Any) -> float:
    """Returns the FLOPs of a forward pass by the kernels that the program's devices have."""
    with program.partitioner.activate():
        return count_flops(
            lambda params, batch: program.model.loss(params, batch, None)[0],
            program.param_shapes,
            program.abstract_batch,
        )


def _tokens(batch: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Returns the tokens of a batch: of features whose ids a model reads and of targets, each row's longest pair."""
    weights = [leaf for name, leaf in batch.items() if name.endswith("loss_weights")]
    inputs = [leaf for name, leaf in batch.items() if name == "encoder_input_tokens"]
    return sum(int(np.prod(leaf.shape)) for leaf in [*weights, *inputs])


def _parameter_flops(setting: Setting) -> float:
    """6 N D, with N the weights that are in products and D the rows that each is multiplied with."""
    return sum(
        6.0 * math.prod(product.weight.shape) * product.times * _rows(product) for product in setting.uses.products
    )


def _rows(product: Any) -> float:
    contracted = math.prod(product.weight.shape[dim] for dim in product.contracted)
    batched = math.prod(product.weight.shape[dim] for dim in product.batched)
    return math.prod(product.value.shape) / max(1, contracted * batched)


def _idle(asked: Any, mesh: dict[str, int], setting: Setting) -> list[str]:
    """Returns the axes along which devices compute the same: no constrained activation and no stage is sharded."""
    found = {each.where for each in waste.activation_waste(asked, 0.5) if each.what == "idle mesh axis"}
    return [axis for axis, size in mesh.items() if f"mesh axis {axis}={size}" in found and axis not in setting.stages]


def step_cost(
    setting: Setting,
    traffic: Sequence[Traffic],
    mesh: Mesh,
    where: Topology,
    flops: float,
    state: float,
    microbatches: int,
    recomputed: float,
) -> StepCost:
    """Returns what a step costs at published peaks, by closed forms.

    Args:
      setting: the step and how it is sharded, with all its products.
      traffic: what it sends (`traffic_of`).
      mesh: on devices of the topology.
      flops: that are computed, of all devices together, those that do the same as others included.
      state: bytes of a device: parameters, optimizer's state and gradients.
      recomputed: what remat computes again, in forward passes.
    """
    peak = where.chip.float32 if _is_wide(setting) else where.chip.bfloat16
    passes, bandwidth = 3 + recomputed, where.chip.memory_bandwidth
    weights, values = _product_bytes(setting)
    # What a product reads another operation wrote, and what it writes another reads: as many bytes again.
    elementwise = passes * values + 2 * state
    moved = passes * (microbatches * weights + values) + 2 * state
    wires = Wires(mesh, where)
    waited = sum(wires.seconds(each for each in traffic if each.what in (ACTIVATIONS, INPUTS))[:2])
    times = wires.seconds(traffic)
    return StepCost(flops / (mesh.size * peak), moved / bandwidth, *times, elementwise / bandwidth, waited)


def _is_wide(setting: Setting) -> bool:
    """Whether products are in float32."""
    widths = [np.dtype(product.value.dtype).itemsize for product in setting.uses.products]
    return bool(widths) and min(widths) >= 4


def traffic_of(setting: Setting, microbatches: int, recomputed: float) -> tuple[Traffic, ...]:
    """Returns what is sent: the least (`communication.minimum`), with what a layer-by-layer step sends again.

    Weights are gathered once for the forward and once for the backward pass of each microbatch; gradients are summed in
    each; sums of the forward pass are repeated as far as it is recomputed.
    """
    again = {WEIGHTS: 2.0 * microbatches, GRADIENTS: float(microbatches), ACTIVATIONS: 1 + recomputed / 2}
    runs = max((product.times for product in setting.uses.products), default=1)
    found: dict[tuple[tuple[str, ...], str], tuple[float, int]] = {}
    for term in minimum(setting):
        sent, count = found.get((term.axes, term.role), (0.0, 0))
        times = again.get(term.role, 1.0)
        found[term.axes, term.role] = (sent + term.bytes * times, max(count, math.ceil(runs * times)))
    return tuple(Traffic(axes, role, sent, count) for (axes, role), (sent, count) in found.items())


def _product_bytes(setting: Setting) -> tuple[float, float]:
    """Returns the bytes that a device's products of a forward pass read of weights, and read and write of values.

    The backward pass reads as much again for each of its two products; of a step the state is read and written too.
    """
    weights = sum(
        math.prod(weight.shape)
        / setting.size({axis for axes in weight.dim_axes for axis in axes} - setting.tokens)
        * np.dtype(setting.uses.dtypes.get(weight.path, weight.dtype)).itemsize
        for weight in setting.parameters
    )
    values = sum(
        (product.value.bytes + product.output.bytes)
        * product.times
        / setting.size(setting.tokens | {axis for axes in product.weight.dim_axes for axis in axes})
        for product in setting.uses.products
    )
    return weights, values
