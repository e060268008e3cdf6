"""A stack of layers run as a pipeline of microbatches.

Everything happens in one jitted program. All stages compute at once, as one `vmap` over an axis that the mesh shards;
between time steps their outputs move on by one stage, which compiles to a collective-permute (GPipe in GSPMD, Xu et al.
2021, section 3.3). A scan over time reads the schedule (`circular`), and its derivative is the backward pipeline. A
network split into S stages and V repeats is a chain of S * V parts; part p is on stage p % S, in repeat p // S.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from meshway.framework.axes import Names, constrain, mesh_axes, placement
from meshway.models.layers.positions import PositionBias
from meshway.models.layers.remat import Policy, all_but_moves, of_one_stage


class Walk(NamedTuple):
    """A schedule as arrays [time, stages], for a program whose idle stages compute too, to no effect.

    Attributes:
      microbatch, repeat: int32. An idle stage repeats the last microbatch it worked on, or takes the first, in repeat
        0: inputs that occur anyway, so that the discarded results are as finite as the others.
      active: bool, false where a stage is idle.
    """

    microbatch: np.ndarray
    repeat: np.ndarray
    active: np.ndarray


def circular(num_stages: int, num_microbatches: int, num_repeats: int = 1) -> Walk:
    """Returns the schedule that goes `num_repeats` times around the stages.

    With one repeat it is GPipe's (Huang et al. 2019, section 2.3). With more it is the interleaved schedule of
    Narayanan et al. 2021 (section 2.2): microbatches go in groups of S, a group passes all its V repeats before the
    next one starts, and each stage hands on what it made at once. Of two stages, four microbatches and two repeats,
    with "m.v" for microbatch m in repeat v and "-" for an idle stage:

        time      0    1    2    3    4    5    6    7    8
        stage 0  0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1   -
        stage 1   -   0.0  1.0  0.1  1.1  2.0  3.0  2.1  3.1

    The idle share is (S - 1) / (M V + S - 1).

    Raises:
      ValueError: a number is below one, or groups of S microbatches do not make up M while V > 1.
    """
    if min(num_stages, num_microbatches, num_repeats) < 1:
        raise ValueError(f"a schedule of {num_stages} stages, {num_microbatches} microbatches, {num_repeats} repeats")
    if num_repeats > 1 and num_microbatches % num_stages:
        groups = num_microbatches // num_stages
        near = [number * num_stages for number in (groups, groups + 1) if number]
        raise ValueError(
            f"num_microbatches={num_microbatches} is no multiple of the {num_stages} stages, around which "
            f"num_repeats={num_repeats} sends microbatches in groups of {num_stages}: use "
            f"{' or '.join(map(str, near))}, or num_repeats=1"
        )
    # With one repeat a group may as well be of one microbatch, so that any number will do.
    group = num_stages if num_repeats > 1 else 1
    count = num_microbatches * num_repeats  # what each stage works on, one after the other
    time, stage = np.arange(count + num_stages - 1)[:, None], np.arange(num_stages)
    turn = time - stage  # each stage starts one time step after the one before it
    active = (turn >= 0) & (turn < count)
    turn = np.clip(turn, 0, count - 1)
    microbatch = turn // (group * num_repeats) * group + turn % group
    repeat = np.where(active, turn % (group * num_repeats) // group, 0)
    return Walk(microbatch.astype(np.int32), repeat.astype(np.int32), active)


Layer = Any  # (states, dropout key, None for a cache) of one period of the stack; with a leading axis, of many
Period = Callable[[jax.Array, Layer, dict[str, Any]], tuple[jax.Array, Any]]  # (x, layer, context) -> (x, reports)
ACTIVATIONS = ("batch", "length", "embed")


class TimeStep(NamedTuple):
    """A time step of the schedule, or with a leading axis all of them.

    Attributes:
      microbatch, repeat: what each stage works on, [stages].
      entering, enters: the microbatch of the first stage, and whether it is new: scalars, since an entry of
        `microbatch`, which is sharded over stages, would have to be broadcast.
      leaving, leaves: the microbatch of the last stage, and whether it has passed all layers.
    """

    microbatch: jax.Array
    repeat: jax.Array
    entering: jax.Array
    enters: jax.Array
    leaving: jax.Array
    leaves: jax.Array

    @classmethod
    def of(cls, walk: Walk, num_repeats: int) -> "TimeStep":
        """Returns all time steps, [time, ...]."""
        leaves = walk.active[:, -1] & (walk.repeat[:, -1] == num_repeats - 1)
        first, last = walk.microbatch[:, 0], walk.microbatch[:, -1]
        return cls(*map(jnp.asarray, (walk.microbatch, walk.repeat, first, walk.repeat[:, 0] == 0, last, leaves)))


class RunLayers(Protocol):
    """Runs `period(x, layer)` over consecutive layers, under remat policy `keep`; returns (x, the periods' outputs)."""

    def __call__(
        self,
        period: Callable[[jax.Array, Layer], tuple[jax.Array, Any]],
        x: jax.Array,
        layers: Layer,
        keep: Policy | None,
    ) -> tuple[jax.Array, Any]: ...


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How a stack is run where the layout shards "stage": bind it in a layout file, `Stack.pipeline = @Pipeline()`.

    Attributes:
      num_microbatches: M, into which each batch is split (each microbatch of the step, where it accumulates gradients).
      num_repeats: V, how often a microbatch goes around the S stages. The idle share is (S - 1) / (M V + S - 1)
        (Narayanan et al. 2021, section 2.2).

    Parameters stay the stack's own, [layers, ...], with consecutive layers on each stage. With V > 1 a stage works on V
    shorter runs of layers instead: once a step the weights move between stages, and their gradients move back.

    A dropout key belongs to a layer and a microbatch, so dropout masks differ from those without a pipeline. Auxiliary
    losses and statistics that layers report are means over microbatches, as where gradients are accumulated.
    """

    num_microbatches: int
    num_repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("num_microbatches", "num_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pipeline.{name} must be at least 1, not {getattr(self, name)}")

    def num_stages(self) -> int:
        """Returns into how many stages the ambient layout splits a network; 1 outside any mesh."""
        return _parts("stage")

    def __call__(
        self,
        run: RunLayers,
        period: Period,
        x: jax.Array,
        layers: Layer,
        context: dict[str, Any],
        keep: Policy | None,
    ) -> tuple[jax.Array, Any]:
        """Runs all layers.

        Args:
          run: runs the layers of a stage, by scan or unrolled.
          period: one period of the stack.
          x: [batch, length, d_model].
          layers: pytree of arrays [periods, ...].
          context: pytree of arrays whose first axis is the batch, or 1.
          keep: the remat policy, None for all.

        Returns:
          (x after all layers, the periods' reports, [periods] each, means over microbatches).

        Raises:
          ValueError: periods or batch are not divisible, or a leaf of the context has another number of rows.
        """
        stages, rows = self.num_stages(), x.shape[0]
        self._check(jax.tree.leaves(layers)[0].shape[0], rows, stages)
        walk = circular(stages, self.num_microbatches, self.num_repeats)
        has_rows = _has_rows(context, rows)
        layers = jax.tree.map(lambda leaf: self._by_stage(leaf, stages), layers)
        context = jax.tree.map(lambda leaf, split: self._on_each_stage(leaf, split, stages), context, has_rows)
        run_stages = self._run_stages(run, period, has_rows, keep)
        first, last = (np.arange(stages)[:, None, None, None] == stage for stage in (0, stages - 1))
        # The input of each microbatch, replaced by its result after the last stage. Each stage has a copy, of which the
        # last stage's is read in the end, so that at a time step only the rolled outputs cross stages.
        kept = constrain(_broadcast(self._split(x), 1, stages), (None, "stage", *ACTIVATIONS))

        def step(carry: tuple[jax.Array, jax.Array], now: TimeStep) -> tuple[tuple[jax.Array, jax.Array], Any]:
            outputs, kept = carry
            inputs = jnp.where(first & now.enters, _at(kept, now.entering), _roll(outputs))
            inputs = constrain(inputs, ("stage", *ACTIVATIONS))
            outputs, reports = run_stages(layers, context, inputs, now.microbatch, now.repeat)
            outputs = constrain(outputs, ("stage", *ACTIVATIONS))
            result = jnp.where(now.leaves, outputs, _at(kept, now.leaving))
            return (outputs, jax.lax.dynamic_update_index_in_dim(kept, result, now.leaving, 0)), reports

        (_, kept), reports = jax.lax.scan(step, (kept[0], kept), TimeStep.of(walk, self.num_repeats))
        # One sum over stages; an index would take a permute as well, and one more for the gradient.
        x = constrain(self._join(jnp.sum(jnp.where(last, kept, 0), axis=1)), ACTIVATIONS)
        return x, jax.tree.map(lambda leaf: self._mean(leaf, walk), reports)

    def _check(self, num_periods: int, rows: int, num_stages: int) -> None:
        """Raises ValueError, with the nearest right number, where periods or a batch of `rows` are not divisible."""
        repeats, parts, shards = self.num_repeats, num_stages * self.num_repeats, _parts("batch")
        if repeats % num_stages and num_stages % repeats:
            raise ValueError(
                f"Pipeline.num_repeats={repeats} and {num_stages} stages: one must be a multiple of the other, else no "
                "all-to-all moves the weights to their stages, and each would gather all of them; "
                f"use {_divisors_near(num_stages, repeats)}"
            )
        if num_periods % parts:
            raise ValueError(
                f"a stack of {num_periods} periods of its pattern of blocks cannot be split into {num_stages} stages x "
                f"num_repeats={self.num_repeats}: {_nearest(num_periods, parts)} periods could"
            )
        if rows % (self.num_microbatches * shards):
            numbers = _divisors_near(rows // shards, self.num_microbatches) if rows % shards == 0 else ""
            raise ValueError(
                f"Pipeline.num_microbatches={self.num_microbatches} does not split {rows} rows (BATCH_SIZE over the "
                f"step's NUM_MICROBATCHES) into microbatches that the {shards} shards of the batch share evenly: "
                f"{_nearest(rows, self.num_microbatches * shards)} rows would do"
                f"{numbers and f', or num_microbatches={numbers}'}"
            )

    def _run_stages(
        self, run: RunLayers, period: Period, has_rows: Any, keep: Policy | None
    ) -> Callable[..., tuple[jax.Array, Any]]:
        """Returns the function of one time step: (layers, context, x, microbatch, repeat) -> (x, reports), each with a
        leading axis "stage"."""
        if keep is not None:
            keep = of_one_stage(keep)
        elif self.num_repeats > 1:
            keep = all_but_moves

        def stage(
            layers: Layer, context: Any, x: jax.Array, microbatch: jax.Array, repeat: jax.Array
        ) -> tuple[jax.Array, Any]:
            def one(x: jax.Array, layer: Layer) -> tuple[jax.Array, Any]:
                # Indexed inside the rematerialised function, so that the slices are not saved for every time step.
                states, key, cache = jax.tree.map(lambda leaf: _at(leaf, repeat), layer)
                key = None if key is None else jax.random.fold_in(key, microbatch)
                own = jax.tree.map(lambda leaf, split: _at(leaf, microbatch) if split else leaf, context, has_rows)
                return period(x, (states, key, cache), own)

            return run(one, x, layers, keep)

        return jax.vmap(stage, spmd_axis_name=mesh_axes("stage"))

    def _split(self, x: jax.Array) -> jax.Array:
        """[rows, ...] -> [microbatches, rows of each, ...]. Microbatch i takes rows i, i + M, ...: each is sharded over
        all devices of the batch."""
        return jnp.swapaxes(x.reshape(-1, self.num_microbatches, *x.shape[1:]), 0, 1)

    def _join(self, x: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

    def _by_stage(self, leaf: jax.Array, stages: int) -> jax.Array:
        """[periods, ...] -> [stages, periods of one repeat, repeats, ...], on the devices of each stage."""
        leaf = leaf.reshape(self.num_repeats, stages, -1, *leaf.shape[1:])
        return _constrain_leading(jnp.moveaxis(leaf, 0, 2), ("stage", None, None))

    def _on_each_stage(self, leaf: jax.Array, split: bool, stages: int) -> jax.Array:
        """[rows, ...] -> [stages, microbatches, rows of each, ...] if `split`, else [...] -> [stages, ...]: one copy on
        each stage, whose gradients are summed over stages once, at the end, and not at every time step."""
        if split:
            return _constrain_leading(_broadcast(self._split(leaf), 0, stages), ("stage", None, "batch"))
        return _constrain_leading(_broadcast(leaf, 0, stages), ("stage",))

    def _mean(self, values: jax.Array, walk: Walk) -> jax.Array:
        """Averages a report over microbatches: [time, stages, periods of one repeat, ...] -> [periods, ...] in the
        order of layers. Values of idle stages are masked, not multiplied by zero: they may be NaN."""
        active = walk.active & (walk.repeat == jnp.arange(self.num_repeats)[:, None, None])
        active = active.reshape(*active.shape, *[1] * (values.ndim - 2))
        return jnp.sum(jnp.where(active, values, 0), axis=1).reshape(-1, *values.shape[3:]) / self.num_microbatches


def _parts(name: str) -> int:
    """Returns into how many shards the ambient layout splits a logical axis."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes(name))


def _has_rows(context: Any, rows: int) -> Any:
    """Returns, for each leaf of a stack's context, whether its first axis is the batch.

    Raises:
      ValueError: it is neither that nor 1.
    """

    def leaf_has(leaf: jax.Array) -> bool:
        if leaf.ndim and leaf.shape[0] not in (1, rows):
            raise ValueError(
                f"a pipeline splits the arguments of its layers into microbatches, and an array of shape {leaf.shape} "
                f"has neither the batch's {rows} rows nor 1"
            )
        return bool(leaf.ndim) and leaf.shape[0] == rows

    def node_has(node: Any) -> Any:
        if isinstance(node, PositionBias):  # its table has no axis of rows
            return dataclasses.replace(jax.tree.map(leaf_has, dataclasses.replace(node, table=node.dense)), table=False)
        return leaf_has(node)

    return jax.tree.map(node_has, context, is_leaf=lambda node: isinstance(node, PositionBias))


def _constrain_leading(x: jax.Array, names: Names) -> jax.Array:
    """Constrains the first axes of x and leaves the others unconstrained."""
    where = placement(names, x.shape[: len(names)])
    if where is None:
        return x
    spec = PartitionSpec(*where.spec, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - len(names)))
    return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, spec))


@jax.custom_vjp
def _roll(x: jax.Array) -> jax.Array:
    """Passes the output of each stage to the next, and the last one's to the first: one collective-permute, as is its
    gradient, for which jax would take two."""
    return jnp.roll(x, 1, axis=0)


_roll.defvjp(lambda x: (_roll(x), None), lambda _, gradient: (jnp.roll(gradient, -1, axis=0),))


def _broadcast(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats x along a new axis."""
    return jnp.broadcast_to(jnp.expand_dims(x, axis), (*x.shape[:axis], size, *x.shape[axis:]))


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index], or x[0] where that is all."""
    return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _nearest(number: int, divisor: int) -> str:
    """Returns the multiples of `divisor` next to `number`, as text."""
    below = number // divisor * divisor
    return " or ".join(str(near) for near in (below, below + divisor) if near)


def _divisors_near(number: int, wanted: int) -> str:
    """Returns the divisors of `number` next to `wanted`, as text."""
    divisors = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below, above = [d for d in divisors if d < wanted], [d for d in divisors if d > wanted]
    return " or ".join(map(str, [*below[-1:], *above[:1]]))
